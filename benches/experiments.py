#!/usr/bin/env python3
"""Experiments whose tables are in the documentation; every number comes from runs of dunlearn.

    python3 benches/experiments.py tasks     docs/weights.md: UNLEARN and task vectors on two groups of authors and sums
    python3 benches/experiments.py learn     docs/weights.md: LEARN and LoRA on the same data
    python3 benches/experiments.py grin      docs/scopes.md: GRIN's score x noise x loss
    python3 benches/experiments.py ... --dunlearn target/debug/dunlearn --runs runs/experiments

Needs nothing but Python. What has a summary.json is not run again; remove the folder of runs to start anew.
"""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MODEL = """
[run]
dir = "{dir}"
[model]
path = "{data}/model"
init = "random"
[data]
train = {{ path = "{train}", kind = "qa" }}
forget = {{ path = "{data}/forget.jsonl", kind = "qa" }}
retain = {{ path = "{data}/retain.jsonl", kind = "qa" }}
[method]
objective = "finetune"
[train]
epochs = {epochs}
global_batch = {batch}
micro_batch_tokens = 4096
precision = "f32"
[optimizer]
lr = 3e-3
[schedule]
name = "cosine"
warmup = 0.05
[eval]
before = false
"""

TASK = """
[run]
dir = "{dir}"
[model]
path = "{model}"
[data]
{target} = {{ path = "{task}", kind = "qa" }}
retain = {{ path = "{data}/sums.jsonl", kind = "qa" }}
[method]
objective = "{objective}"
[train]
epochs = {epochs}
global_batch = 16
micro_batch_tokens = 4096
precision = "f32"
[optimizer]
{optimizer}
[schedule]
name = "constant"
[eval]
before = false
{more}
"""

GRIN = """
[run]
dir = "{dir}"
[model]
path = "{model}"
[data]
forget = {{ path = "{data}/forget.jsonl", kind = "qa" }}
retain = {{ path = "{data}/retain.jsonl", kind = "qa" }}
[method]
objective = "{objective}"
retain = "nll"
[train]
epochs = 5
global_batch = 8
micro_batch_tokens = 4096
precision = "f32"
[optimizer]
lr = {lr}
[schedule]
name = "linear"
warmup = "1 epoch"
[eval]
before = false
{more}
"""


