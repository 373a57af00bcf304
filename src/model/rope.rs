//! Rotary frequencies and the tables of angles for a batch.

use tch::{Device, Kind, Tensor};

use crate::abi::upload::upload;

/// Rotary embedding of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// Features of a head that are turned, from the first on; even.
    pub dim: i64,
    pub scaling: Scaling,
}

/// How the published frequencies were stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a smooth passage between (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// Each frequency divided by its own factor, cos and sin multiplied by `attention_factor` (Phi-3, sequences within the
    /// original length: the `short_factor` list).
    Long {
        short_factor: Vec<f64>,
        attention_factor: f64,
    },
}

impl Rope {
    /// Angle per position of each pair of features, `dim / 2` of them.
    pub fn frequencies(&self) -> Vec<f64> {
        let half = self.dim / 2;
        let plain = |i: i64| self.theta.powf(-2.0 * i as f64 / self.dim as f64);
        (0..half)
            .map(|i| match &self.scaling {
                Scaling::None => plain(i),
                Scaling::Linear { factor } => plain(i) / factor,
                Scaling::Long { short_factor, .. } => plain(i) / short_factor[i as usize],
                Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                    let frequency = plain(i);
                    let turns = original_max_positions * frequency / (2.0 * std::f64::consts::PI);
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let smooth = smooth.clamp(0.0, 1.0);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            })
            .collect()
    }

    /// Cosine and sine for each position: two tensors `[positions, dim / 2]` f32.
    pub fn tables(&self, positions: &[i64], device: Device) -> (Tensor, Tensor) {
        let angles = upload(positions, device).to_kind(Kind::Double).unsqueeze(1)
            * upload(&self.frequencies(), device).unsqueeze(0);
        let amplitude = match &self.scaling {
            Scaling::Long { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        };
        let table = |t: Tensor| (t * amplitude).to_kind(Kind::Float);
        (table(angles.cos()), table(angles.sin()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let plain = Rope { theta: 5e5, dim: 128, scaling: Scaling::None };
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192.0,
        };
        let (a, b) = (plain.frequencies(), Rope { scaling, ..plain.clone() }.frequencies());
        assert_eq!(a[0], b[0]);
        assert!((a[63] / b[63] - 8.0).abs() < 1e-12);
        assert!(a.iter().zip(&b).all(|(a, b)| (1.0..=8.0 + 1e-12).contains(&(a / b))));
    }
}
