"""Golden scores of the membership attacks that need more than one pass over a text, from torch's autograd in float64.

`generate.py` writes membership.json with it. gradnorm is OpenUnlearning's (src/evals/metrics/mia/gradnorm.py, p = 2): the mean over
`model.parameters()` of the norm of the gradient of the mean loss, the token that ends the text left out. recall is minus
log p(answer | shots, prompt) / log p(answer | prompt) (Xie et al., arXiv 2406.15968), every text with its first token, which stands once.
"""

import torch

CASES = ["llama_gqa", "llama_tied", "qwen3", "phi3"]
TEXTS = [(13, 5, False), (22, 9, True), (9, 1, False)]  # (tokens, prompt tokens, whether the last token ends the text)
SHOTS = [11, 8]  # tokens


def membership(build, token_ids, out):
    """{case: {shots: [ids], texts: [{ids, prompt, ended, gradnorm, recall}]}}"""
    result = {}
    for case in CASES:
        model = build(out / case, seed=0)
        vocab = model.config.vocab_size
        ids = lambda count, salt: torch.cat([torch.tensor([1]), token_ids(count - 1, vocab, salt)])
        shots = [ids(count, 40 + i) for i, count in enumerate(SHOTS)]
        texts = []
        for i, (count, prompt, ended) in enumerate(TEXTS):
            text = ids(count, 20 + i)
            prefix = torch.cat([shots[0][:1], *(shot[1:] for shot in shots)])
            own = answer(model, text, prompt, ended)
            behind = answer(model, torch.cat([prefix, text[1:]]), len(prefix) - 1 + prompt, ended)
            texts.append({"ids": text.tolist(), "prompt": prompt, "ended": ended, "gradnorm": gradnorm(model, own),
                          "recall": -(behind.sum() / own.sum()).item()})
        result[case] = {"shots": [shot.tolist() for shot in shots], "texts": texts}
    return result


def answer(model, ids, prompt, ended):
    """Log-probabilities of the tokens from `prompt` on."""
    logp = torch.log_softmax(model(ids[None], use_cache=False).logits[0], -1)[prompt - 1:-1].gather(1, ids[prompt:, None])[:, 0]
    return logp[:-1] if ended else logp


def gradnorm(model, logp):
    model.zero_grad()
    (-logp.mean()).backward(retain_graph=True)
    return torch.stack([parameter.grad.norm(p=2) for parameter in model.parameters()]).mean().item()
