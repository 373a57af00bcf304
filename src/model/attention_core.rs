//! Softmax attention inside each sequence: causal, with an optional sliding window and grouped key/value heads.

use tch::{Kind, Tensor};

/// What backward needs besides q, k, v and the output: the log-sum-exp of each query's scores, one tensor a sequence.
pub struct Normalisers(Vec<Tensor>);

/// Attention of one batch.
///
/// `q: [tokens, heads, head_dim]`, `k, v: [tokens, kv_heads, head_dim]` (views are fine, the last dimension dense);
/// `window`: keys that a query sees, itself included. Gives `[tokens, heads * head_dim]`.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &[(i64, i64)],
    window: Option<i64>,
) -> (Tensor, Normalisers) {
    let (tokens, heads, head_dim) = q.size3().expect("invariant: q has three dimensions");
    let out = Tensor::empty([tokens, heads, head_dim], (q.kind(), q.device()));
    let normalisers = sequences
        .iter()
        .map(|&(start, len)| {
            let part = |t: &Tensor| t.narrow(0, start, len).transpose(0, 1).unsqueeze(0);
            let mask = window_mask(len, window, q);
            let (result, log_sum) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &part(q),
                &part(k),
                &part(v),
                0.0,
                mask.is_none(),
                mask.as_ref(),
                None,
            );
            out.narrow(0, start, len).copy_(&result.squeeze_dim(0).transpose(0, 1));
            log_sum
        })
        .collect();
    (out.view([tokens, heads * head_dim]), Normalisers(normalisers))
}

/// Gradients of q, k and v, written into `dq, dk, dv` (views of the shapes of q, k, v).
///
/// `grad, out: [tokens, heads * head_dim]`.
#[expect(clippy::too_many_arguments, reason = "the operands of one formula")]
pub fn backward(
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    normalisers: &Normalisers,
    sequences: &[(i64, i64)],
    window: Option<i64>,
    (dq, dk, dv): (&Tensor, &Tensor, &Tensor),
) {
    let (tokens, heads, head_dim) = q.size3().expect("invariant: q has three dimensions");
    let shape = [tokens, heads, head_dim];
    let (grad, out) = (grad.view(shape), out.view(shape));
    for (&(start, len), log_sum) in sequences.iter().zip(&normalisers.0) {
        let part = |t: &Tensor| t.narrow(0, start, len).transpose(0, 1).unsqueeze(0);
        let mask = window_mask(len, window, q);
        let grads = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            &part(&grad),
            &part(q),
            &part(k),
            &part(v),
            &part(&out),
            log_sum,
            0.0,
            mask.is_none(),
            mask.as_ref(),
            None,
        );
        for (target, value) in [(dq, grads.0), (dk, grads.1), (dv, grads.2)] {
            target.narrow(0, start, len).copy_(&value.squeeze_dim(0).transpose(0, 1));
        }
    }
}

/// `[len, len]` with 0 where a query sees a key and -inf elsewhere; None where plain causal attention says the same.
fn window_mask(len: i64, window: Option<i64>, like: &Tensor) -> Option<Tensor> {
    let window = window.filter(|&window| window < len)?;
    let seen = Tensor::ones([len, len], (Kind::Bool, like.device())).tril(0).triu(1 - window);
    let hidden = seen.logical_not();
    Some(Tensor::zeros([len, len], (like.kind(), like.device())).masked_fill(&hidden, f64::NEG_INFINITY))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Scores and softmax spelled out in f64, one query at a time.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, sequences: &[(i64, i64)], window: Option<i64>) -> Tensor {
        let (tokens, heads, head_dim) = q.size3().unwrap();
        let group = heads / k.size()[1];
        let mut rows = Vec::new();
        for &(start, len) in sequences {
            for i in 0..len {
                let first = window.map_or(0, |w| (i + 1 - w).max(0));
                let heads: Vec<Tensor> = (0..heads)
                    .map(|head| {
                        let keys = k.select(1, head / group).narrow(0, start + first, i + 1 - first);
                        let values = v.select(1, head / group).narrow(0, start + first, i + 1 - first);
                        let scores = keys.mv(&q.select(1, head).get(start + i)) / (head_dim as f64).sqrt();
                        scores.softmax(0, Kind::Double).unsqueeze(0).matmul(&values)
                    })
                    .collect();
                rows.push(Tensor::cat(&heads, 1));
            }
        }
        Tensor::cat(&rows, 0).view([tokens, heads * head_dim])
    }

    #[test]
    fn values_and_gradients_match_plain_attention() {
        tch::manual_seed(6);
        let sequences = [(0, 7), (7, 1), (8, 20), (28, 3)];
        for (kv_heads, window) in [(4, None), (2, None), (2, Some(5)), (1, Some(1)), (2, Some(20))] {
            let options = (Kind::Double, Device::Cpu);
            let make = |heads| Tensor::randn([31, heads, 6], options).set_requires_grad(true);
            let (q, k, v) = (make(4), make(kv_heads), make(kv_heads));
            let grad = Tensor::randn([31, 24], options);
            let want = plain(&q, &k, &v, &sequences, window);
            let wants = Tensor::run_backward(&[(&want * &grad).sum(Kind::Double)], &[&q, &k, &v], false, false);

            tch::no_grad(|| {
                let (out, log_sum) = forward(&q, &k, &v, &sequences, window);
                let (dq, dk, dv) = (q.zeros_like(), k.zeros_like(), v.zeros_like());
                backward(&grad, &q, &k, &v, &out, &log_sum, &sequences, window, (&dq, &dk, &dv));
                for (got, want) in [(&out, &want), (&dq, &wants[0]), (&dk, &wants[1]), (&dv, &wants[2])] {
                    let error = f64::try_from((got - want).abs().max()).unwrap();
                    assert!(error < 1e-12, "{kv_heads} {window:?}: {error:e}");
                }
            });
        }
    }
}
