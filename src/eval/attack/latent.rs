//! What an attacker of the hidden states reaches: each forget sample under the perturbation within a ball that makes its answer
//! likeliest (LAU's inner attack, arXiv 2408.10682).

use tch::{Device, Kind, Tensor};

use crate::abi::slices::slice;
use crate::data::{Item, MicroBatch, RowsOf, Sample, Stream, pack, share};
use crate::eval::{Asked, Better, Evaluation, Item as Result, Metric};
use crate::train::Adversary;

/// Log-probabilities of each sample's scored tokens under attack, in the samples' order. All ranks call it and get all of them.
///
/// `progress` is called with the number of samples that this rank has done.
pub fn latent(
    model: Asked,
    samples: &[Sample],
    adversary: Adversary,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Vec<Vec<f32>> {
    let item = |(sample, one): (usize, &Sample)| Item { stream: Stream::Forget, sample, len: one.tokens.len() };
    let items: Vec<Item> = samples.iter().enumerate().map(item).collect();
    let mesh = model.world.mesh;
    let mine = share(&items, mesh.dp).swap_remove(mesh.dp_rank());
    let mut lines = String::new();
    for items in pack(&mine, model.forward.budget) {
        let micro_batch = MicroBatch::new(&items, |item: Item| &samples[item.sample], |_| RowsOf::Scored);
        let Asked { decoder, weights, forward, .. } = model;
        let scores = adversary.scores(decoder, weights, &micro_batch, forward.logits_bytes, seed, "latent attack");
        let logprob: Tensor = scores.logprob.to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
        for sequence in &micro_batch.sequences {
            let bits = slice::<f32>(&logprob)[sequence.rows.clone()].iter().map(|x| x.to_bits().to_string());
            lines += &format!("{} {}\n", sequence.sample, bits.collect::<Vec<_>>().join(" "));
        }
        progress(items.len());
    }
    let mut all = vec![Vec::new(); samples.len()];
    for part in model.world.dp.gather_bytes(lines.as_bytes()) {
        for line in String::from_utf8_lossy(&part).lines() {
            let mut numbers = line.split(' ').map(|word| word.parse::<u64>().expect("invariant: a rank wrote numbers"));
            let sample = numbers.next().expect("invariant: a line begins with its sample") as usize;
            all[sample] = numbers.map(|bits| f32::from_bits(bits as u32)).collect();
        }
    }
    all
}

/// Adds the set `latent` to the results: an item a sample, and the means.
pub fn put_latent(out: &mut Evaluation, scores: &[Vec<f32>]) {
    let mean = |logprobs: &Vec<f32>| logprobs.iter().map(|&x| f64::from(x)).sum::<f64>() / logprobs.len() as f64;
    let of_forget = out.items.get("forget").cloned().unwrap_or_default();
    let words =
        |index: usize| of_forget.get(index).map(|item| (item.prompt.clone(), item.answer.clone())).unwrap_or_default();
    let item = |(index, logprobs): (usize, &Vec<f32>)| {
        let (prompt, answer) = words(index);
        let mean = mean(logprobs);
        let numbers = [("loss".to_owned(), -mean), ("probability".to_owned(), mean.exp())];
        Result { index, prompt, answer, numbers: numbers.into(), ..Result::default() }
    };
    let items: Vec<Result> = scores.iter().enumerate().map(item).collect();
    let n = items.len();
    let average = |name: &str| items.iter().map(|item| item.numbers[name]).sum::<f64>() / n as f64;
    let metrics =
        [("probability", Better::Lower), ("loss", Better::Higher)].map(|(name, better)| (name, average(name), better));
    out.items.insert("latent".to_owned(), items);
    for (name, value, better) in metrics {
        out.put(&format!("latent.{name}"), Some("latent"), Metric::new(value, n, better));
    }
}
