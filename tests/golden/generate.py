"""Writes the golden numbers that the Rust tests compare with, computed by transformers in float64.

    python -m venv venv && venv/bin/pip install torch==2.11.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    venv/bin/python tests/golden/generate.py --out tests/golden        # about ten seconds, CPU, one thread

Made with the versions above. Running it again gives the same bytes; README.md says what the files hold.
"""

import argparse
import json
import math
import os
import pathlib
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, modeling_rope_utils

from cases import CASES, DELETE
from generation import generation
from membership import membership
from methods import methods
from toy import toy
from weights import hashes, test_weight

TOKENS = 24  # of a logits case
MUST_MOVE = 1e-3  # a wrong reading of config.json must move some logit by more; ten times the Rust tests' tolerance
BETA = 0.1
FORGET = [(13, 5), (22, 9)]  # (tokens, prompt tokens) of a sequence
RETAIN = [(9, 4), (23, 10), (16, 1)]
TOTALS = {"npo_nll": ("npo", "nll", 1.0), "ga_nll": ("ga", "nll", 0.7), "npo_kl": ("npo", "kl", 0.5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logits = {}
    for name, case in CASES.items():
        logits[name] = write_case(out / name, name, case)
        if other := case.get("same_as"):
            assert torch.equal(logits[name], logits[other]), f"{name} differs from {other}"
        if case.get("step"):
            write_step(out / name)
    write_json(out / "adamw.json", optimizers())
    write_json(out / "toy.json", toy())
    write_json(out / "methods.json", methods(build, out / "llama_gqa", token_ids))
    write_json(out / "generation.json", generation(build, as_transformers_writes, write_json, token_ids, out))
    write_json(out / "membership.json", membership(build, token_ids, out))
    write_json(out / "weights.json", weight_samples())


# ---- logits -------------------------------------------------------------------------------------------------------

def write_case(folder, name, case):
    """config.json, and golden.safetensors with `input_ids` i64 [T] and `logits` f32 [T, V] of the seed-0 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    written = case.get("published") or as_transformers_writes(case["family"], case["config"])
    write_json(folder / "config.json", written)
    model = build(folder, seed=0)
    ids = token_ids(TOKENS, model.config.vocab_size, salt=1)
    logits = forward(model, ids)
    moved = []
    for edit in case["wrong"]:
        moved.append((forward(build_edited(written, edit), ids) - logits).abs().max().item())
        assert moved[-1] > MUST_MOVE, f"{name}: {edit} moves no logit by more than {moved[-1]:.1e}"
    stock = [(forward(build(folder, 0, **how), ids) - logits).abs().max().item()
             for how in ({"whole": False}, {"whole": False, "dtype": torch.float32})]
    about = {"seed": 0, "transformers": transformers.__version__, "torch": torch.__version__,
             "max_difference_of_transformers_in_float32": stock[1], "least_move_of_a_wrong_reading": min(moved)}
    write_tensors(folder / "golden.safetensors", {"input_ids": ids, "logits": logits.float()}, {"about": json.dumps(about)})
    print(f"{name:24} max |logit| {logits.abs().max():6.2f}   stock double {stock[0]:.1e}   float32 {stock[1]:.1e}   "
          f"wrong readings move {min(moved):.1e} .. {max(moved):.1e}")
    return logits


def as_transformers_writes(family, arguments):
    """The config.json of `save_pretrained`."""
    config = AutoConfig.for_model(family, **arguments)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads(pathlib.Path(folder, "config.json").read_text())


def build_edited(written, edit):
    edited = json.loads(json.dumps(written))
    for dotted, value in edit.items():
        *path, key = dotted.split(".")
        table = edited
        for part in path:
            table = table[part]
        if value is DELETE:
            del table[key]
        else:
            table[key] = value
    with tempfile.TemporaryDirectory() as folder:
        write_json(pathlib.Path(folder, "config.json"), edited)
        return build(folder, seed=0)


def build(folder, seed, dtype=torch.float64, whole=True):
    """The model that transformers reads from `folder`/config.json, with test weights.

    `model.double()` alone leaves float32 inside: RMSNorm, the attention's softmax and the rotary tables name that type. With
    `whole` these names mean float64 (longrope's exponents i / dim alone stay float32, 1e-7 relative).
    """
    config = AutoConfig.from_pretrained(folder)
    modeling = __import__(f"transformers.models.{config.model_type}.modeling_{config.model_type}", fromlist=["_"])
    for module in (modeling, modeling_rope_utils):
        module.torch = Float32IsFloat64() if whole else torch
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head appears once, as the embedding
            assert parameter.dtype == torch.float32
            parameter.copy_(torch.from_numpy(test_weight(seed, name, tuple(parameter.shape))))
    return model.to(dtype)


class Float32IsFloat64:
    """Stands in for the name `torch` within a module of transformers."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


def forward(model, ids):
    """Logits [T, V] of one sequence without padding."""
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0].double()


def token_ids(count, vocab, salt):
    return torch.tensor([(salt * 29 + 31 * t + 7 * t * t) % vocab for t in range(count)])


# ---- one unlearning step ------------------------------------------------------------------------------------------

def write_step(folder):
    """step.safetensors and step.json: sequences, reference numbers, losses and the gradient of every parameter."""
    model, reference = build(folder, seed=0), build(folder, seed=1)
    vocab = model.config.vocab_size
    forget = [(token_ids(n, vocab, salt=2 + i), prompt) for i, (n, prompt) in enumerate(FORGET)]
    retain = [(token_ids(n, vocab, salt=5 + i), prompt) for i, (n, prompt) in enumerate(RETAIN)]
    with torch.no_grad():
        ref_logp = [scored_logprobs(reference, *sequence) for sequence in forget]
        ref_table = [log_probs(reference, ids) for ids, _ in retain]

    def losses():
        forget_logp = [scored_logprobs(model, *sequence) for sequence in forget]
        retain_logp = [scored_logprobs(model, *sequence) for sequence in retain]
        ratios = torch.stack([now.sum() - then.sum() for now, then in zip(forget_logp, ref_logp)])
        kl = [(then.exp() * (then - log_probs(model, ids))).sum(-1) for then, (ids, _) in zip(ref_table, retain)]
        return {"npo": 2 / BETA * torch.nn.functional.softplus(BETA * ratios).mean(), "ga": torch.cat(forget_logp).mean(),
                "nll": -torch.cat(retain_logp).mean(), "kl": torch.cat(kl).mean()}

    def total(objective, term, weight):
        parts = losses()
        return parts[objective] + weight * parts[term], parts

    tensors = {"forget.prompt_len": torch.tensor([p for _, p in forget]),
               "retain.prompt_len": torch.tensor([p for _, p in retain])}
    with torch.no_grad():
        for i, (ids, prompt) in enumerate(forget):
            tensors |= {f"forget.{i}.input_ids": ids, f"forget.{i}.ref_logp": ref_logp[i],
                        f"forget.{i}.logp": scored_logprobs(model, ids, prompt)}
        for i, (ids, prompt) in enumerate(retain):
            tensors |= {f"retain.{i}.input_ids": ids, f"retain.{i}.logp": scored_logprobs(model, ids, prompt)}
    numbers = {"what": "see tests/golden/README.md", "transformers": transformers.__version__, "seed": 0,
               "reference_seed": 1, "beta": BETA, "totals": {}}
    for name, recipe in TOTALS.items():
        model.zero_grad()
        loss, parts = total(*recipe)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert all(g.dtype == torch.float64 for g in gradients.values())
        check_directional(model, lambda: total(*recipe)[0], gradients)
        tensors |= {f"{name}.{n}": g.float() for n, g in gradients.items()}
        objective, term, weight = recipe
        numbers["totals"][name] = {
            "objective": objective, "retain_term": term, "retain_weight": weight, "loss": loss.item(),
            "forget_loss": parts[objective].item(), "retain_loss": parts[term].item(),
            "grad_norm": math.sqrt(sum(g.square().sum().item() for g in gradients.values()))}
    check_padded_batch(model, retain)
    write_tensors(folder / "step.safetensors", tensors)
    write_json(folder / "step.json", numbers)


def log_probs(model, ids):
    """[T, V]: row t is the distribution of the token after position t."""
    return torch.log_softmax(model(ids[None], use_cache=False).logits[0], -1)


def scored_logprobs(model, ids, prompt):
    """[T - prompt]: log-probabilities of the tokens at positions >= prompt."""
    return log_probs(model, ids)[prompt - 1:-1].gather(1, ids[prompt:, None])[:, 0]


def check_directional(model, loss, gradients, h=1e-5):
    """The loss' slope along a fixed direction is the gradient's; holds to 1e-7 only if nothing is float32."""
    direction = {n: torch.from_numpy(test_weight(7, n, tuple(p.shape))).double() for n, p in model.named_parameters()}
    expected = sum((direction[n] * g).sum().item() for n, g in gradients.items())

    def at(step):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(direction[n], alpha=step)
            value = loss().item()
            for n, p in model.named_parameters():
                p.add_(direction[n], alpha=-step)
        return value

    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert abs(slope - expected) < 1e-7 * max(1.0, abs(expected)), (slope, expected)


def check_padded_batch(model, sequences):
    """Padding on the right changes nothing at real positions."""
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in sequences])
    mask = torch.stack([torch.arange(width) < len(ids) for ids, _ in sequences]).long()
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        for row, (alone, _) in zip(padded, sequences):
            assert (row[:len(alone)] - forward(model, alone)).abs().max() < 1e-10


