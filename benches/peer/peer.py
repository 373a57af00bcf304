"""The same unlearning as dunlearn in a plain transformers + PyTorch loop, to be timed beside it.

    python benches/peer/peer.py --model DIR --forget forget10.jsonl --retain retain90.jsonl --objective npo --retain-term nll

One JSON line a step, then one JSON line `summary`. Written as one would with these libraries: padded batches, SDPA attention, forget
and retain rows in forward passes of their own, a frozen copy of the model for NPO and KL, autocast for bf16, fused AdamW.
Definitions where frameworks differ: token means and the KL mean run over the real tokens of the global batch, NPO uses sums.
"""

import argparse
import copy
import json
import resource
import statistics
import time

import psutil
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

IGNORE = -100
WARM_UP_STEPS = 2


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    forget, retain = (read_rows(path, tokenizer, args) for path in (args.forget, args.retain))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    reference = None
    if args.objective == "npo" or args.retain_term == "kl":
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    model.train()
    optimizer, optimizer_kind = make_optimizer(model, args)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, args.steps)

    seconds, real_tokens, padded_tokens, first_step_done = [], [], [], None
    for step, (forget_rows, retain_rows) in enumerate(batches(forget, retain, args)):
        began = time.perf_counter()
        counts = {"real": 0, "padded": 0}
        forget_loss = run_stream(model, reference, forget_rows, pad, args.objective, 1.0, args, counts)
        retain_loss = 0.0
        if args.retain_term != "none":
            retain_loss = run_stream(model, reference, retain_rows, pad, args.retain_term, args.retain_weight, args, counts)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        real_tokens.append(counts["real"])
        padded_tokens.append(counts["padded"])
        first_step_done = first_step_done or time.time()
        print(json.dumps({
            "step": step + 1, "loss": forget_loss + args.retain_weight * retain_loss, "forget_loss": forget_loss,
            "retain_loss": retain_loss, "grad_norm": grad_norm.item(), "lr": lr}), flush=True)
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)

    timed = slice(WARM_UP_STEPS, None) if args.steps > WARM_UP_STEPS else slice(None)
    median = statistics.median(seconds[timed])
    print(json.dumps({"summary": {
        "seconds_per_step": median,
        "real_tokens_per_second": statistics.mean(real_tokens[timed]) / median,
        "real_tokens_per_step": statistics.mean(real_tokens), "padded_tokens_per_step": statistics.mean(padded_tokens),
        "peak_rss_mib": peak_rss_mib(),
        "seconds_to_first_step": first_step_done - psutil.Process().create_time(),
        "parameters": model.num_parameters(), "optimizer": optimizer_kind, "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "arguments": vars(args),
    }}))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder")
    add("--forget", required=True, metavar="JSONL", help="rows {question, answer}")
    add("--retain", required=True, metavar="JSONL")
    add("--prompt", default="Question: {question}\nAnswer:", type=unescape, help=r"template; \n is a line break")
    add("--answer", default=" {answer}", type=unescape)
    add("--max-length", type=int, default=512, help="tokens; a longer row is cut at the end")
    add("--objective", choices=["ga", "npo"], default="npo")
    add("--retain-term", choices=["none", "nll", "kl"], default="nll")
    add("--beta", type=float, default=0.1)
    add("--retain-weight", type=float, default=1.0)
    add("--lr", type=float, default=1e-5)
    add("--weight-decay", type=float, default=0.01, help="of tensors with two or more dimensions")
    add("--max-grad-norm", type=float, default=1.0)
    add("--batch", type=int, default=8, help="forget rows a step; as many retain rows")
    add("--micro-batch", type=int, help="rows a forward pass (default: --batch)")
    add("--steps", type=int, default=20)
    add("--precision", choices=["f32", "bf16"], default="f32", help="bf16: autocast over f32 weights")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--file-order", action="store_true", help="row i of forget with row i of retain, wrapping")
    add("--save", metavar="DIR", help="write the unlearned model")
    args = parser.parse_args()
    args.micro_batch = args.micro_batch or args.batch
    return args


def unescape(text):
    return text.replace("\\n", "\n")


def read_rows(path, tokenizer, args):
    """[(ids, labels)]: prompt and answer tokenised as one text; a token is scored if its characters end behind the prompt."""
    rows = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            fields = json.loads(line)
            prompt = args.prompt.replace("{question}", fields["question"])
            text = prompt + args.answer.replace("{answer}", fields["answer"])
            encoded = tokenizer(text, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            labels = [i if end > len(prompt) else IGNORE for i, (_, end) in zip(ids, encoded["offset_mapping"])]
            if ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text themselves
                ids, labels = ids[:-1], labels[:-1]
            ids, labels = ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]
            rows.append((ids[:args.max_length], labels[:args.max_length]))
    return rows


def batches(forget, retain, args):
    """Yields --steps pairs of row lists."""
    order, position = [], 0
    for _ in range(args.steps):
        chosen = []
        while len(chosen) < args.batch:
            if position == len(order):
                order = list(range(len(forget))) if args.file_order else torch.randperm(len(forget)).tolist()
                position = 0
            chosen.append(order[position])
            position += 1
        partners = chosen if args.file_order else torch.randint(len(retain), (args.batch,)).tolist()
        yield [forget[i] for i in chosen], [retain[i % len(retain)] for i in partners]


def make_optimizer(model, args):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(groups, lr=args.lr, fused=True), "AdamW fused"
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=args.lr), "AdamW"


def run_stream(model, reference, rows, pad, term, weight, args, counts):
    """Forward and backward of one stream, in micro-batches; returns its loss. Denominators are the whole step's."""
    scored = sum(label != IGNORE for _, labels in rows for label in labels[1:])
    tokens = sum(len(ids) for ids, _ in rows)
    total = 0.0
    for start in range(0, len(rows), args.micro_batch):
        ids, labels, mask = pad_batch(rows[start:start + args.micro_batch], pad)
        counts["real"] += int(mask.sum())
        counts["padded"] += mask.numel()
        logits = forward(model, ids, mask, args)
        if term == "ga":
            loss = token_logprobs(logits, labels).sum() / scored
        elif term == "nll":
            loss = -token_logprobs(logits, labels).sum() / scored
        elif term == "npo":
            with torch.no_grad():
                reference_logp = token_logprobs(forward(reference, ids, mask, args), labels).sum(-1)
            ratio = token_logprobs(logits, labels).sum(-1) - reference_logp
            loss = -2 / args.beta * F.logsigmoid(-args.beta * ratio).sum() / len(rows)
        else:
            with torch.no_grad():
                target = F.log_softmax(forward(reference, ids, mask, args), -1)
            divergence = F.kl_div(F.log_softmax(logits, -1), target, log_target=True, reduction="none").sum(-1)
            loss = (divergence * mask).sum() / tokens
        (weight * loss).backward()
        total += loss.item()
    return total


def pad_batch(rows, pad):
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids, labels, mask


def forward(model, ids, mask, args):
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        return model(input_ids=ids, attention_mask=mask).logits.float()


def token_logprobs(logits, labels):
    """[rows, width - 1] log-probabilities of the labels, 0 where nothing is scored."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none")
    return -flat.view(labels.shape[0], -1)


def peak_rss_mib():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
