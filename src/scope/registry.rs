//! What masks can be made by, as `dunlearn methods` lists it.

use serde::Serialize;

/// One score of `scope.mask`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ScoreEntry {
    /// The value of `scope.mask.score`.
    pub name: &'static str,
    /// How a weight or group is rated.
    pub title: &'static str,
    /// Address of the paper.
    pub source: &'static str,
    pub needs: &'static str,
}

/// Samples and passes that scores look at.
const FORGET: &str = "forget gradients";
const BOTH: &str = "forget and retain gradients";

pub const SCORES: &[ScoreEntry] = &[
    ScoreEntry { name: "random", title: "uniform, from `run.seed`", source: "", needs: "" },
    ScoreEntry { name: "gradient", title: "abs(g_f)", source: "https://arxiv.org/abs/2310.12508", needs: FORGET },
    ScoreEntry {
        name: "gri",
        title: "abs(g_f) / (abs(g_r) + eps)",
        source: "https://arxiv.org/abs/2508.06467",
        needs: BOTH,
    },
    ScoreEntry {
        name: "fila",
        title: "F_f / (F_r + eps), F the mean square over batches of `global_batch`",
        source: "https://arxiv.org/abs/2408.06621",
        needs: BOTH,
    },
    ScoreEntry {
        name: "wagle",
        title: "abs((w - g_r / mu) g_f)",
        source: "https://arxiv.org/abs/2410.17509",
        needs: BOTH,
    },
    ScoreEntry {
        name: "memflex",
        title: "mean abs(g_f) of a group; those with cos(g_f, g_r) < `max_cosine` and mean > `min_gradient` first",
        source: "https://arxiv.org/abs/2407.01920",
        needs: BOTH,
    },
    ScoreEntry {
        name: "activations",
        title: "mean abs(activation) over answer tokens times the length of the value vector; `unit = \"column\"`",
        source: "https://arxiv.org/abs/2311.09060",
        needs: "forget activations",
    },
    ScoreEntry { name: "del", title: "abs(w g_f)", source: "https://arxiv.org/abs/2412.02186", needs: FORGET },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Score, json_schema};

    /// Every score of the configuration language is listed, and nothing else.
    #[test]
    fn every_score_is_listed() {
        for entry in SCORES {
            assert!(serde_json::from_value::<Score>(entry.name.into()).is_ok(), "{}", entry.name);
        }
        let schema: serde_json::Value = serde_json::from_str(&json_schema()).unwrap();
        let known = schema["$defs"]["Score"]["oneOf"].as_array().expect("scores with their docs");
        assert_eq!(known.len(), SCORES.len());
    }
}
