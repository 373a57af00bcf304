"""Times `dunlearn generate` beside transformers' `generate` on the same random Llama, prompts and threads, and compares the tokens.

    pip install torch==2.11.0 transformers==5.23.0 safetensors==0.8.0
    python benches/generate.py target/release/dunlearn          # a minute or two

Both run greedily in f32 (or --bf16) on --threads threads. transformers gets the prompts in batches of --rows, padded on the left, as
its users do; dunlearn the file. The two take turns, so that other work on the machine meets both; the best of --repeats counts.
"""

import argparse
import json
import pathlib
import re
import subprocess
import tempfile
import time

import torch
import transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dunlearn")
    for name, value in [("prompts", 64), ("rows", 32), ("new-tokens", 64), ("threads", 2), ("repeats", 3), ("hidden", 576),
                        ("layers", 12), ("heads", 9), ("kv-heads", 3), ("intermediate", 1536), ("vocab", 4096)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        shape = ["hidden", "layers", "heads", "kv_heads", "intermediate", "vocab"]
        shape = [word for name in shape for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        subprocess.run([options.dunlearn, "data", "synth", "--out", folder / "data", "--weights", *shape], check=True)
        lines = (folder / "data/full.jsonl").read_text().splitlines()[:options.prompts]
        # questions of different lengths, as they are: no template
        questions = [json.loads(line)["question"] * (1 + i % 3) for i, line in enumerate(lines)]
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
        model = folder / "data/model"
        theirs = Theirs(model, questions, options)
        best = {}
        for _ in range(options.repeats):
            ours_tokens, ours = run_ours(model, prompts, folder / "out.jsonl", options)
            theirs_tokens, seconds = theirs.run()
            for name, rate in [("dunlearn", ours), ("transformers", sum(map(len, theirs_tokens)) / seconds)]:
                best[name] = max(best.get(name, 0.0), rate)
        same = sum(a == b for a, b in zip(ours_tokens, theirs_tokens))
        parameters = sum(p.numel() for p in theirs.model.parameters()) / 1e6
        print(f"{parameters:.0f} M parameters, {'bf16' if options.bf16 else 'f32'}, {len(questions)} prompts, "
              f"{options.new_tokens} new tokens, {options.threads} threads, rows {options.rows}")
        for name, rate in best.items():
            print(f"  {name:13} {rate:8.0f} tokens/s")
        print(f"  ratio {best['dunlearn'] / best['transformers']:.2f}; {same} of {len(questions)} continuations are the same")


def run_ours(model, prompts, out, options):
    done = subprocess.run(
        [options.dunlearn, "generate", "--model", model, "--prompts", prompts, "--raw", "--out", out, "--max-new-tokens",
         str(options.new_tokens), "--rows", str(options.rows), "--threads", str(options.threads), "--progress", "none",
         "--precision", "bf16" if options.bf16 else "f32"], check=True, capture_output=True, text=True)
    rate = float(re.search(r"(\d+) tokens/s", done.stderr).group(1))
    return [json.loads(line)["tokens"] for line in out.read_text().splitlines()], rate


class Theirs:
    def __init__(self, folder, questions, options):
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        # prompts of similar length together, as a careful user would
        self.order = sorted(range(len(questions)), key=lambda i: -len(tokenizer(questions[i]).input_ids))
        self.batches = [tokenizer([questions[i] for i in self.order[at:at + options.rows]], return_tensors="pt", padding=True)
                        for at in range(0, len(questions), options.rows)]
        self.tokenizer, self.options = tokenizer, options

    def run(self):
        start, rows = time.perf_counter(), []
        for batch in self.batches:
            out = self.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
                                      max_new_tokens=self.options.new_tokens, pad_token_id=self.tokenizer.pad_token_id)
            rows += out[:, batch.input_ids.shape[1]:].tolist()
        seconds = time.perf_counter() - start
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        written = [None] * len(rows)
        for place, row in zip(self.order, rows):
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            written[place] = row[:end]
        return written, seconds


if __name__ == "__main__":
    main()
