"""Golden continuations: what transformers' `generate` writes after a few prompts, greedily, each prompt alone, in float64.

`generate.py` writes generation.json with it, and a config.json for each case in generation/. Four key/value heads, so that four
tensor-parallel ranks have one each; the seed is one with which some continuations end with the end-of-text token and others do not.
"""

import torch

NEW = 24
EOS = 2
PROMPTS = [3, 11, 1, 6, 17, 9]  # tokens
MARGIN = 1e-3  # least difference of the two largest logits at every step: float32 must not decide otherwise


def sizes(vocab, **more):
    return {"hidden_size": 48, "intermediate_size": 72, "vocab_size": vocab, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": EOS,
            "pad_token_id": None, "rms_norm_eps": 1e-2, **more}


# {name: (seed, family, arguments)}; the seeds are the first with which `generation`'s demands hold
CASES = {
    "llama": (19, "llama", sizes(97, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})),
    # every layer sees 6 tokens: prompts and continuations are longer
    "mistral_window": (2, "mistral", sizes(101, head_dim=8, sliding_window=6,
                                        rope_parameters={"rope_theta": 2000.0, "rope_type": "default"})),
    # norms on the heads of q and k, head_dim is not hidden / heads
    "qwen3": (5, "qwen3", sizes(97, head_dim=12, rope_parameters={"rope_theta": 8000.0, "rope_type": "default"})),
}


def generation(build, as_transformers_writes, write_json, token_ids, out):
    """{case: {seed, new_tokens, prompts: [{prompt, continuation, ended}], least_margin}}"""
    result = {"max_new_tokens": NEW, "eos": EOS, "cases": {}}
    for name, (seed, family, arguments) in CASES.items():
        folder = out / "generation" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", as_transformers_writes(family, arguments))
        written, margin = continuations(build(folder, seed=seed), token_ids)
        ends = sum(one["ended"] == "eos" for one in written)
        assert 2 <= ends <= 4 and margin > MARGIN and varied(written), f"{name}: another seed is needed"
        result["cases"][name] = {"seed": seed, "least_margin": margin, "prompts": written}
        print(f"generation {name:16} seed {seed:3}  {ends} of {len(written)} end with eos  least margin {margin:.1e}")
    return result


def varied(written):
    """Not mostly loops of a few tokens, which a wrong position would not disturb."""
    distinct = sum(len(set(one["continuation"])) for one in written)
    return distinct > 0.6 * sum(len(one["continuation"]) for one in written)


def continuations(model, token_ids):
    written, margin = [], float("inf")
    for salt, length in enumerate(PROMPTS):
        prompt = token_ids(length, model.config.vocab_size, salt=3 + salt)
        # no end-of-text token inside a prompt: it would be read as one more token, but confuses readers of this file
        prompt = torch.where(prompt == EOS, EOS + 1, prompt)
        # without a mask transformers takes every token 0 of a prompt for padding
        out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=NEW, do_sample=False,
                             num_beams=1, eos_token_id=EOS, pad_token_id=0, use_cache=True, return_dict_in_generate=True,
                             output_logits=True)
        tokens = out.sequences[0, length:].tolist()
        for logits in out.logits:
            top = logits[0].topk(2).values
            margin = min(margin, (top[0] - top[1]).item())
        ended = "eos" if tokens[-1] == EOS else "length"
        assert ended == "eos" or len(tokens) == NEW
        written.append({"prompt": prompt.tolist(), "continuation": tokens[:-1] if ended == "eos" else tokens, "ended": ended})
    return written, margin
