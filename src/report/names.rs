//! Metrics in words, and which of them come first.

/// Words for the last part of a metric's name.
const WORDS: [(&str, &str); 19] = [
    ("probability", "answer probability"),
    ("token_accuracy", "token accuracy"),
    ("rouge_l_recall", "ROUGE-L recall"),
    ("rouge_l_f1", "ROUGE-L F1"),
    ("extraction_strength", "extraction strength"),
    ("exact_memorisation", "exact memorisation"),
    ("truth_ratio", "truth ratio"),
    ("forget_quality", "forget quality (p)"),
    ("log10_forget_quality", "forget quality, log₁₀ p"),
    ("model_utility", "model utility"),
    ("priv_leak", "PrivLeak (%)"),
    ("min_k_auc", "Min-k% AUC"),
    ("min_k_plus_plus_auc", "Min-k%++ AUC"),
    ("zlib_auc", "zlib AUC"),
    ("loss_auc", "loss AUC"),
    ("per_token", "perplexity of a token"),
    ("bits_per_byte", "bits a byte"),
    ("loss", "loss (nats a token)"),
    ("accuracy", "accuracy"),
];

/// Ends of names in the order in which they stand in the headline. What is not here is in the table of all metrics.
const HEADLINE: [&str; 14] = [
    "log10_forget_quality",
    "model_utility",
    "probability",
    "token_accuracy",
    "rouge_l_recall",
    "rouge_l_f1",
    "extraction_strength",
    "truth_ratio",
    "priv_leak",
    "min_k_auc",
    "accuracy",
    "variety",
    "repetition",
    "per_token",
];

/// The name of a metric for a person: `forget: answer probability`.
pub(super) fn words(name: &str) -> String {
    let (set, metric) = name.rsplit_once('.').unwrap_or(("", name));
    let known = WORDS.iter().find(|(key, _)| *key == metric).map(|(_, words)| (*words).to_owned());
    let metric = known.unwrap_or_else(|| metric.replace('_', " "));
    if set.is_empty() { metric } else { format!("{}: {metric}", set.replace('_', " ")) }
}

/// The metric alone, without its set.
pub(super) fn metric_words(metric: &str) -> String {
    words(metric)
}

/// The headline's metrics of these, in its order. Where a benchmark measured what was to be forgotten and what was to be kept, the run's own sets,
/// which are the same questions, are left to the table of all metrics.
pub(super) fn headline<'a>(names: impl Iterator<Item = &'a String>) -> Vec<&'a String> {
    let mut names: Vec<&String> = names.filter(|name| headline_rank(name).is_some()).collect();
    names.sort_by_key(|name| headline_rank(name));
    names.dedup();
    if names.iter().any(|name| name.starts_with("tofu_forget.")) {
        names.retain(|name| !name.starts_with("forget.") && !name.starts_with("retain."));
    }
    names
}

/// Place in the headline: first by what it is about, then by metric. None: only in the table of all metrics.
fn headline_rank(name: &str) -> Option<(usize, String, usize)> {
    let (set, metric) = name.rsplit_once('.').unwrap_or(("", name));
    let rank = HEADLINE.iter().position(|key| *key == metric)?;
    Some((about(set)?, set.to_owned(), rank))
}

/// Whole benchmarks first, then what was to be forgotten, what was to be kept, the rest. None: parts of a benchmark's own aggregate.
fn about(set: &str) -> Option<usize> {
    match set {
        "tofu_real_authors" | "tofu_world_facts" => None,
        "tofu" => Some(0),
        set if set.contains("forget") || set == "muse_verbmem" => Some(1),
        set if set.contains("retain") => Some(2),
        _ => Some(3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_words() {
        assert_eq!(words("forget.probability"), "forget: answer probability");
        assert_eq!(words("tofu_world_facts.rouge_l_recall"), "tofu world facts: ROUGE-L recall");
        assert_eq!(words("seconds"), "seconds");
    }

    #[test]
    fn what_was_to_be_forgotten_comes_before_what_was_to_be_kept() {
        let names = [
            "retain.probability",
            "wmdp_bio.accuracy",
            "forget.rouge_l_f1",
            "forget.loss",
            "tofu_world_facts.probability",
            "tofu.model_utility",
            "forget.probability",
        ];
        let mut names = names.map(str::to_owned).to_vec();
        let found = headline(names.iter());
        assert_eq!(
            found,
            [
                "tofu.model_utility",
                "forget.probability",
                "forget.rouge_l_f1",
                "retain.probability",
                "wmdp_bio.accuracy"
            ]
        );
        // the benchmark's sets stand for the run's own
        names.push("tofu_forget.probability".to_owned());
        assert_eq!(headline(names.iter()), ["tofu.model_utility", "tofu_forget.probability", "wmdp_bio.accuracy"]);
    }
}
