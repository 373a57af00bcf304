//! What an end means: the run's mark first, then the ranks' own words, the engine's exit code last.

use super::attempt::Ended;
use super::codes::{Code, Verdict};

/// What an end means.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    pub(super) verdict: Verdict,
    /// Exit code of the launch if it ends here.
    pub(super) code: u8,
    pub(super) words: String,
    /// A host that is gone would explain it.
    pub(super) host_may_be_lost: bool,
    /// Nobody knows whether a retry helps; if it brings the same, it does not.
    pub(super) same_again_is_hopeless: bool,
}

/// Judges by the run's mark and the ranks' words first, by the engine's exit code last.
pub(super) fn judge(ended: &Ended, restarted: bool, at_once: bool) -> Failure {
    let found = |code: Code, words: String| Failure {
        verdict: code.verdict(),
        code: code.number(),
        words,
        host_may_be_lost: matches!(code, Code::Unfinished) || code.is_echo(),
        same_again_is_hopeless: code == Code::Panic,
    };
    if ended.marked {
        return found(Code::Done, "finished".to_owned());
    }
    if at_once {
        // as a shell names an end by Ctrl-C
        let words = "ended at once; what was not saved is lost".to_owned();
        return Failure { verdict: Verdict::Stopped, code: 130, ..found(Code::Again, words) };
    }
    // the first that did not merely feel what happened to another
    let is_echo = |code: i32| Code::of(code).is_some_and(Code::is_echo);
    let cause = ended.endings.iter().min_by(|a, b| {
        (is_echo(a.code), a.time).partial_cmp(&(is_echo(b.code), b.time)).expect("invariant: times are numbers")
    });
    if let Some(cause) = cause {
        let code = Code::of(cause.code).unwrap_or(Code::Panic);
        return found(
            code,
            format!("rank {} on {}: {} (exit code {})", cause.rank, cause.host, cause.message, cause.code),
        );
    }
    let unfinished = |words: String| found(Code::Unfinished, words);
    match (ended.code, ended.signal) {
        (_, Some(signal)) => unfinished(format!("the engine was killed by signal {signal}")),
        (Some(0), _) => {
            unfinished("the engine ended with code 0 and the run did not: a host or its connection is lost".to_owned())
        }
        // no run answers no: 1 is an engine's own word for whatever went wrong
        (Some(code), _) => match Code::of(code).filter(|&code| code != Code::No) {
            Some(Code::Again) => found(Code::Again, Code::Again.meaning().to_owned()),
            Some(code) => found(code, format!("{} (exit code {})", code.meaning(), code.number())),
            // mpirun has codes of its own above those of signals
            None if (129..160).contains(&code) => Failure {
                code: u8::try_from(code).unwrap_or(255),
                ..unfinished(format!("a rank was killed by signal {} (exit code {code})", code - 128))
            },
            None if ended.ready || restarted => unfinished(format!("the engine ended with code {code}")),
            None => Failure {
                verdict: Verdict::Hopeless,
                code: u8::try_from(code).unwrap_or(255),
                ..unfinished(format!("the engine could not start the ranks (exit code {code})"))
            },
        },
        (None, None) => unfinished("the engine is gone".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::notes::Ending;
    use super::*;

    fn spoke(rank: usize, code: Code, time: f64) -> Ending {
        Ending { rank, host: format!("n{rank}"), code: i32::from(code.number()), message: format!("{code:?}"), time }
    }

    fn code(code: i32) -> Ended {
        Ended { code: Some(code), ready: true, ..Ended::default() }
    }

    fn of(ended: &Ended) -> (Verdict, u8) {
        let failure = judge(ended, false, false);
        (failure.verdict, failure.code)
    }

    #[test]
    fn the_mark_decides_and_not_the_engine() {
        let marked = |number| Ended { marked: true, ..code(number) };
        assert_eq!(of(&marked(0)), (Verdict::Finished, 0));
        assert_eq!(of(&marked(137)), (Verdict::Finished, 0));
        assert_eq!(of(&code(0)), (Verdict::Retry, 106));
        // an engine's own word, never a run's
        assert_eq!(of(&code(1)), (Verdict::Retry, 106));
        assert_eq!(of(&code(75)), (Verdict::Stopped, 75));
        assert_eq!(of(&code(137)), (Verdict::Retry, 137));
        assert_eq!(of(&code(2)), (Verdict::Hopeless, 2));
        assert_eq!(of(&Ended { signal: Some(9), ..Ended::default() }), (Verdict::Retry, 106));
    }

    #[test]
    fn the_first_cause_is_told_and_not_its_echoes() {
        let ended = Ended {
            endings: vec![spoke(0, Code::Deadline, 1.0), spoke(1, Code::Memory, 3.0), spoke(2, Code::Panic, 4.0)],
            ..code(0)
        };
        let failure = judge(&ended, false, false);
        assert_eq!((failure.verdict, failure.code), (Verdict::Hopeless, 104));
        assert_eq!(failure.words, "rank 1 on n1: Memory (exit code 104)");
        let echoes = Ended { endings: vec![spoke(0, Code::Deadline, 2.0), spoke(3, Code::Loss, 1.0)], ..code(0) };
        assert_eq!(of(&echoes), (Verdict::Retry, 105));
        assert!(judge(&echoes, false, false).host_may_be_lost);
    }

    #[test]
    fn an_engine_that_cannot_start_is_not_asked_again() {
        let never = Ended { ready: false, ..code(213) };
        assert_eq!(of(&never), (Verdict::Hopeless, 213));
        assert_eq!(judge(&never, true, false).verdict, Verdict::Retry, "a host may be on its way back");
        assert_eq!(of(&code(213)), (Verdict::Retry, 106));
        assert_eq!((judge(&code(1), false, true).verdict, judge(&code(1), false, true).code), (Verdict::Stopped, 130));
    }
}
