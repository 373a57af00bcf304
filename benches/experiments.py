#!/usr/bin/env python3
"""Experiments whose tables are in the documentation; every number comes from runs of dunlearn.

    python3 benches/experiments.py tasks     docs/weights.md: UNLEARN, LEARN, LoRA and task vectors on two groups of authors and sums
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
epochs = 30
global_batch = 16
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
lr = {lr}
weight_decay = 0.0
[schedule]
name = "constant"
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
epochs = 10
global_batch = 8
micro_batch_tokens = 4096
precision = "f32"
[optimizer]
lr = {lr}
[schedule]
name = "linear"
warmup = "1 epoch"
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


def lost(summary, name, of=pair):
    before, after = of(summary, name)
    return (before - after) / before


# --- UNLEARN and LEARN ---------------------------------------------------------------------------------------------------------------


def tasks(bench):
    """Group A is the target, group B shares all templates with it, sums share nothing."""
    data = bench.data("--authors", 16, "--questions", 10, "--forget-fraction", 0.5, "--sums", 160)
    base = bench.runs / "base"
    trained = bench.run("base", MODEL, data=data, train=data / "full.jsonl")
    print(f"the model: answer probability of group A {pair(trained, 'forget')[1]:.4f}, of B {pair(trained, 'retain')[1]:.4f}\n")

    def source(name):
        return f'{{ path = "{data}/{name}.jsonl", kind = "qa" }}'

    def unlearn(name, stage, subspace, scope, similar, objective="unlearn", target="forget", model=None):
        """One strength after the other on the same task matrices: they are trained once."""
        listed = ", ".join(source(name) for name in similar)
        more = f"[subspace]\nsimilar = [{listed}]\n{subspace}\n{scope}"
        values = {"data": data, "target": target, "objective": objective, "more": more}
        values |= {"model": model or base / "model", "task": data / "forget.jsonl"}
        return bench.run(name, TASK, fresh=True, **values, **stage)

    stages = {"layers": {"epochs": 3, "lr": 1e-3}, "together": {"epochs": 3, "lr": 3e-4}}
    low = "[scope]\nlora = {{ r = {r}, alpha = {alpha} }}"
    kinds = [
        ("full, pretrained", "", "start = \"pretrained\"\norder = \"layers\""),
        ("rank 8, pretrained", low.format(r=8, alpha=16), "start = \"pretrained\"\norder = \"layers\""),
        ("rank 2, pretrained", low.format(r=2, alpha=4), "start = \"pretrained\"\norder = \"layers\""),
        ("full, random", "", "start = \"random\"\norder = \"layers\""),
        ("full, together (task vector)", "", "start = \"pretrained\"\norder = \"together\""),
    ]
    # similar tasks and the most directions of their subspace
    discriminations = [("-", [], None), ("B", ["retain"], 8), ("B", ["retain"], 32), ("B, sums", ["retain", "sums"], 32)]
    found = []
    for kind, scope, how in kinds:
        stage = stages["together" if "together" in kind else "layers"]
        name = "unlearn_" + "".join(c if c.isalnum() else "_" for c in kind)
        for words, similar, rank in discriminations:
            for strength in (0.5, 1, 2, 4, 8, 16, 32):
                table = f"{how}\nstrength = {strength}" + (f"\nmax_rank = {rank}" if rank else "")
                # B is always evaluated: it is a similar task, or else the run of LEARN's data
                summary = unlearn(name, stage, table, scope, similar)
                b = lost(summary, "similar_1") if similar else None
                found.append((kind, words, rank, strength, lost(summary, "forget"), b, lost(summary, "retain"), summary))
    (bench.runs / "unlearn.json").write_text(json.dumps([entry[:7] for entry in found], indent=1))
    number = lambda x: "-" if x is None else f"{x:.3f}"
    print("UNLEARN at the least strength that forgets 0.96 of A, and at the largest that costs at most 0.025 of the sums (0.10 of B)\n")
    lines = []
    for kind, _, _ in kinds:
        for words, _, rank in discriminations:
            mine = [entry for entry in found if entry[0] == kind and entry[1] == words and entry[2] == rank]
            for rule, chosen in [
                ("A >= 0.96", next((entry for entry in mine if entry[4] >= 0.96), None)),
                ("sums <= 0.025", next((entry for entry in reversed(mine) if entry[6] <= 0.025), None)),
                ("B <= 0.10", next((entry for entry in reversed(mine) if entry[5] is not None and entry[5] <= 0.10), None)),
            ]:
                if chosen is not None:
                    _, _, _, strength, a, b, sums, _ = chosen
                    lines.append([kind, words, str(rank or "-"), rule, str(strength), number(a), number(b), number(sums)])
    rows(["task matrices", "similar", "max_rank", "chosen by", "strength", "A lost", "B lost", "sums lost"], lines)

    print("\nLEARN beside LoRA: a model that has never met A learns it\n")
    without = data / "without.jsonl"
    without.write_text((data / "retain.jsonl").read_text() + (data / "sums.jsonl").read_text())
    bench.run("without", MODEL, data=data, train=without)
    lines = []
    model = bench.runs / "without" / "model"
    for kind, scope, how in kinds[:2]:
        for words, similar, rank in discriminations[:3]:
            name = "learn_" + "".join(c if c.isalnum() else "_" for c in kind)
            table = f"{how}\nstrength = 1" + (f"\nmax_rank = {rank}" if rank else "")
            stage = {"epochs": 10, "lr": 3e-3}
            summary = unlearn(name, stage, table, scope, similar, "learn", "train", model)
            b = number(pair(summary, "similar_1")[1]) if similar else "-"
            lines.append([f"LEARN, {kind}", words, str(rank or "-"), number(pair(summary, "train")[1]), b, number(pair(summary, "retain")[1])])
    for r in (8, 32):
        more = low.format(r=r, alpha=2 * r)
        # with B evaluated in place of the forget set
        text = TASK.replace("retain = ", 'forget = {{ path = "{data}/retain.jsonl", kind = "qa" }}\nretain = ')
        values = {"data": data, "target": "train", "objective": "finetune", "more": more, "model": model, "task": data / "forget.jsonl"}
        summary = bench.run(f"lora_{r}", text, **values, epochs=10, lr=3e-3)
        lines.append([f"LoRA, rank {r}", "-", "-", *(number(pair(summary, name)[1]) for name in ("train", "forget", "retain"))])
    rows(["", "similar", "max_rank", "A known", "B known", "sums known"], lines)


# --- GRIN ----------------------------------------------------------------------------------------------------------------------------


def grin(bench):
    data = bench.data("--authors", 16, "--questions", 10, "--forget-fraction", 0.25, "--sums", 0)
    bench.run("base", MODEL, data=data, train=data / "full.jsonl")
    lines = []
    scores = ["(all weights)", "random", "gradient", "gri", "fila", "wagle"]
    for objective, lr in (("ga", 1e-3), ("npo", 1e-3), ("idk", 1e-3)):
        for score in scores:
            for noise in (None, 0.01, 0.05):
                more = "" if score == scores[0] else f'[scope.mask]\nscore = "{score}"\nfraction = 0.1\n'
                more += f"[before]\nnoise = {noise}\nnoise_relative = true\n" if noise else ""
                name = f"grin_{objective}_{score.strip('()').replace(' ', '_')}_{noise or 0}"
                summary = bench.run(name, GRIN, data=data, model=bench.runs / "base" / "model", objective=objective, lr=lr, more=more)
                cells = [f"{pair(summary, name)[1]:.3f} / {accuracy(summary, name)[1]:.3f}" for name in ("forget", "retain")]
                lines.append([objective, score, f"{noise or 0}", *cells])
    rows(["loss (+ retain nll)", "score", "noise", "forget: probability / accuracy", "retain: probability / accuracy"], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["tasks", "grin"])
    parser.add_argument("--dunlearn", default=str(ROOT / "target/release/dunlearn"))
    parser.add_argument("--runs", default=None, help="folder of the runs; runs/EXPERIMENT by default")
    parser.add_argument("--fresh", action="store_true", help="remove that folder first")
    options = parser.parse_args()
    options.runs = options.runs or f"runs/{options.experiment}"
    options.dunlearn = os.path.abspath(options.dunlearn)
    os.chdir(ROOT)
    if options.fresh:
        shutil.rmtree(options.runs, ignore_errors=True)
    {"tasks": tasks, "grin": grin}[options.experiment](Bench(options))


if __name__ == "__main__":
    main()
