//! The head's two passes over rows of logits: statistics of a row, and the gradient `weight * (softmax - one-hot)`.

use tch::{Kind, Tensor};

use super::cuda;
use super::real::{LANES, Real, exp, on_cpu, sum, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

/// Numbers per row of [`statistics`]: maximum, sum of exp(logit - maximum), target's logit, index of the maximum.
pub const STATISTICS: i64 = 4;

/// Per row of this rank's part of the vocabulary: `[rows, 4]` f32, see [`STATISTICS`].
///
/// `logits: [rows, width]`; `target: [rows]` i64, index into this part, or negative when the target is elsewhere (its logit
/// is then 0). The index of the maximum is the first one's.
pub fn statistics(logits: &Tensor, target: &Tensor) -> Tensor {
    if let Some(on) = cuda::launcher(logits) {
        return cuda::softmax::statistics(on, logits, target);
    }
    let (rows, width) = (logits.size()[0] as usize, logits.size()[1] as usize);
    let fused = on_cpu!(logits, T => {
        let mut out = Tensor::empty([rows as i64, STATISTICS], (Kind::Float, logits.device()));
        let (input, target) = (slice::<T>(logits), slice::<i64>(target));
        parallel::for_chunks(slice_mut::<f32>(&mut out), STATISTICS as usize, 1, |row, out| {
            let logits = &input[row * width..][..width];
            let maximum = maximum_row(logits);
            out[0] = maximum;
            out[1] = exp_sum_row(logits, maximum);
            out[2] = usize::try_from(target[row]).map_or(0.0, |at| logits[at].get());
            out[3] = logits.iter().position(|x| x.get() == maximum).unwrap_or(0) as f32;
        });
        out
    });
    fused.unwrap_or_else(|| {
        let wide = logits.to_kind(Kind::Float);
        let (maximum, index) = wide.max_dim(1, true);
        let total = (&wide - &maximum).exp().sum_dim_intlist(1i64, true, Kind::Float);
        let here = target.ge(0).unsqueeze(1);
        let picked = wide.gather(1, &target.clamp_min(0).unsqueeze(1), false) * here;
        Tensor::cat(&[maximum, total, picked, index.to_kind(Kind::Float)], 1)
    })
}

/// Sums over this part of `exp(z) * z` and `exp(z) * z^2` of each row, `[rows, 2]` f32, with `z = logit - maximum` and the row's
/// maximum as [`statistics`] has it. With its sum of exponentials they give mean and variance of the log-probabilities.
pub fn moments(logits: &Tensor, statistics: &Tensor) -> Tensor {
    let (rows, width) = (logits.size()[0] as usize, logits.size()[1] as usize);
    let maxima = statistics.select(1, 0).contiguous();
    let fused = on_cpu!(logits, T => {
        let mut out = Tensor::empty([rows as i64, 2], (Kind::Float, logits.device()));
        let (input, maxima) = (slice::<T>(logits), slice::<f32>(&maxima));
        parallel::for_chunks(slice_mut::<f32>(&mut out), 2, 1, |row, out| {
            let logits = &input[row * width..][..width];
            out[0] = first_moment_row(logits, maxima[row]);
            out[1] = second_moment_row(logits, maxima[row]);
        });
        out
    });
    fused.unwrap_or_else(|| {
        let z = logits.to_kind(Kind::Float) - maxima.unsqueeze(1);
        let first = z.exp() * &z;
        let sum = |t: &Tensor| t.sum_dim_intlist(1i64, false, Kind::Float);
        Tensor::stack(&[sum(&first), sum(&(&first * &z))], 1)
    })
}

/// Replaces each row of logits by `weight * (exp(logit - log_sum) - [column = target])`.
///
/// `log_sum, weight: [rows]` f32 over the whole vocabulary; `target` as in [`statistics`]. No other rank is needed.
pub fn gradient(logits: &mut Tensor, log_sum: &Tensor, weight: &Tensor, target: &Tensor) {
    if let Some(on) = cuda::launcher(logits) {
        return cuda::softmax::gradient(on, logits, log_sum, weight, target);
    }
    let width = logits.size()[1] as usize;
    let fused = on_cpu!(logits, T => {
        let (log_sum, weight, target) = (slice::<f32>(log_sum), slice::<f32>(weight), slice::<i64>(target));
        parallel::for_chunks(slice_mut::<T>(logits), width, 1, |row, logits| {
            let before = usize::try_from(target[row]).ok().map(|at| (at, logits[at].get()));
            gradient_row(logits, log_sum[row], weight[row]);
            // the target's entry again, with the 1 taken off before rounding
            if let Some((at, logit)) = before {
                logits[at] = T::put(weight[row] * (exp(logit - log_sum[row]) - 1.0));
            }
        });
    });
    if fused.is_none() {
        let wide = logits.to_kind(Kind::Float);
        let mut p = (wide - log_sum.unsqueeze(1)).exp();
        let here = target.ge(0).unsqueeze(1).to_kind(Kind::Float);
        let _ = p.scatter_add_(1, &target.clamp_min(0).unsqueeze(1), &-here);
        logits.copy_(&(p * weight.unsqueeze(1)));
    }
}

/// `sum over this part of p_ref * (reference - logits)` of each row, `[rows]` f32, with `p_ref = exp(reference - ref_log_sum)`.
///
/// Summed over the ranks and with `log_sum - ref_log_sum` added this is KL(reference || model) of the row.
pub fn cross_difference(logits: &Tensor, reference: &Tensor, ref_log_sum: &Tensor) -> Tensor {
    if let Some(on) = cuda::launcher(logits) {
        return cuda::softmax::cross_difference(on, logits, reference, ref_log_sum);
    }
    let (rows, width) = (logits.size()[0] as usize, logits.size()[1] as usize);
    let fused = on_cpu!(logits, T => {
        let mut out = Tensor::empty([rows as i64], (Kind::Float, logits.device()));
        let (a, b, log_sum) = (slice::<T>(logits), slice::<T>(reference), slice::<f32>(ref_log_sum));
        parallel::for_chunks(slice_mut::<f32>(&mut out), 1, 1, |row, out| {
            out[0] = cross_row(&a[row * width..][..width], &b[row * width..][..width], log_sum[row]);
        });
        out
    });
    fused.unwrap_or_else(|| {
        let (a, b) = (logits.to_kind(Kind::Float), reference.to_kind(Kind::Float));
        ((&b - ref_log_sum.unsqueeze(1)).exp() * (&b - a)).sum_dim_intlist(1i64, false, Kind::Float)
    })
}

/// Replaces each row of logits by `weight * (exp(logit - log_sum) - exp(reference - ref_log_sum))`, the gradient of
/// KL(reference || model).
pub fn divergence_gradient(
    logits: &mut Tensor,
    log_sum: &Tensor,
    reference: &Tensor,
    ref_log_sum: &Tensor,
    weight: &Tensor,
) {
    if let Some(on) = cuda::launcher(logits) {
        return cuda::softmax::divergence_gradient(on, logits, log_sum, reference, ref_log_sum, weight);
    }
    let width = logits.size()[1] as usize;
    let fused = on_cpu!(logits, T => {
        let (b, ref_log_sum) = (slice::<T>(reference), slice::<f32>(ref_log_sum));
        let (log_sum, weight) = (slice::<f32>(log_sum), slice::<f32>(weight));
        parallel::for_chunks(slice_mut::<T>(logits), width, 1, |row, logits| {
            divergence_row(logits, &b[row * width..][..width], log_sum[row], ref_log_sum[row], weight[row]);
        });
    });
    if fused.is_none() {
        let p = (logits.to_kind(Kind::Float) - log_sum.unsqueeze(1)).exp();
        let q = (reference.to_kind(Kind::Float) - ref_log_sum.unsqueeze(1)).exp();
        logits.copy_(&((p - q) * weight.unsqueeze(1)));
    }
}

vectorised! {
    fn maximum_row<T: Real>(row: &[T]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = row.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                // a NaN may be lost here again; the sum of exponentials carries it to the guards
                let x = x.get();
                *lane = if *lane >= x { *lane } else { x };
            }
        }
        let rest = chunks.remainder().iter().map(|x| x.get());
        lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, |a, x| if a >= x { a } else { x })
    }

    fn exp_sum_row<T: Real>(row: &[T], maximum: f32) -> f32 {
        sum(row.len(), |i| exp(row[i].get() - maximum))
    }

    fn first_moment_row<T: Real>(row: &[T], maximum: f32) -> f32 {
        sum(row.len(), |i| {
            let z = row[i].get() - maximum;
            exp(z) * z
        })
    }

    fn second_moment_row<T: Real>(row: &[T], maximum: f32) -> f32 {
        sum(row.len(), |i| {
            let z = row[i].get() - maximum;
            exp(z) * z * z
        })
    }

    fn gradient_row<T: Real>(row: &mut [T], log_sum: f32, weight: f32) {
        for x in row {
            *x = T::put(weight * exp(x.get() - log_sum));
        }
    }

    fn cross_row<T: Real>(row: &[T], reference: &[T], ref_log_sum: f32) -> f32 {
        let reference = &reference[..row.len()];
        sum(row.len(), |i| {
            let b = reference[i].get();
            exp(b - ref_log_sum) * (b - row[i].get())
        })
    }

    fn divergence_row<T: Real>(row: &mut [T], reference: &[T], log_sum: f32, ref_log_sum: f32, weight: f32) {
        for (x, b) in row.iter_mut().zip(reference) {
            *x = T::put(weight * (exp(x.get() - log_sum) - exp(b.get() - ref_log_sum)));
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn error(got: &Tensor, want: &Tensor) -> f64 {
        let want = want.to_kind(Kind::Double);
        let scale = f64::try_from(want.abs().max()).unwrap();
        f64::try_from((got.to_kind(Kind::Double) - want).abs().max()).unwrap() / scale
    }

    fn log_sum(statistics: &Tensor) -> Tensor {
        statistics.select(1, 0) + statistics.select(1, 1).log()
    }

    #[test]
    fn statistics_and_gradient_match_autograd() {
        tch::manual_seed(4);
        for (kind, tolerance) in [(Kind::Float, 3e-6), (Kind::BFloat16, 1e-2), (Kind::Double, 3e-6)] {
            let z = (Tensor::randn([6, 101], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let target = Tensor::from_slice(&[0i64, 100, 7, 50, 16, 15]);
            let weight = Tensor::from_slice(&[1.0f32, -0.5, 2.0, 0.0, 0.25, -3.0]);
            let stats = statistics(&z, &target);

            let wide = z.to_kind(Kind::Double).set_requires_grad(true);
            let nll = -wide.log_softmax(1, Kind::Double).gather(1, &target.unsqueeze(1), false).squeeze_dim(1);
            assert!(error(&(log_sum(&stats) - stats.select(1, 2)), &nll.detach()) < 1e-5);
            assert!(stats.select(1, 3).to_kind(Kind::Int64).equal(&wide.argmax(1, false)));
            let loss = (&nll * weight.to_kind(Kind::Double)).sum(Kind::Double);
            let want = Tensor::run_backward(&[loss], &[&wide], false, false).remove(0);
            let mut dz = z.copy();
            gradient(&mut dz, &log_sum(&stats), &weight, &target);
            assert!(error(&dz, &want) < tolerance, "{kind:?}");
        }
    }

    #[test]
    fn moments_give_mean_and_variance_of_the_log_probabilities() {
        tch::manual_seed(6);
        for (kind, tolerance) in [(Kind::Float, 3e-6), (Kind::BFloat16, 3e-6), (Kind::Double, 3e-6)] {
            let z = (Tensor::randn([4, 85], (Kind::Float, Device::Cpu)) * 3.0).to_kind(kind);
            let stats = statistics(&z, &Tensor::full([4], -1, (Kind::Int64, Device::Cpu)));
            let [first, second] = [0, 1].map(|i| moments(&z, &stats).select(1, i) / stats.select(1, 1));
            let logp = z.to_kind(Kind::Double).log_softmax(1, Kind::Double);
            let mean = |t: &Tensor| (logp.exp() * t).sum_dim_intlist(1i64, false, Kind::Double);
            let want = mean(&logp);
            assert!(error(&(&first - stats.select(1, 1).log()), &want) < tolerance, "{kind:?}");
            let variance = mean(&logp.square()) - want.square();
            assert!(error(&(second - first.square()), &variance) < tolerance, "{kind:?}");
        }
    }

    #[test]
    fn divergence_matches_autograd() {
        tch::manual_seed(5);
        let options = (Kind::Float, Device::Cpu);
        let (z, reference) = (Tensor::randn([5, 77], options) * 3.0, Tensor::randn([5, 77], options) * 3.0);
        let weight = Tensor::from_slice(&[1.0f32, 0.5, 2.0, 0.0, 0.25]);
        let none = Tensor::full([5], -1, (Kind::Int64, Device::Cpu));
        let (a, b) = (log_sum(&statistics(&z, &none)), log_sum(&statistics(&reference, &none)));
        let kl = cross_difference(&z, &reference, &b) + &a - &b;

        let wide = z.to_kind(Kind::Double).set_requires_grad(true);
        let q = reference.to_kind(Kind::Double).log_softmax(1, Kind::Double);
        let want = (q.exp() * (&q - wide.log_softmax(1, Kind::Double))).sum_dim_intlist(1i64, false, Kind::Double);
        assert!(error(&kl, &want.detach()) < 1e-5);
        let loss = (&want * weight.to_kind(Kind::Double)).sum(Kind::Double);
        let want = Tensor::run_backward(&[loss], &[&wide], false, false).remove(0);
        let mut dz = z.copy();
        divergence_gradient(&mut dz, &a, &reference, &b, &weight);
        assert!(error(&dz, &want) < 3e-6);
    }

    #[test]
    fn a_nan_reaches_the_statistics() {
        let mut z = Tensor::zeros([1, 40], (Kind::Float, Device::Cpu));
        let _ = z.get(0).get(3).fill_(f64::NAN);
        let stats = statistics(&z, &Tensor::from_slice(&[0i64]));
        assert!(stats.double_value(&[0, 0]).is_nan() || stats.double_value(&[0, 1]).is_nan());
        let _ = z.zero_();
    }
}
