"""Losses on a batch that fits on a page, in numpy alone: independent of torch, of transformers and of the Rust program.

logits[row, position, token] = 2 sin(a + b row + c position + d token), 2 rows x 6 positions x 7 tokens, float64.
PUBLISHED holds what the methods' official code (locuslab/open-unlearning, licong-lin/negative-preference-optimization) gave
on this batch, to eight decimals; `toy()` must agree with it.
"""

import numpy as np

ROWS, POSITIONS, VOCAB, IGNORE = 2, 6, 7, -100
COEFFICIENTS = {
    "forget": {"current": (1.0, 0.7, 0.9, 1.3), "reference": (0.2, 0.9, 0.5, 1.1)},
    "retain": {"current": (0.3, 0.5, 1.1, 0.8), "reference": (1.3, 0.2, 0.7, 1.9)},
}
LABELS = {
    "forget": [[IGNORE, IGNORE, 2, 3, 4, 5], [IGNORE, IGNORE, 5, 4, IGNORE, IGNORE]],
    "retain": [[IGNORE, IGNORE, 1, 1, 0, 6], [IGNORE, IGNORE, IGNORE, 2, 3, IGNORE]],
}
PUBLISHED = {
    "sum_nll_forget_current": [12.55191009, 3.14230559], "sum_nll_forget_reference": [11.84984955, 4.13507621],
    "ce_forget": 2.61570261, "ce_retain": 2.93727908, "ga": -2.61570261, "graddiff_1_1": 0.32157647,
    "npo_beta_0.1": 14.02677336, "npo_beta_1.0": 1.71048454, "kl_retain_all_positions": 1.15850475,
}


def toy() -> dict:
    """Everything toy.json says; raises if a value is not the published one or a gradient not its finite difference."""
    logp = {(s, w): token_logprobs(s, w) for s in COEFFICIENTS for w in COEFFICIENTS[s]}
    current, reference = logp["forget", "current"], logp["forget", "reference"]
    values = {
        "sum_nll_forget_current": [-row.sum() for row in current],
        "sum_nll_forget_reference": [-row.sum() for row in reference],
        "ce_forget": -np.concatenate(current).mean(),
        "ce_retain": -np.concatenate(logp["retain", "current"]).mean(),
        "ga": ga(current),
        "graddiff_1_1": ga(current) - np.concatenate(logp["retain", "current"]).mean(),
        "npo_beta_0.1": npo(current, reference, 0.1),
        "npo_beta_1.0": npo(current, reference, 1.0),
        "kl_retain_all_positions": kl_all_positions(),
    }
    for name, published in PUBLISHED.items():
        assert np.abs(np.subtract(values[name], published)).max() < 6e-9, (name, values[name], published)
    losses = {"ga": ga, "npo_beta_0.1": lambda x: npo(x, reference, 0.1), "npo_beta_1.0": lambda x: npo(x, reference, 1.0)}
    gradients = {"ga": ga_gradient(current), "npo_beta_0.1": npo_gradient(current, reference, 0.1),
                 "npo_beta_1.0": npo_gradient(current, reference, 1.0)}
    for name, loss in losses.items():
        check_gradient(loss, current, gradients[name])
    return {
        "what": __doc__,
        "shape": {"rows": ROWS, "positions": POSITIONS, "vocab": VOCAB, "ignored_label": IGNORE},
        "logits": "2 * sin(a + b*row + c*position + d*token)",
        "coefficients_abcd": COEFFICIENTS,
        "labels": LABELS,
        "shift": "the label at position t is predicted from the logits at position t - 1",
        "logp": {f"{s}_{w}": rows for (s, w), rows in logp.items()},
        "values": values,
        "dloss_dlogp": gradients,
        "formulas": {
            "ga": "mean over all scored forget tokens of logp",
            "graddiff_1_1": "ga + mean over all scored retain tokens of -logp",
            "npo": "(2/beta) * mean over rows of log(1 + exp(beta * (sum logp - sum logp_ref)))",
            "kl_retain_all_positions": "mean over rows x positions of KL(reference || current), retain logits",
        },
        "published": PUBLISHED,
        "checked_against_published": sorted(PUBLISHED),
        "checked_by_finite_difference": sorted(losses),
    }


def ga(logp):
    return np.concatenate(logp).mean()


def ga_gradient(logp):
    total = sum(len(row) for row in logp)
    return [np.full(len(row), 1.0 / total) for row in logp]


def npo(logp, reference, beta):
    ratios = np.array([row.sum() - ref.sum() for row, ref in zip(logp, reference)])
    return 2.0 / beta * np.mean(np.logaddexp(0.0, beta * ratios))


def npo_gradient(logp, reference, beta):
    """(2 / rows) sigmoid(beta * log-ratio), the same for every token of a row."""
    return [np.full(len(row), 2.0 / len(logp) / (1.0 + np.exp(-beta * (row.sum() - ref.sum()))))
            for row, ref in zip(logp, reference)]


def kl_all_positions():
    p, q = (log_softmax(logits("retain", which)) for which in ("reference", "current"))
    return (np.exp(p) * (p - q)).sum(-1).mean()


def token_logprobs(stream, which):
    """Per row, the log-probabilities of the labelled tokens in order."""
    table = log_softmax(logits(stream, which))
    return [np.array([table[i, t - 1, label] for t, label in enumerate(row) if t > 0 and label != IGNORE])
            for i, row in enumerate(LABELS[stream])]


def logits(stream, which):
    a, b, c, d = COEFFICIENTS[stream][which]
    i, t, v = np.ogrid[:ROWS, :POSITIONS, :VOCAB]
    return 2.0 * np.sin(a + b * i + c * t + d * v)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def check_gradient(loss, logp, gradient, h=1e-5):
    for i, row in enumerate(logp):
        for t in range(len(row)):
            up, down = ([r.copy() for r in logp] for _ in range(2))
            up[i][t] += h
            down[i][t] -= h
            assert abs((loss(up) - loss(down)) / (2 * h) - gradient[i][t]) < 1e-9
