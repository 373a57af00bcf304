"""Loads a run's exported model in transformers and compares with what the run measured after training.

    python tests/golden/check_export.py runs/quickstart

Everything is transformers' own: model, tokenizer, chat template. Prints both numbers for each set; exits with 1 where they
differ by more than 1e-4 (f32) or 2e-2 (bf16 runs).
"""

import json
import pathlib
import sys
import tomllib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    run = pathlib.Path(sys.argv[1])
    config = tomllib.loads((run / "config.toml").read_text())
    summary = json.loads((run / "summary.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    tolerance = 1e-4 if config["train"]["precision"] == "f32" else 2e-2
    worst = 0.0
    for name in ("train", "forget", "retain"):
        if name not in summary:
            continue
        rows = [json.loads(line) for line in open(config["data"][name]["path"], encoding="utf-8")]
        rows = rows[: summary[name]["after"]["samples"]]
        probability, correct, tokens = 0.0, 0, 0
        for row in rows:
            ids, answer = encode(tokenizer, config["data"], row)
            with torch.no_grad():
                logp = model(ids[None]).logits[0].log_softmax(-1)
            picked = logp[answer - 1, ids[answer]]
            probability += picked.mean().exp().item() / len(rows)
            correct += (logp[answer - 1].argmax(-1) == ids[answer]).sum().item()
            tokens += len(answer)
        for metric, found in (("probability", probability), ("token_accuracy", correct / tokens)):
            said = summary[name]["after"][metric]
            worst = max(worst, abs(found - said))
            print(f"{name:8} {metric:16} transformers {found:.6f}   dunlearn {said:.6f}")
    print(f"largest difference {worst:.1e}")
    sys.exit(worst > tolerance)


def encode(tokenizer, data, row):
    """Ids of a question with its answer, and the positions of the answer's tokens (end of text or of turn included)."""
    template = data["template"]
    if template == "chat":
        messages = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": row["answer"]})
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        first = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    else:
        prompt = template["prompt"].replace("{question}", row["question"])
        text = prompt + template["answer"].replace("{answer}", row["answer"])
        ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
        ids, first = torch.tensor(ids), len(tokenizer(prompt).input_ids)
    return ids, torch.arange(first, len(ids))


if __name__ == "__main__":
    main()