class Bench:
    def __init__(self, options):
        self.dunlearn, self.runs = options.dunlearn, Path(options.runs)
        self.runs.mkdir(parents=True, exist_ok=True)

    def call(self, *words):
        done = subprocess.run([self.dunlearn, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, name, text, fresh=False, **values):
        """A run's summary; the run is started where there is none."""
        folder = self.runs / name
        summary = folder / "summary.json"
        config = self.runs / f"{name.replace('/', '_')}.toml"
        config.write_text(text.format(dir=folder, **values))
        if fresh or not summary.exists():
            self.call("--config", config, "--overwrite")
        return json.loads(summary.read_text())

    def data(self, *words):
        folder = self.runs / "data"
        if not folder.exists():
            self.call("data", "synth", "--out", folder, *words)
        return folder


def rows(head, lines):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


def pair(summary, name):
    """Answer probability before and after."""
    numbers = summary.get(name, {})
    return [numbers.get(when, {}).get("probability") for when in ("before", "after")]


def accuracy(summary, name):
    return [summary[name].get(when, {}).get("token_accuracy") for when in ("before", "after")]


# --- UNLEARN and LEARN ---------------------------------------------------------------------------------------------------------------

SGD = 'name = "sgd"\nmomentum = 0.9\nmax_grad_norm = 0.0\nweight_decay = 0.0\nlr = 0.3'
ADAM = "weight_decay = 0.0\nlr = 1e-3"
LOW = "[scope]\nlora = {{ r = {r}, alpha = {alpha} }}"

# how a task's matrices are found: optimizer, [subspace], [scope]
KINDS = {
    "SGD, layer by layer": (SGD, 'order = "layers"', ""),
    "SGD, together (task vector)": (SGD, 'order = "together"', ""),
    "AdamW, layer by layer": (ADAM, 'order = "layers"', ""),
    "AdamW, layer by layer, rank 8": (ADAM, 'order = "layers"', LOW.format(r=8, alpha=16)),
    "SGD, layer by layer, random start": (SGD, 'order = "layers"\nstart = "random"', ""),
}
# similar tasks, and the directions of their subspace
ALONE = ([], "")
B = (["retain"], "max_rank = 128\nenergy = 0.999")
BOTH = (["retain", "sums"], "max_rank = 128\nenergy = 0.999")
BOTH_WIDE = (["retain", "sums"], "max_rank = 200\nenergy = 0.9999")
PAIRS = [(kind, how) for kind in list(KINDS)[:1] for how in (BOTH_WIDE, BOTH, B, ALONE)]
PAIRS += [(kind, how) for kind in list(KINDS)[1:] for how in (BOTH_WIDE, ALONE)]
DATA = ["--authors", 8, "--questions", 5, "--forget-fraction", 0.5, "--sums", 40]
SHAPE = ["--hidden", 256, "--layers", 2, "--intermediate", 512, "--vocab", 640]


def number(x):
    return "-" if x is None else f"{x:.3f}"


def tasks(bench):
    """Group A is the target, group B shares all templates with it, sums share nothing."""
    data = bench.data(*DATA, *SHAPE)
    trained = bench.run("base", MODEL, data=data, train=data / "full.jsonl", epochs=50, batch=10)
    known = [pair(trained, name)[1] for name in ("forget", "retain")]
    print(f"the model: answer probability of group A {known[0]:.4f}, of B {known[1]:.4f}\n")
    before = {}

    def attempt(kind, similar, strength, objective="unlearn", model="base", epochs=5):
        """Losses of A, B and the sums; one strength after the other on the same task matrices, which are trained once."""
        optimizer, how, scope = KINDS[kind]
        names, limits = similar
        listed = ", ".join(f'{{ path = "{data}/{name}.jsonl", kind = "qa" }}' for name in names)
        # B is the retain set or, where it is a similar task, similar_1; the sums are evaluated too
        subspace = f"[subspace]\nsimilar = [{listed}]\n{how}\n{limits}\nstrength = {strength}\n"
        name = f"{objective}_{list(KINDS).index(kind)}"
        values = {"model": bench.runs / model / "model", "data": data, "task": data / "forget.jsonl", "epochs": epochs}
        values |= {"target": "train" if objective == "learn" else "forget", "objective": objective}
        values |= {"optimizer": optimizer, "more": subspace + scope}
        summary = bench.run(name, TASK, fresh=True, **values)
        target = "train" if objective == "learn" else "forget"
        return {"A": after(summary, target), "B": after(summary, "similar_1" if "retain" in names else None), "sums": after(summary, "retain")}

    def after(summary, name):
        return None if name is None else summary[name]["after"]["probability"]

    before = {"A": known[0], "B": known[1], "sums": attempt(next(iter(KINDS)), ALONE, 1e-9)["sums"]}

    def lost(kind, similar, strength):
        now = attempt(kind, similar, strength)
        return {name: None if now[name] is None else (before[name] - now[name]) / before[name] for name in now}

    lines = []
    print("   | task matrices | similar | chosen by | strength | A lost | B lost | sums lost")
    for kind, similar in PAIRS:
        tried = {}
        # a hundredth of AdamW's steps is SGD's here; four times as strong until the target is forgotten, then in between
        strength = 64.0 if "SGD" in kind else 1.0
        while len(tried) < 7 and (not tried or max(entry["A"] for entry in tried.values()) < 0.96):
            tried[strength] = lost(kind, similar, strength)
            strength *= 4
        for name, bound in (("A", 0.96), ("A", 0.96), ("A", 0.80), ("sums", 0.025)):
            below = [s for s, entry in tried.items() if entry[name] < bound]
            above = [s for s, entry in tried.items() if entry[name] >= bound]
            if below and above:
                middle = (max(below) * min(above)) ** 0.5
                tried[middle] = lost(kind, similar, middle)
        words = ", ".join({"retain": "B"}.get(name, name) for name in similar[0]) or "none"
        words += f" ({similar[1].split()[2]} directions)" if similar[0] else ""
        (bench.runs / f"tried_{list(KINDS).index(kind)}_{PAIRS.index((kind, similar))}.json").write_text(json.dumps(sorted(tried.items())))
        ordered = sorted(tried.items())
        for rule, fits, series in [
            ("A at least 0.96", lambda e: e["A"] >= 0.96, ordered),
            ("A at least 0.80", lambda e: e["A"] >= 0.80, ordered),
            ("sums at most 0.025", lambda e: e["sums"] <= 0.025, ordered[::-1]),
        ]:
            chosen = next(((strength, entry) for strength, entry in series if fits(entry)), None)
            if chosen:
                strength, entry = chosen
                cells = [kind, words, rule, f"{strength:.0f}", *(number(entry[name]) for name in ("A", "B", "sums"))]
                print("  ", *cells, sep=" | ", flush=True)


def learn(bench):
    """LEARN beside LoRA: a model that has never met group A learns it."""
    data = bench.data(*DATA, *SHAPE)
    without = data / "without.jsonl"
    without.write_text((data / "retain.jsonl").read_text() + (data / "sums.jsonl").read_text())
    start = bench.run("without", MODEL, data=data, train=without, epochs=50, batch=10)
    lines = [["before", *(number(pair(start, name)[1]) for name in ("forget", "retain")), "-"]]
    names = ("train", "forget", "retain")
    # what is evaluated besides A: B in place of the forget set, and the sums
    text = TASK.replace("retain = ", 'forget = {{ path = "{data}/retain.jsonl", kind = "qa" }}\nretain = ')
    values = {"model": bench.runs / "without" / "model", "data": data, "task": data / "forget.jsonl", "target": "train"}
    similar = f'[{{ path = "{data}/retain.jsonl", kind = "qa" }}]'
    learners = [(1e-3, "full", ""), (3e-3, "rank 8", LOW.format(r=8, alpha=16))]
    for lr, words, scope in learners:
        for listed, limits in (("[]", ""), (similar, "max_rank = 32"), (similar, "max_rank = 128")):
            more = f"[subspace]\nsimilar = {listed}\n{limits}\n{scope}"
            summary = bench.run(
                f"learn_{words.replace(' ', '_')}", text, fresh=True, objective="learn", epochs=15,
                optimizer=f"weight_decay = 0.0\nlr = {lr}", more=more, **values)
            kind = "without similar tasks" if listed == "[]" else f"less B, {limits.split()[-1]} directions"
            lines.append([f"LEARN, {words}, {kind}", *(number(pair(summary, name)[1]) for name in names)])
            print(lines[-1], flush=True)
    for r in (8, 32):
        summary = bench.run(
            f"lora_{r}", text, objective="finetune", epochs=30, optimizer="weight_decay = 0.0\nlr = 3e-3",
            more=LOW.format(r=r, alpha=2 * r), **values)
        lines.append([f"LoRA, rank {r}", *(number(pair(summary, name)[1]) for name in names)])
    rows(["", "A known", "B known", "sums known"], lines)


# --- GRIN ----------------------------------------------------------------------------------------------------------------------------


def grin(bench):
    data = bench.data("--authors", 16, "--questions", 10, "--forget-fraction", 0.25, "--sums", 0)
    bench.run("base", MODEL, data=data, train=data / "full.jsonl", epochs=30, batch=16)
    print("| loss (+ retain nll) | score | noise | forget: probability / accuracy | retain: probability / accuracy |\n|---|---|---|---|---|")
    scores = ["(all weights)", "random", "gradient", "gri"]
    for objective, lr in (("ga", 1e-3), ("npo", 1e-3), ("idk", 1e-3)):
        for score in scores:
            for noise in (None, 0.05):
                more = "" if score == scores[0] else f'[scope.mask]\nscore = "{score}"\nfraction = 0.1\n'
                more += f"[before]\nnoise = {noise}\nnoise_relative = true\n" if noise else ""
                name = f"grin_{objective}_{score.strip('()').replace(' ', '_')}_{noise or 0}"
                summary = bench.run(name, GRIN, data=data, model=bench.runs / "base" / "model", objective=objective, lr=lr, more=more)
                cells = [f"{pair(summary, which)[1]:.3f} / {accuracy(summary, which)[1]:.3f}" for which in ("forget", "retain")]
                print("| " + " | ".join([objective, score, f"{noise or 0}", *cells]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["tasks", "learn", "grin"])
    parser.add_argument("--dunlearn", default=str(ROOT / "target/release/dunlearn"))
    parser.add_argument("--runs", default=None, help="folder of the runs; runs/EXPERIMENT by default")
    parser.add_argument("--fresh", action="store_true", help="remove that folder first")
    options = parser.parse_args()
    options.runs = options.runs or f"runs/{options.experiment}"
    options.dunlearn = os.path.abspath(options.dunlearn)
    os.chdir(ROOT)
    if options.fresh:
        shutil.rmtree(options.runs, ignore_errors=True)
    {"tasks": tasks, "learn": learn, "grin": grin}[options.experiment](Bench(options))


if __name__ == "__main__":
    main()
