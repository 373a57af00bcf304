//! Objectives on the toy batch whose values are published in `tests/golden/toy.json`.

use serde_json::Value;
use tch::{Kind, Tensor};

use super::ap::AnswerPreservation;
use super::dpo::Dpo;
use super::flat::Flat;
use super::ga::GradientAscent;
use super::kto::Kto;
use super::nll::NegativeLogLikelihood;
use super::npo::Npo;
use super::satimp::SatImp;
use super::simnpo::SimNpo;
use super::tnpo::Tnpo;
use super::wga::Wga;
use crate::config::Divergence;
use crate::data::Texts;
use crate::train::{Objective, Term, Tokens, Totals};

struct Toy {
    json: Value,
}

impl Toy {
    fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/toy.json");
        Self { json: serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap() }
    }

    /// Log-probabilities of all rows, one after the other, and the row of each.
    fn logprobs(&self, which: &str) -> (Tensor, Tensor) {
        let rows = self.json["logp"][which].as_array().unwrap();
        let (mut values, mut owner) = (Vec::new(), Vec::new());
        for (row, tokens) in rows.iter().enumerate() {
            for token in tokens.as_array().unwrap() {
                values.push(token.as_f64().unwrap());
                owner.push(row as i64);
            }
        }
        (Tensor::from_slice(&values), Tensor::from_slice(&owner))
    }

    /// `stream` with the preferred answers of `preferred`, laid out as the objective asks for.
    fn term(&self, objective: &dyn Objective, stream: &str, preferred: &str) -> Term {
        let given = |texts: Texts| self.laid_out(texts, stream, preferred);
        let (looked_at, main) = (objective.looks_at().map(given), given(objective.texts()));
        let looked = looked_at.map(|laid| laid.with(None, |tokens| objective.look(tokens)));
        main.with(looked.as_ref(), |tokens| objective.term(tokens))
    }

    fn laid_out(&self, texts: Texts, stream: &str, preferred: &str) -> Laid {
        let rows = |which: &str| -> Vec<Vec<f64>> { serde_json::from_value(self.json["logp"][which].clone()).unwrap() };
        let streams: Vec<&str> = match texts {
            Texts::Answer => vec![stream],
            Texts::Preferred => vec![preferred],
            Texts::Both => vec![stream, preferred],
        };
        let mut laid = Laid::default();
        for sample in 0..2 {
            for (nth, name) in streams.iter().enumerate() {
                let (now, before) =
                    (&rows(&format!("{name}_current"))[sample], &rows(&format!("{name}_reference"))[sample]);
                laid.sequence.resize(laid.sequence.len() + now.len(), (sample * streams.len() + nth) as i64);
                laid.stream.resize(laid.stream.len() + now.len(), (*name).to_owned());
                laid.now.extend(now);
                laid.before.extend(before);
            }
        }
        laid.num_sequences = 2 * streams.len() as i64;
        laid.counted = laid.stream.iter().filter(|name| *name == streams[0]).count() as f64;
        laid
    }
}

/// Tokens in the order of an objective, and the stream of each.
#[derive(Default)]
struct Laid {
    now: Vec<f64>,
    before: Vec<f64>,
    sequence: Vec<i64>,
    stream: Vec<String>,
    num_sequences: i64,
    counted: f64,
}

impl Laid {
    fn with<T>(&self, looked: Option<&Tensor>, body: impl FnOnce(&Tokens) -> T) -> T {
        body(&Tokens {
            logprob: &Tensor::from_slice(&self.now),
            reference: Some(&Tensor::from_slice(&self.before)),
            sequence: &Tensor::from_slice(&self.sequence),
            num_sequences: self.num_sequences,
            totals: Totals { sequences: 2.0, tokens: self.counted },
            looked,
        })
    }
}

fn value(term: &Term) -> f64 {
    f64::try_from(&term.loss).unwrap()
}

fn flat_list(json: &Value) -> Vec<f64> {
    json.as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap()).collect()
}

const NLL: NegativeLogLikelihood = NegativeLogLikelihood { texts: Texts::Answer };

#[test]
fn losses_are_the_published_ones() {
    let toy = Toy::read();
    let ga = value(&toy.term(&GradientAscent, "forget", "idk"));
    let nll = value(&toy.term(&NLL, "retain", "idk"));
    for (got, published) in [
        (ga, -2.615_702_61),
        (nll, 2.937_279_08),
        (ga + nll, 0.321_576_47),
        (value(&toy.term(&Npo { beta: 0.1 }, "forget", "idk")), 14.026_773_36),
        (value(&toy.term(&Npo { beta: 1.0 }, "forget", "idk")), 1.710_484_54),
    ] {
        assert!((got - published).abs() < 1e-6, "{got} instead of {published}");
    }
}

