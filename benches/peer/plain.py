"""An 8B Llama unlearned with NPO and a retain term in plain PyTorch on one GPU, to be timed beside `dunlearn bench step`.

    python benches/peer/plain.py --samples 16 --length 512 --micro-batch-tokens 32768 --steps 5

Random weights and tokens of the same lengths. Written as one would: bf16 weights, padded batches, SDPA, the reference's
log-probabilities known beforehand, AdamW(fused) in bf16, activation checkpointing where it does not fit otherwise. Prints JSON.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

HIDDEN, LAYERS, HEADS, KV, WIDTH, VOCAB, DIM = 4096, 32, 32, 8, 14336, 128256, 128


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.norm1, self.norm2 = torch.nn.RMSNorm(HIDDEN, 1e-5), torch.nn.RMSNorm(HIDDEN, 1e-5)
        self.q, self.k, self.v, self.o = linear(HIDDEN, HIDDEN), linear(HIDDEN, KV * DIM), linear(HIDDEN, KV * DIM), linear(HIDDEN, HIDDEN)
        self.gate, self.up, self.down = linear(HIDDEN, WIDTH), linear(HIDDEN, WIDTH), linear(WIDTH, HIDDEN)

    def forward(self, x, cos, sin):
        n, t, _ = x.shape
        h = self.norm1(x)
        heads = lambda y, k: y.view(n, t, k, DIM).transpose(1, 2)
        q, k, v = heads(self.q(h), HEADS), heads(self.k(h), KV), heads(self.v(h), KV)
        turn = lambda y: y * cos + torch.cat((-y[..., DIM // 2 :], y[..., : DIM // 2]), -1) * sin
        a = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(n, t, HIDDEN))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, HIDDEN)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = torch.nn.RMSNorm(HIDDEN, 1e-5), torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids, recompute):
        x = self.embed(ids)
        angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * 500000.0 ** (-torch.arange(0, DIM, 2, device=ids.device) / DIM)
        cos, sin = (torch.cat((f(angle),) * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if recompute else layer(x, cos, sin)
        return self.norm(x)


def logprobs(model, ids, scored, recompute):
    """Log-probabilities of the scored tokens, [scored]; the head runs at their positions only."""
    hidden = model(ids, recompute)[:, :-1][scored[:, 1:]]
    targets = ids[:, 1:][scored[:, 1:]]
    return -F.cross_entropy(model.head(hidden).float(), targets, reduction="none")


def batch(lengths, share):
    longest = max(lengths)
    ids = torch.randint(0, VOCAB, (len(lengths), longest), device="cuda")
    place = torch.arange(longest, device="cuda")[None]
    length = torch.tensor(lengths, device="cuda")[:, None]
    prompt = (length * (1 - share)).long().clamp(min=1)
    return ids, (place >= prompt) & (place < length)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=32768)
    parser.add_argument("--scored", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    spread = lambda: [int(args.length * (0.5 + torch.rand(()).item())) for _ in range(args.samples)]
    forget, retain = spread(), spread()
    parameters = sum(p.numel() for p in model.parameters())

    def run(recompute):
        start = time.perf_counter()
        # forget and retain rows apart, as the usual frameworks have them
        ids, scored = batch(forget, args.scored)
        each = logprobs(model, ids, scored, recompute)
        row = torch.arange(len(forget), device="cuda")[:, None].expand_as(scored[:, 1:])[scored[:, 1:]]
        ratio = torch.zeros(len(forget), device="cuda", dtype=torch.float32).index_add(0, row, each + 2.0)
        (-F.logsigmoid(-0.1 * ratio).mean() * 2 / 0.1).backward()
        ids, scored = batch(retain, args.scored)
        (-logprobs(model, ids, scored, recompute).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    recompute = args.recompute
    try:
        run(recompute)
    except torch.cuda.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        recompute = True
        run(recompute)
    run(recompute)
    times = sorted(run(recompute) for _ in range(args.steps))
    seconds = times[len(times) // 2]

    matrices = LAYERS * (HIDDEN * DIM * (2 * HEADS + 2 * KV) + 3 * HIDDEN * WIDTH)
    flops = 0.0
    for n in forget + retain:
        flops += 6 * (matrices * n + LAYERS * HEADS * DIM * n * (n + 1) + VOCAB * HIDDEN * int(n * args.scored))
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    best = 1e9
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    rate = 2 * 8192**3 / best
    tokens = sum(forget + retain)
    print(json.dumps({
        "seconds_per_step": seconds, "tokens_per_step": tokens, "tokens_per_second": tokens / seconds,
        "flops_per_second": flops / seconds, "matrix_rate": rate, "share_of_matrix_rate": flops / seconds / rate,
        "device_bytes": torch.cuda.max_memory_reserved(), "parameters": parameters, "recompute": recompute,
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
