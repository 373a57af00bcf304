//! Objectives on the toy batch whose values are published in `tests/golden/toy.json`.

use serde_json::Value;
use tch::{Kind, Tensor};

use super::{GradientAscent, NegativeLogLikelihood, Npo};
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

    fn term(&self, objective: &dyn Objective, stream: &str) -> Term {
        let (logprob, sequence) = self.logprobs(&format!("{stream}_current"));
        let (reference, _) = self.logprobs(&format!("{stream}_reference"));
        let totals = Totals { sequences: 2.0, tokens: logprob.size()[0] as f64 };
        objective.term(&Tokens {
            logprob: &logprob,
            reference: Some(&reference),
            sequence: &sequence,
            num_sequences: 2,
            totals,
        })
    }
}

fn value(term: &Term) -> f64 {
    f64::try_from(&term.loss).unwrap()
}

fn flat(json: &Value) -> Vec<f64> {
    json.as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn losses_are_the_published_ones() {
    let toy = Toy::read();
    let ga = value(&toy.term(&GradientAscent, "forget"));
    let nll = value(&toy.term(&NegativeLogLikelihood, "retain"));
    for (got, published) in [
        (ga, -2.615_702_61),
        (nll, 2.937_279_08),
        (ga + nll, 0.321_576_47),
        (value(&toy.term(&Npo { beta: 0.1 }, "forget")), 14.026_773_36),
        (value(&toy.term(&Npo { beta: 1.0 }, "forget")), 1.710_484_54),
    ] {
        assert!((got - published).abs() < 1e-6, "{got} instead of {published}");
    }
}

#[test]
fn weights_are_the_derivatives() {
    let toy = Toy::read();
    let cases: [(&str, &dyn Objective); 3] =
        [("ga", &GradientAscent), ("npo_beta_0.1", &Npo { beta: 0.1 }), ("npo_beta_1.0", &Npo { beta: 1.0 })];
    for (name, objective) in cases {
        let want = flat(&toy.json["dloss_dlogp"][name]);
        let got = Vec::<f64>::try_from(toy.term(objective, "forget").weight.to_kind(Kind::Double)).unwrap();
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-9), "{name}: {got:?} instead of {want:?}");
    }
}

/// As beta goes to 0 NPO's gradient goes to that of ascent on the summed log-probabilities, 1/sequences for each token.
#[test]
fn npo_tends_to_gradient_ascent() {
    let toy = Toy::read();
    let mut last = f64::INFINITY;
    for beta in [1e-1, 1e-2, 1e-3, 1e-4] {
        let weight = toy.term(&Npo { beta }, "forget").weight;
        let distance = f64::try_from((weight - 0.5).abs().max()).unwrap();
        assert!(distance < last / 9.0, "beta {beta}: {distance}");
        last = distance;
    }
    assert!(last < 1e-4);
    // at the reference itself the loss is (2/beta) log 2 and every weight 1/sequences
    let (logprob, sequence) = toy.logprobs("forget_reference");
    let totals = Totals { sequences: 2.0, tokens: 6.0 };
    let at = Tokens { logprob: &logprob, reference: Some(&logprob), sequence: &sequence, num_sequences: 2, totals };
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
        let at =
            Tokens { logprob: &logprob, reference: Some(&reference), sequence: &sequence, num_sequences: 1, totals };
        let term = Npo { beta: 1.0 }.term(&at);
        assert!((value(&term) - 2.0 * f64::max(shift, 0.0)).abs() < 1e-6);
    }
}