/// Values (where the methods' own code published them, `toy.py` holds its own to that) and derivatives by every log-probability,
/// which `toy.py` found by finite differences.
#[test]
fn values_and_derivatives_are_those_of_the_formulas() {
    let toy = Toy::read();
    let flat = |divergence, by_batch| -> Box<dyn Objective> { Box::new(Flat { divergence, by_batch }) };
    let cases: Vec<(&str, Box<dyn Objective>, &[&str])> = vec![
        ("dpo_beta_0.1", Box::new(Dpo { beta: 0.1 }), &["forget", "idk"]),
        ("simnpo_4.5_0", Box::new(SimNpo { beta: 4.5, delta: 0.0 }), &["forget"]),
        ("simnpo_2.5_0", Box::new(SimNpo { beta: 2.5, delta: 0.0 }), &["forget"]),
        ("simnpo_2.5_0.5", Box::new(SimNpo { beta: 2.5, delta: 0.5 }), &["forget"]),
        ("wga_1", Box::new(Wga { beta: 1.0 }), &["forget"]),
        ("wga_5", Box::new(Wga { beta: 5.0 }), &["forget"]),
        ("satimp_5_1", Box::new(SatImp { beta1: 5.0, beta2: 1.0 }), &["forget"]),
        ("satimp_5_0.1", Box::new(SatImp { beta1: 5.0, beta2: 0.1 }), &["forget"]),
        ("tnpo_4", Box::new(Tnpo { beta: 4.0, alpha: 1.0 }), &["forget"]),
        ("kto_paper", Box::new(Kto { beta: 0.1, is_code: false }), &["forget"]),
        ("kto_code", Box::new(Kto { beta: 0.1, is_code: true }), &["forget"]),
        ("ap_0.1", Box::new(AnswerPreservation { beta: 0.1 }), &["retain", "idk"]),
        ("flat_tv_samples", flat(Divergence::Tv, false), &["forget", "idk"]),
        ("flat_kl_samples", flat(Divergence::Kl, false), &["forget", "idk"]),
        ("flat_js_samples", flat(Divergence::Js, false), &["forget", "idk"]),
        ("flat_pearson_samples", flat(Divergence::Pearson, false), &["forget", "idk"]),
        ("flat_tv_tokens", flat(Divergence::Tv, true), &["forget", "idk"]),
        ("flat_kl_tokens", flat(Divergence::Kl, true), &["forget", "idk"]),
        ("flat_js_tokens", flat(Divergence::Js, true), &["forget", "idk"]),
        ("flat_pearson_tokens", flat(Divergence::Pearson, true), &["forget", "idk"]),
    ];
    for (name, objective, streams) in cases {
        let term = toy.term(objective.as_ref(), streams[0], "idk");
        let want = toy.json["values"][name].as_f64().unwrap();
        assert!((value(&term) - want).abs() < 1e-9, "{name}: {} instead of {want}", value(&term));
        let weight = Vec::<f64>::try_from(&term.weight).unwrap();
        let laid = toy.laid_out(objective.texts(), streams[0], "idk");
        for stream in streams {
            let got: Vec<f64> =
                weight.iter().zip(&laid.stream).filter(|(_, name)| name == stream).map(|(w, _)| *w).collect();
            let want = flat_list(&toy.json["dloss_dlogp"][format!("{name}_{stream}")]);
            assert_eq!(got.len(), want.len(), "{name} {stream}");
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-8), "{name}: {got:?} instead of {want:?}");
        }
    }
}

/// The means of the published code count ignored positions as 0: 2 rows of 5.
#[test]
fn flat_of_the_published_means_is_the_published_one() {
    let means = [0.088_070_09, 0.047_611_03].map(|p: f64| Tensor::from_slice(&[p]));
    for (divergence, published) in [
        (Divergence::Tv, 0.020_134_00),
        (Divergence::Kl, 0.354_137_11),
        (Divergence::Js, 0.021_482_08),
        (Divergence::Pearson, 0.042_398_15),
    ] {
        let (loss, ..) = Flat { divergence, by_batch: true }.values(&means[0], &means[1]);
        assert!((loss.double_value(&[0]) - published).abs() < 1e-8, "{divergence:?}");
    }
}

/// Signs: a preferred answer becomes likelier, the other one less likely; an undesired answer less likely.
#[test]
fn preferences_pull_the_right_way() {
    let toy = Toy::read();
    for (objective, up) in
        [(&Dpo { beta: 0.1 } as &dyn Objective, "idk"), (&AnswerPreservation { beta: 0.1 }, "forget")]
    {
        let weight = Vec::<f64>::try_from(toy.term(objective, "forget", "idk").weight).unwrap();
        let laid = toy.laid_out(Texts::Both, "forget", "idk");
        // descent goes against the derivative
        assert!(weight.iter().zip(&laid.stream).all(|(w, stream)| (*w < 0.0) == (stream == up)));
    }
    let weight = toy.term(&Kto { beta: 0.1, is_code: false }, "forget", "idk").weight;
    assert!(weight.min().double_value(&[]) > 0.0);
}

