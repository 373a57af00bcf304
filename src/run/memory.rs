//! What a rank's memory is for, and what to change when it is not enough.

use std::sync::{Arc, Mutex, PoisonError};

use tch::Device;

use crate::abi::driver;
use crate::config::{self, Config};
use crate::telemetry::table;
use crate::train::Trainer;

/// Bytes of one rank by purpose, for as long as the run lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub weights: usize,
    pub masters: usize,
    pub gradients: usize,
    pub optimizer: usize,
}

/// What to say when memory runs out; filled in as soon as it is known, read by whoever ends the process.
#[derive(Clone, Default)]
pub struct MemoryWords(Arc<Mutex<String>>);

impl MemoryWords {
    pub fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, words: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = words;
    }
}

impl Memory {
    pub fn of(trainer: &Trainer) -> Self {
        let (weights, masters) = trainer.parameters.bytes();
        Self { weights, masters, gradients: trainer.gradients.bytes(), optimizer: trainer.optimizer.bytes() }
    }

    pub fn print(&self) {
        let row = |name: &str, bytes: usize| vec![name.to_owned(), format!("{:.1}", bytes as f64 / 1048576.0)];
        let rows = [
            row("weights", self.weights),
            row("master weights", self.masters),
            row("gradients", self.gradients),
            row("optimizer", self.optimizer),
        ];
        tracing::debug!("memory of this rank, without activations:\n{}", table(&["part", "MiB"], &rows));
    }

    /// Prepares what is said when the device has no more.
    pub fn prepare(&self, words: &MemoryWords, config: &Config, device: Device) {
        if let Device::Cuda(index) = device {
            let size = driver::memory_info(index).map_or(0, |(_, total)| total);
            words.set(self.words(config, size));
        }
    }

    /// `size`: of the device, in bytes.
    fn words(&self, config: &Config, size: u64) -> String {
        let Self { weights, masters, gradients, optimizer } = *self;
        let kept = weights + masters + gradients + optimizer;
        let rest = (size as usize).saturating_sub(kept);
        format!(
            "the device's {} hold weights {}, master weights {}, gradients {}, optimizer {}; the {} that are left were not enough for \
             activations and logits. {}",
            gib(size as usize),
            gib(weights),
            gib(masters),
            gib(gradients),
            gib(optimizer),
            gib(rest),
            self.advice(config).join("; ")
        )
    }

    /// Three settings: one for the activations, whose size depends on the samples, and the two that save most of the rest.
    fn advice(&self, config: &Config) -> Vec<String> {
        let (optimizer, train) = (&config.optimizer, &config.train);
        let state = match optimizer.state_dtype.filter(|_| optimizer.name == config::OptimizerName::Adamw) {
            Some(config::StateDtype::F32) => 8,
            Some(config::StateDtype::Bf16) => 4,
            _ => 0,
        };
        // blocks of 256 codes with one f32: 2 + 2/64 bytes a parameter for both moments
        let int8 = if state > 0 { self.optimizer - self.optimizer * 65 / (32 * state) } else { 0 };
        let half = |bytes: usize| bytes / 2;
        let held = if optimizer.in_backward { 0 } else { self.gradients };
        let mut savings = [
            (int8, "optimizer.state_dtype = \"int8\"".to_owned()),
            (held, "optimizer.in_backward = true".to_owned()),
            (
                if train.grad_dtype == config::Float::F32 { half(held) } else { 0 },
                "train.grad_dtype = \"bf16\"".to_owned(),
            ),
            (
                half(self.weights + self.masters + self.gradients + self.optimizer),
                format!("parallel.tp = {} on twice the ranks", 2 * config.parallel.tp),
            ),
        ];
        savings.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let activations = match train.recompute {
            config::Recompute::None => {
                "train.recompute = \"half_block\" keeps a small part of the activations".to_owned()
            }
            config::Recompute::HalfBlock => {
                format!("train.micro_batch_tokens = {} halves the activations", train.micro_batch_tokens / 2)
            }
        };
        let best = savings.into_iter().filter(|(bytes, _)| *bytes > 0).take(2);
        std::iter::once(activations).chain(best.map(|(bytes, what)| format!("{what} saves {}", gib(bytes)))).collect()
    }
}

fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / 1073741824.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_out_and_what_helps() {
        let text = "[run]\ndir = 'x'\n[model]\npath = 'm'\n[data]\nforget = { path = 'f.jsonl', kind = 'qa' }\n[method]\n\
                    objective = 'ga'\n[train]\nsteps = 1\n[optimizer]\nlr = 1e-5\n";
        let config = config::from_str(text, "a.toml", &[]).unwrap();
        let n = 8 << 30;
        let memory = Memory { weights: 2 * n, masters: 4 * n, gradients: 4 * n, optimizer: 8 * n };
        let words = memory.words(&config, 140 << 30);
        assert!(
            words.starts_with("the device's 140.00 GiB hold weights 16.00 GiB, master weights 32.00 GiB"),
            "{words}"
        );
        assert!(words.contains("train.recompute = \"half_block\""), "{words}");
        assert!(words.contains("parallel.tp = 2 on twice the ranks saves 72.00 GiB"), "{words}");
        assert!(words.contains("optimizer.state_dtype = \"int8\" saves 47.75 GiB"), "{words}");
        let small = config::from_str(
            text,
            "a.toml",
            &[
                "optimizer.state_dtype=int8".into(),
                "optimizer.in_backward=true".into(),
                "train.recompute=half_block".into(),
            ],
        );
        let advice = Memory { gradients: 0, ..memory }.advice(&small.unwrap());
        assert_eq!(advice[0], "train.micro_batch_tokens = 4096 halves the activations");
        assert_eq!(advice.len(), 2, "{advice:?}");
    }
}
