"""Loads the adapter and the merged model of a run with PEFT and transformers and compares their logits.

    python tests/golden/check_adapter.py RUN BASE

RUN: a run folder with adapter/ and model/; BASE: the model that the run read. Needs torch, transformers and peft.
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

run, base = sys.argv[1:]
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokens = torch.randint(0, load(base).config.vocab_size, (4, 40), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    before = load(base)(tokens).logits
    adapted = PeftModel.from_pretrained(load(base), f"{run}/adapter")(tokens).logits
    merged = load(f"{run}/model")(tokens).logits
print(f"change by the run       {(adapted - before).abs().max():.3g}")
print(f"adapted against merged  {(adapted - merged).abs().max():.3g}")
assert (adapted - before).abs().max() > 1e-2, "the adapter changes nothing"
assert (adapted - merged).abs().max() < 1e-4 * merged.abs().max(), "adapter and merged model differ"
