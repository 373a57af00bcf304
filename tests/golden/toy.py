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
    "idk": {"current": (2.0, 0.4, 0.6, 1.7), "reference": (0.9, 1.2, 0.3, 0.6)},
}
LABELS = {
    "forget": [[IGNORE, IGNORE, 2, 3, 4, 5], [IGNORE, IGNORE, 5, 4, IGNORE, IGNORE]],
    "retain": [[IGNORE, IGNORE, 1, 1, 0, 6], [IGNORE, IGNORE, IGNORE, 2, 3, IGNORE]],
    "idk": [[IGNORE, IGNORE, 6, 0, IGNORE, IGNORE], [IGNORE, IGNORE, 6, 0, 1, IGNORE]],
}
PUBLISHED = {
    "sum_nll_forget_current": [12.55191009, 3.14230559], "sum_nll_forget_reference": [11.84984955, 4.13507621],
    "ce_forget": 2.61570261, "ce_retain": 2.93727908, "ga": -2.61570261, "graddiff_1_1": 0.32157647,
    "npo_beta_0.1": 14.02677336, "npo_beta_1.0": 1.71048454, "kl_retain_all_positions": 1.15850475,
    "dpo_beta_0.1": 15.28827437, "simnpo_4.5_0": 0.00018899, "simnpo_2.5_0": 0.00795429, "simnpo_2.5_0.5": 0.02712691,
    "wga_1": -0.22726502, "wga_5": -0.00090061, "satimp_5_1": -0.00063302, "satimp_5_0.1": -0.00086923, "tnpo_4": -1.55185031,
    "kto_paper": 15.11442214, "kto_code": 28.26624886, "ap_0.1": 8.17190757,
    "flat_tv": 0.02013400, "flat_kl": 0.35413711, "flat_js": 0.02148208, "flat_pearson": 0.04239815,
    "undial_3": 3.33497006, "undial_10": 3.33320067, "ce_u_0": 1.24429130, "ce_u_1": 1.19976728, "me": 0.86075408,
    "ihl": 0.65369303, "pdu_unshifted": 4.65650356,
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
    pairs = {f"{name}_{stream}": value for name, (value, gradients) in pair_losses().items() for stream, value in gradients.items()}
    values |= {name: value for name, (value, _) in pair_losses().items()}
    rows = row_losses()
    values |= {name: value for name, (value, _) in rows.items()}
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
        "dloss_dlogp": gradients | pairs,
        "dloss_dlogits": {name: gradient for name, (_, gradient) in rows.items()},
        "formulas": {
            "ga": "mean over all scored forget tokens of logp",
            "graddiff_1_1": "ga + mean over all scored retain tokens of -logp",
            "npo": "(2/beta) * mean over rows of log(1 + exp(beta * (sum logp - sum logp_ref)))",
            "dloss_dlogp": "NAME_STREAM is the derivative by the log-probabilities of that stream, found by finite differences",
            "dloss_dlogits": "a row a scored token (for pdu_unshifted a row a labelled position), found by finite differences",
            "kl_retain_all_positions": "mean over rows x positions of KL(reference || current), retain logits",
        },
        "published": PUBLISHED,
        "checked_against_published": sorted(PUBLISHED),
        "checked_by_finite_difference": sorted(losses),
    }


# ---- losses on log-probabilities -----------------------------------------------------------------------------------

def pair_losses():
    """{name: (value, {stream: derivative by the log-probabilities, a list a row})}.

    A loss gets a second copy of the log-probabilities for what the method holds constant.
    """
    names = {"forget": "forget", "idk": "idk", "retain": "retain"}
    now = {name: token_logprobs(stream, "current") for name, stream in names.items()}
    then = {name: token_logprobs(stream, "reference") for name, stream in names.items()}
    losses = {
        "dpo_beta_0.1": (lambda x, _: dpo(x["idk"], then["idk"], x["forget"], then["forget"], 0.1), ["forget", "idk"]),
        "simnpo_4.5_0": (lambda x, _: simnpo(x["forget"], 4.5, 0.0), ["forget"]),
        "simnpo_2.5_0": (lambda x, _: simnpo(x["forget"], 2.5, 0.0), ["forget"]),
        "simnpo_2.5_0.5": (lambda x, _: simnpo(x["forget"], 2.5, 0.5), ["forget"]),
        "wga_1": (lambda x, c: weighted(x["forget"], c["forget"], lambda p: p), ["forget"]),
        "wga_5": (lambda x, c: weighted(x["forget"], c["forget"], lambda p: p ** 5), ["forget"]),
        "satimp_5_1": (lambda x, c: weighted(x["forget"], c["forget"], lambda p: p ** 5 * (1 - p)), ["forget"]),
        "satimp_5_0.1": (lambda x, c: weighted(x["forget"], c["forget"], lambda p: p ** 5 * (1 - p) ** 0.1), ["forget"]),
        "tnpo_4": (lambda x, c: tnpo(x["forget"], c["forget"], then["forget"], 4.0), ["forget"]),
        "kto_paper": (lambda x, c: kto(x["forget"], then["forget"], 0.1, 0.1 * mean_ratio(c["idk"], then["idk"])), ["forget"]),
        "kto_code": (lambda x, c: 1 + kto(x["forget"], then["forget"], 0.1, mean_ratio(c["idk"], then["idk"])), ["forget"]),
        "ap_0.1": (lambda x, _: ap(x["retain"], x["idk"], 0.1), ["retain", "idk"]),
    }
    for name, divergence in FLAT.items():
        losses[f"flat_{name}"] = (lambda x, _, d=divergence: d(mean_p(x["forget"], FLAT_POSITIONS), mean_p(x["idk"], FLAT_POSITIONS)), ["forget", "idk"])
        losses[f"flat_{name}_tokens"] = (lambda x, _, d=divergence: d(mean_p(x["forget"]), mean_p(x["idk"])), ["forget", "idk"])
        losses[f"flat_{name}_samples"] = (
            lambda x, _, d=divergence: np.mean([d(np.exp(f).mean(), np.exp(e).mean()) for f, e in zip(x["forget"], x["idk"])]),
            ["forget", "idk"])
    return {name: (loss(now, now), {stream: numeric(lambda y, s=stream: loss(now | {s: y}, now), now[stream]) for stream in streams})
            for name, (loss, streams) in losses.items()}


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def ratios(logp, reference):
    return np.array([row.sum() - ref.sum() for row, ref in zip(logp, reference)])


