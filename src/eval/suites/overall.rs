//! One score for memorisation, privacy and utility from what the suites `tofu` and `mia` have told; see
//! [`statistics::overall`]. Fluency is the variety of the answers about the forget set, as there is no classifier.

use super::aggregate::put;
use super::{Others, Suites};
use crate::eval::record::{Better, Evaluation};
use crate::eval::statistics::{self, Memorisation, Overall};

const ATTACKS: [&str; 4] = ["loss", "zlib", "min_k", "min_k_plus_plus"];

/// Puts `overall.score` and its parts where both suites ran beside a retrained and an original model.
pub(super) fn tell(suites: &Suites, others: &Others, out: &mut Evaluation) {
    let runs = |name: &str| suites.suites.iter().any(|suite| suite.name() == name);
    let (Some(retrained), Some(original)) = (&others.retrained, &others.original) else { return };
    if !(runs("tofu") && runs("mia")) {
        return;
    }
    match parts(out, retrained, original) {
        Ok(Overall { memorisation, privacy, utility, value }) => {
            for (name, value) in [
                ("overall.score", value),
                ("overall.memorisation", memorisation),
                ("overall.privacy", privacy),
                ("overall.utility", utility),
            ] {
                put(out, name, None, Ok(value), 3, Better::Higher);
            }
        }
        Err(reason) => out.warn(format!("overall.score was not computed: {reason}")),
    }
}

fn parts(out: &Evaluation, retrained: &Evaluation, original: &Evaluation) -> Result<Overall, String> {
    let value = |of: &Evaluation, whose: &str, name: &str| of.value(name).ok_or(format!("{whose} has no {name}"));
    let own = |name: &str| value(out, "the model", name);
    let memorisation = Memorisation {
        extraction_strength: own("tofu_forget.extraction_strength")?,
        exact_memorisation: own("tofu_forget.exact_memorisation")?,
        paraphrase_probability: own("tofu_forget.paraphrase_probability")?,
        knowledge_extent: own("tofu_forget.knowledge_extent")?,
    };
    let closeness = |attack: &&str| {
        let name = format!("mia.{attack}_auc");
        let (own, theirs) = (own(&name)?, value(retrained, "the retrained model", &name)?);
        statistics::privacy_closeness(own, theirs).map_err(|error| error.to_string())
    };
    let closeness: Vec<f64> = ATTACKS.iter().map(closeness).collect::<Result<_, String>>()?;
    let utility = |of: &Evaluation, whose: &str| {
        Ok::<_, String>([value(of, whose, "tofu.model_utility")?, value(of, whose, "tofu_forget.variety")?])
    };
    let (own, before) = (utility(out, "the model")?, utility(original, "the original model")?);
    statistics::overall(&memorisation, &closeness, own, before).map_err(|error| error.to_string())
}
