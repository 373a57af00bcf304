"""Holds what `dunlearn plan` says against what runs need on this machine's CPU, and writes the table of docs/plan.md.

    launch/setup && cargo build --release
    python3 benches/plan.py target/release/dunlearn

Each configuration is a real run of some steps, each rank a process with one thread; all steps are of the same samples. Memory: the largest
resident set of rank 0 in the first step against the planned peak with what the process took before the model, and the same without that
base. Wire: bytes that rank 0 handed to its transport in the first step. Time: the median over the other steps of the seconds for which
rank 0 had a core, against the mean of two plans that have timed this machine's products, passes and collectives in the same way just before and just after,
started as the run is.

Results go to target/plan.jsonl one by one, so that a long table can be made in parts (`--only`); the page is written when all are there.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "target/plan.jsonl"
SHAPE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048)
FAMILIES = {
    "llama": dict(model_type="llama", architectures=["LlamaForCausalLM"]),
    "mistral": dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None),
    "qwen2": dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=False),
    "qwen3": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=64, attention_bias=False),
    "phi3": dict(model_type="phi3", architectures=["Phi3ForCausalLM"], original_max_position_embeddings=2048),
}
BF16 = ["train.precision=bf16"]
# family, tp, dp, settings
CASES = [
    ("llama", 1, 1, []),
    ("llama", 1, 1, BF16),
    ("llama", 1, 1, ["train.recompute=half_block"]),
    ("qwen2", 2, 1, []),
    ("qwen3", 2, 1, ["parallel.sequence_parallel=true", "train.recompute=half_block"]),
    ("mistral", 1, 2, ["train.recompute=half_block", *BF16]),
    ("phi3", 1, 2, ["parallel.zero=false"]),
    ("llama", 2, 2, ["method.objective=simnpo", "parallel.sequence_parallel=true"]),
    ("qwen2", 1, 1, ["method.retain=kl"]),
    ("llama", 1, 1, ["scope.lora={ r = 16, alpha = 32 }"]),
    ("qwen3", 2, 1, ["scope.lora={ r = 8, alpha = 16 }", "train.recompute=half_block", *BF16]),
    ("mistral", 1, 2, ["optimizer.in_backward=true", "optimizer.state_dtype=int8", "method.objective=ga"]),
]
CONFIG = """
[run]
dir = "{folder}/run"
device = "cpu"
[model]
path = "{folder}/model"
init = "random"
[parallel]
tp = {tp}
dp = {dp}
[data]
forget = {{ path = "{folder}/forget.jsonl", kind = "qa" }}
retain = {{ path = "{folder}/retain.jsonl", kind = "qa" }}
[method]
objective = "npo"
retain = "nll"
[train]
precision = "f32"
steps = {steps}
global_batch = {batch}
micro_batch_tokens = {tokens}
[optimizer]
lr = 1e-5
[eval]
before = false
after = false
[export]
model = false
"""


def call(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def data(binary, folder, samples):
    """As many samples as a step takes: all steps are of the same ones."""
    call([binary, "data", "synth", "--out", folder, "--vocab", "4096", "--authors", "60", "--force"])
    for name in ["forget", "retain"]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:samples]))


def measure(binary, folder, case, options):
    family, tp, dp, settings = case
    data(binary, folder, options.batch)
    model = folder / "model" / "config.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | SHAPE | FAMILIES[family]))
    text = CONFIG.format(folder=folder, tp=tp, dp=dp, steps=options.steps, batch=options.batch, tokens=options.tokens)
    (folder / "config.toml").write_text(text)
    sets = [word for setting in settings for word in ("--set", setting)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [ROOT / "launch/mpirun", "-n", str(tp * dp)] if tp * dp > 1 else []
    plan = [*ranks, binary, "plan", "--config", folder / "config.toml", "--gpu", "measured", "--json", *sets]
    timed = lambda: json.loads(call(plan, env=alone))["step"]
    before = timed()
    call([*ranks, binary, "--config", folder / "config.toml", "--overwrite", "--progress", "none", *sets], env=alone)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    found = next(line["plan"] for line in lines if "plan" in line)
    steps = [line["cpu_s"] for line in lines if "cpu_s" in line]
    found["steps_s"] = steps
    found["step_s"] = statistics.median(steps[1:])
    after = timed()
    found["planned_step_s"] = statistics.mean([before["seconds"], after["seconds"]])
    found["planned_step"] = [before, after]
    found["case"] = f"{family}, tp {tp} x dp {dp}" + "".join(f", `{setting}`" for setting in settings)
    return found


def off(found, planned):
    return f"{100 * (found / planned - 1):+.1f} %" if planned else "-"


def table(results):
    mib = lambda n: f"{n / 2**20:.1f}"
    lines = ["| configuration | peak MiB | planned | off | without base | sent MiB a step | planned | CPU s/step | planned | off |", "|---|" + "---|" * 9]
    for r in results:
        peak, planned, base = r["peak_bytes"], r["planned_peak_bytes"], r["base_bytes"]
        lines.append(
            f"| {r['case']} | {mib(peak)} | {mib(planned)} | {off(peak, planned)} | {off(peak - base, planned - base)} "
            f"| {mib(r['wire_bytes'])} | {'the same' if r['wire_bytes'] == r['planned_wire_bytes'] else mib(r['planned_wire_bytes'])} "
            f"| {r['step_s']:.3f} | {r['planned_step_s']:.3f} | {off(r['step_s'], r['planned_step_s'])} |"
        )
    within = lambda share, found, planned: sum(abs(r[found] - r[planned]) <= share * r[planned] for r in results)
    lines.append(
        f"\nOf {len(results)}: memory within 5 % {within(0.05, 'peak_bytes', 'planned_peak_bytes')}, "
        f"wire exact {within(0, 'wire_bytes', 'planned_wire_bytes')}, time within 20 % {within(0.2, 'step_s', 'planned_step_s')}."
    )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument("--dry", action="store_true", help="print the table and leave the page as it is")
    options = parser.parse_args()
    binary = options.binary.resolve()
    cases = range(len(CASES)) if options.only is None else options.only
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(binary, pathlib.Path(folder), CASES[case], options)
        with RESULTS.open("a") as file:
            print(json.dumps({"number": case, "date": str(datetime.date.today())} | found), file=file)
        print(table([found]).splitlines()[2], flush=True)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    newest = {line["number"]: line for line in lines}
    results = [newest[number] for number in sorted(newest)]
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    dates = sorted({result["date"] for result in results})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    text = f"{when}, {len(os.sched_getaffinity(0))} cores of {cpu}.\n\n{table(results)}\n"
    print(text)
    page = ROOT / "docs/plan.md"
    if len(results) == len(CASES) and not options.dry:
        head, rest = page.read_text().split("<!-- benches/plan.py -->\n", 1)
        tail = rest.split("<!-- end -->", 1)[1]
        page.write_text(f"{head}<!-- benches/plan.py -->\n{text}<!-- end -->{tail}")


main()