def mean_ratio(logp, reference):
    return ratios(logp, reference).mean()


def dpo(win, win_ref, lose, lose_ref, beta):
    return -2.0 / beta * log_sigmoid(beta * (ratios(win, win_ref) - ratios(lose, lose_ref))).mean()


def simnpo(logp, beta, delta):
    return -2.0 / beta * np.mean([log_sigmoid(beta * (-row.mean() - delta)) for row in logp])


def weighted(logp, constant, weight):
    return (weight(np.exp(np.concatenate(constant))) * np.concatenate(logp)).mean()


def tnpo(logp, constant, reference, beta):
    p, q = (np.exp(beta * np.concatenate(x)) for x in (constant, reference))
    return (2 * p / (p + q + 1e-5) * np.concatenate(logp)).mean()


def kto(logp, reference, beta, z):
    return -2.0 / beta * log_sigmoid(z - beta * ratios(logp, reference)).mean()


def ap(answer, refusal, beta):
    return -1.0 / beta * np.mean([log_sigmoid(beta * (a.sum() - r.sum())) for a, r in zip(answer, refusal)])


def mean_p(logp, count=None):
    """Mean token probability; the official code divides by the number of positions, ignored ones counted as 0."""
    p = np.exp(np.concatenate(logp))
    return p.sum() / (count or len(p))


FLAT_POSITIONS = ROWS * (POSITIONS - 1)
FLAT = {
    "tv": lambda f, e: np.tanh(f) / 2 - np.tanh(e) / 2,
    "kl": lambda f, e: np.exp(f - 1) - e,
    "js": lambda f, e: np.log1p(np.exp(-e)) + f + np.log1p(np.exp(-f)) - 2 * np.log(2),
    "pearson": lambda f, e: f * f / 4 + f - e,
}


def numeric(loss, logp, h=1e-5):
    gradient = []
    for i, row in enumerate(logp):
        gradient.append([])
        for t in range(len(row)):
            up, down = ([r.copy() for r in logp] for _ in range(2))
            up[i][t] += h
            down[i][t] -= h
            gradient[i].append((loss(up) - loss(down)) / (2 * h))
    return gradient


# ---- losses on whole distributions ----------------------------------------------------------------------------------

def row_losses():
    """{name: (value, derivative by the logits of each row)}: mean over rows of a loss on one row of logits."""
    at = [(i, t - 1, label) for i, row in enumerate(LABELS["forget"]) for t, label in enumerate(row) if label != IGNORE]
    unshifted = [(i, t, None) for i, row in enumerate(LABELS["forget"]) for t, label in enumerate(row) if label != IGNORE]
    firsts = [min(t for i, t, _ in at if i == row) for row in range(ROWS)]
    losses = {
        "undial_3": (lambda z, c, y, r: cross_entropy(z, softmax(r - 3.0 * one_hot(y))), at),
        "undial_10": (lambda z, c, y, r: cross_entropy(z, softmax(r - 10.0 * one_hot(y))), at),
        "ce_u_0": (lambda z, c, y, r: cross_entropy(z, softmax(np.where(one_hot(y) > 0, -np.inf, c))), at),
        "ce_u_1": (lambda z, c, y, r: cross_entropy(z, softmax(np.where(one_hot(y) > 0, -np.inf, c))),
                   [place for place in at if place[1] != firsts[place[0]]]),
        "me": (lambda z, c, y, r: -np.log(VOCAB) - log_softmax(z).mean(), at),
        "ihl": (lambda z, c, y, r: max(0.0, 1 + softmax(z)[y] - np.delete(softmax(z), y).max()), at),
        "pdu_unshifted": (lambda z, c, y, r: (z.max() - z.mean()) ** 2, unshifted),
    }
    now, then = logits("forget", "current"), logits("forget", "reference")
    result = {}
    for name, (loss, places) in losses.items():
        values, gradients = [], []
        for i, t, label in places:
            z, r = now[i, t], then[i, t]
            values.append(loss(z, z, label, r))
            h, each = 1e-5, np.eye(VOCAB)
            slope = [(loss(z + h * e, z, label, r) - loss(z - h * e, z, label, r)) / (2 * h) for e in each]
            gradients.append(np.array(slope) / len(places))
        result[name] = (np.mean(values), gradients)
    return result


def softmax(z):
    return np.exp(log_softmax(z))


def one_hot(label):
    return np.eye(VOCAB)[label]


def cross_entropy(z, target):
    return -(target * log_softmax(z)).sum()


# ---- the first losses, with gradients by hand ------------------------------------------------------------------------

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
