"""Times dunlearn beside a plain transformers + PyTorch loop: same model, data, batches, losses and precision, in turn.

    launch/setup && cargo build --release
    python3 -m venv .venv && .venv/bin/pip install -r benches/peer/requirements.txt
    .venv/bin/python benches/compare.py --forget forget10.jsonl --retain retain90.jsonl

Prints a table in Markdown: medians over the rounds, and the ratio of each pair. Nothing else should run meanwhile.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = """
[run]
dir = "{dir}/run"
threads = {threads}
[model]
path = "{dir}/model"
[data]
forget = {{ path = "{forget}", kind = "qa" }}
retain = {{ path = "{retain}", kind = "qa" }}
template = {{ prompt = "Question: {{question}}\\nAnswer:", answer = " {{answer}}" }}
shuffle = false
[method]
objective = "npo"
retain = "nll"
[train]
steps = {steps}
global_batch = {batch}
micro_batch_tokens = {tokens}
precision = "{precision}"
[optimizer]
lr = 1e-5
[eval]
before = false
after = false
[export]
model = false
"""


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        make = [sys.executable, ROOT / "benches/peer/make_model.py", "--data", args.forget, args.retain, "--out", model]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        rows = args.rows or args.steps * args.batch
        args.forget = head(args.forget, rows, f"{folder}/forget.jsonl")
        args.retain = head(args.retain, rows, f"{folder}/retain.jsonl")
        print(f"{args.rounds} rounds in turn, {args.steps} steps each, {args.threads} threads, {processor()}\n")
        print("| precision | | s/step | real tokens/s | with one epoch's reference | peak MiB | start to end of step 1, s | loss at step 1 and last |")
        print("|---|---|---|---|---|---|---|---|")
        for precision in ("f32", "bf16"):
            pairs = [(peer(args, folder, precision), ours(args, folder, precision)) for _ in range(args.rounds)]
            for name, index in (("transformers + PyTorch", 0), ("dunlearn", 1)):
                runs = [pair[index] for pair in pairs]
                middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                print(
                    f"| {precision} | {name} | {middle['seconds']:.3f} | {middle['tokens']:.0f} | {middle['epoch']:.0f} | {middle['peak']:.0f} "
                    f"| {middle['first']:.2f} | {middle['loss_first']:.4f}, {middle['loss_last']:.4f} |"
                )
            ratio = {key: statistics.median(b[key] / a[key] for a, b in pairs) for key in ("tokens", "epoch", "peak")}
            print(
                f"| {precision} | **ratio** | | **{ratio['tokens']:.2f}x** | **{ratio['epoch']:.2f}x** | **{ratio['peak']:.2f}x** | | |",
                flush=True,
            )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--forget", required=True, metavar="JSONL", type=os.path.abspath, help="rows {question, answer}")
    add("--retain", required=True, metavar="JSONL", type=os.path.abspath)
    add("--binary", default=ROOT / "target/release/dunlearn")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=22)
    add("--batch", type=int, default=8, help="forget rows a step, with as many retain rows")
    add("--rows", type=int, help="rows of each file (default: as many as the steps need, so that each step has rows of its own)")
    add("--tokens", type=int, default=512, help="dunlearn's micro_batch_tokens")
    add("--threads", type=int, default=2)
    return parser.parse_args()


def head(path, rows, target):
    with open(path, encoding="utf-8") as lines:
        pathlib.Path(target).write_text("".join(itertools.islice(lines, rows)), encoding="utf-8")
    return target


def peer(args, folder, precision):
    command = [sys.executable, ROOT / "benches/peer/peer.py", "--model", f"{folder}/model", "--forget", args.forget]
    command += ["--retain", args.retain, "--file-order", "--steps", args.steps, "--batch", args.batch]
    command += ["--precision", precision, "--threads", args.threads]
    lines = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout.splitlines()
    steps, summary = [json.loads(line) for line in lines[:-1]], json.loads(lines[-1])["summary"]
    return {
        "seconds": summary["seconds_per_step"],
        "tokens": summary["real_tokens_per_second"],
        "epoch": summary["real_tokens_per_second"],  # asks its reference in every step
        "peak": summary["peak_rss_mib"],
        "first": summary["seconds_to_first_step"],
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
    }


def ours(args, folder, precision):
    values = {**vars(args), "dir": folder, "precision": precision}
    path = pathlib.Path(folder) / "run.toml"
    path.write_text(CONFIG.format(**values))
    command = [args.binary, "--config", path, "--overwrite", "--progress", "none"]
    started = time.time()
    subprocess.run(command, check=True, capture_output=True)
    run = pathlib.Path(folder) / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    summary = json.loads((run / "summary.json").read_text())
    timed = steps[2:]
    seconds = statistics.median(step["step_s"] for step in timed)
    tokens = statistics.mean(step["tokens_per_s"] * step["step_s"] for step in timed)
    # the reference's log-probabilities of all forget rows are computed before the first step; a row's share of that is paid
    # once, however many epochs follow
    reference = summary["reference_seconds"] * args.batch / summary["data"]["forget"]["samples"]
    for cache in (run / "cache").glob("*"):
        cache.unlink()
    return {
        "seconds": seconds,
        "tokens": tokens / seconds,
        "epoch": tokens / (seconds + reference),
        "peak": summary["peak_rss_bytes"] / 2**20,
        "first": steps[0]["time"] - started,
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
    }


def processor():
    for line in open("/proc/cpuinfo", encoding="utf-8"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