#[test]
fn weights_are_the_derivatives() {
    let toy = Toy::read();
    let cases: [(&str, &dyn Objective); 3] =
        [("ga", &GradientAscent), ("npo_beta_0.1", &Npo { beta: 0.1 }), ("npo_beta_1.0", &Npo { beta: 1.0 })];
    for (name, objective) in cases {
        let want = flat_list(&toy.json["dloss_dlogp"][name]);
        let got = Vec::<f64>::try_from(toy.term(objective, "forget", "idk").weight.to_kind(Kind::Double)).unwrap();
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-9), "{name}: {got:?} instead of {want:?}");
    }
}

/// Every objective that is a function of log-probabilities without anything held constant: its weights against central differences of
/// its own loss in f64; and those of NPO against the paper's formula.
#[test]
fn weights_are_central_differences_of_the_losses() {
    let toy = Toy::read();
    let flat = |divergence, by_batch| -> Box<dyn Objective> { Box::new(Flat { divergence, by_batch }) };
    let cases: Vec<Box<dyn Objective>> = vec![
        Box::new(GradientAscent),
        Box::new(NLL),
        Box::new(NegativeLogLikelihood { texts: Texts::Preferred }),
        Box::new(Npo { beta: 0.1 }),
        Box::new(Npo { beta: 1.0 }),
        Box::new(Dpo { beta: 0.1 }),
        Box::new(SimNpo { beta: 2.5, delta: 0.5 }),
        Box::new(AnswerPreservation { beta: 0.1 }),
        flat(Divergence::Tv, false),
        flat(Divergence::Kl, false),
        flat(Divergence::Js, false),
        flat(Divergence::Pearson, false),
    ];
    for (index, objective) in cases.iter().enumerate() {
        let laid = || toy.laid_out(objective.texts(), "forget", "idk");
        let weight = Vec::<f64>::try_from(laid().with(None, |tokens| objective.term(tokens)).weight).unwrap();
        for (token, weight) in weight.iter().enumerate() {
            let moved = |step: f64| {
                let mut laid = laid();
                laid.now[token] += step;
                value(&laid.with(None, |tokens| objective.term(tokens)))
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - weight).abs() < 1e-8, "case {index}, token {token}: {weight}, differences say {slope}");
        }
    }
    // W = 2 pi^beta / (pi^beta + pi_ref^beta), over the samples
    let laid = toy.laid_out(Texts::Answer, "forget", "idk");
    let beta = 0.7;
    let weight = Vec::<f64>::try_from(laid.with(None, |tokens| Npo { beta }.term(tokens)).weight).unwrap();
    let sum = |of: &[f64], row: i64| {
        let mine = of.iter().zip(&laid.sequence).filter(|(_, sequence)| **sequence == row);
        mine.map(|(logprob, _)| logprob).sum::<f64>()
    };
    for (weight, &row) in weight.iter().zip(&laid.sequence) {
        let [now, then] = [sum(&laid.now, row), sum(&laid.before, row)].map(|log| (beta * log).exp());
        assert!((weight - 2.0 * now / (now + then) / 2.0).abs() < 1e-12);
    }
}

/// As beta goes to 0 NPO's gradient goes to that of ascent on the summed log-probabilities, 1/sequences for each token.
#[test]
fn npo_tends_to_gradient_ascent() {
    let toy = Toy::read();
    let mut last = f64::INFINITY;
    for beta in [1e-1, 1e-2, 1e-3, 1e-4] {
        let weight = toy.term(&Npo { beta }, "forget", "idk").weight;
        let distance = f64::try_from((weight - 0.5).abs().max()).unwrap();
        assert!(distance < last / 9.0, "beta {beta}: {distance}");
        last = distance;
    }
    assert!(last < 1e-4);
    // at the reference itself the loss is (2/beta) log 2 and every weight 1/sequences
    let (logprob, sequence) = toy.logprobs("forget_reference");
    let totals = Totals { sequences: 2.0, tokens: 6.0 };
    let at = Tokens {
        logprob: &logprob,
        reference: Some(&logprob),
        sequence: &sequence,
        num_sequences: 2,
        totals,
        looked: None,
    };
    let term = Npo { beta: 0.1 }.term(&at);
    assert!((value(&term) - 20.0 * std::f64::consts::LN_2).abs() < 1e-12);
    assert!(f64::try_from((term.weight - 0.5).abs().max()).unwrap() < 1e-15);
}

#[test]
fn npo_does_not_overflow() {
    for shift in [-1e4, 1e4] {
        let (reference, sequence) = (Tensor::from_slice(&[-1.0f64]), Tensor::from_slice(&[0i64]));
        let logprob = &reference + shift;
        let totals = Totals { sequences: 1.0, tokens: 1.0 };
        let at = Tokens {
            logprob: &logprob,
            reference: Some(&reference),
            sequence: &sequence,
            num_sequences: 1,
            totals,
            looked: None,
        };
        let term = Npo { beta: 1.0 }.term(&at);
        assert!((value(&term) - 2.0 * f64::max(shift, 0.0)).abs() < 1e-6);
    }
}