# ---- optimizers and weights ---------------------------------------------------------------------------------------

def optimizers():
    """Five steps of AdamW, and of SGD with momentum and decoupled weight decay, float64."""
    start = [1.0, -0.5, 0.25, 3.0, -2.0, 0.0, 1e-3]
    size = [1, 1e-2, 10, 1e-8, 0.3, 1, 0]
    grads = [[round(math.sin(1.3 * s + 0.7 * i), 4) * size[i] for i in range(7)] for s in range(5)]
    lr, decay = 1e-3, 0.1
    adamw = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    sgd = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    step_adamw = torch.optim.AdamW([adamw], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, foreach=False)
    step_sgd = torch.optim.SGD([sgd], lr=lr, momentum=0.9, foreach=False)
    after_adamw, after_sgd, norms = [], [], []
    for grad in grads:
        adamw.grad, sgd.grad = (torch.tensor(grad, dtype=torch.float64) for _ in range(2))
        norms.append(adamw.grad.norm().item())
        step_adamw.step()
        after_adamw.append(adamw.tolist())
        with torch.no_grad():
            sgd.mul_(1 - lr * decay)
        step_sgd.step()
        after_sgd.append(sgd.tolist())
    return {
        "what": "torch.optim in float64; element 4 has gradients near eps, element 7 none (weight decay alone)",
        "torch": torch.__version__, "start": start, "gradients": grads, "gradient_norms": norms,
        "adamw": {"lr": lr, "weight_decay": decay, "betas": [0.9, 0.95], "eps": 1e-8, "after": after_adamw},
        "sgd": {"lr": lr, "weight_decay": decay, "momentum": 0.9, "after": after_sgd,
                "rule": "p *= 1 - lr * weight_decay; m = momentum * m + g (m = g in the first step); p -= lr * m"},
    }


def weight_samples():
    """First elements of some tensors, to test another language's version of weights.py."""
    names = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.2.self_attn.k_norm.weight",
             "model.layers.1.self_attn.q_proj.bias", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"]
    return {"what": "weights.py: h(0..4) in hexadecimal and the float32 weights, per seed and tensor", "seeds": {
        str(seed): {name: {"hashes": [f"{h:016x}" for h in hashes(seed, name, 4)],
                           "weights": [float(w) for w in test_weight(seed, name, (4,))]} for name in names}
        for seed in (0, 1, 2**64 - 1)}}


def write_tensors(path, tensors, metadata=None):
    save_file(tensors, path, metadata)  # one metadata key at most: the order of more would differ between runs
    path.chmod(0o644)


def write_json(path, value):
    plain = lambda x: x.tolist() if isinstance(x, (np.ndarray, np.generic)) else str(x)
    path.write_text(json.dumps(value, indent=1, default=plain) + "\n")


if __name__ == "__main__":
    main()
