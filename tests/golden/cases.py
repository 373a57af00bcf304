"""The tiny models: what config.json says, and the wrong readings of it that the numbers must expose.

`config`  arguments of the family's configuration class; config.json is what transformers writes for them.
`published`  instead of `config`: config.json word for word in the style of models published in 2023 and 2024
          (`rope_theta`, `rope_scaling`, `partial_rotary_factor` and `torch_dtype` at the top level).
`same_as` the logits must equal those of that case.
`wrong`   edits of config.json, dotted keys, DELETE for "the reader overlooks it"; the generator fails unless each edit moves
          some logit by more than `generate.MUST_MOVE`.
`step`    also write gradients of one unlearning step.

Sizes differ from each other on purpose, the vocabularies are odd, and the norms' epsilons are large enough to be seen.
"""

DELETE = object()

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # wavelengths 6.3 | 13.7 29.7 | 64 ...: kept | blended | stretched
SHORT = [1.0, 1.1, 1.3, 1.5, 2.0, 2.5]
LONG = [1.0, 1.5, 3.0, 6.0, 9.0, 12.0]
NO_ROPE_SCALING = {"rope_parameters.rope_type": "default"}


def sizes(hidden, intermediate, vocab, kv_heads=2, positions=128, **more):
    return {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": vocab, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **more}


def rope(theta, **more):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **more}}


def published(model_type, architecture, base, **more):
    """A config.json of 2023 or 2024, with the keys that such files carry and a reader may ignore."""
    base = {k: v for k, v in base.items() if k != "pad_token_id"}
    return {"architectures": [architecture], "attention_dropout": 0.0, **base, "hidden_act": "silu",
            "initializer_range": 0.02, "model_type": model_type, "transformers_version": "4.45.0", "use_cache": True, **more}


CASES = {
    # llama: grouped queries, untied head
    "llama_gqa": {
        "family": "llama", "step": True,
        "config": sizes(32, 72, 97, rms_norm_eps=1e-2, **rope(5000.0)),
        "wrong": [{"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    },
    # SmolLM2-like: head tied to the embedding
    "llama_tied": {
        "family": "llama", "step": True,
        "config": sizes(32, 72, 101, rms_norm_eps=3e-2, tie_word_embeddings=True, **rope(700.0)),
        "wrong": [{"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-5}, {"tie_word_embeddings": False}],
    },
    # head_dim is not hidden / heads
    "llama_head_dim": {
        "family": "llama",
        "config": sizes(48, 88, 97, head_dim=20, rms_norm_eps=2e-2, **rope(20000.0)),
        "wrong": [{"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    },
    "llama_llama3_rope": {
        "family": "llama",
        "config": sizes(64, 96, 101, positions=256, rms_norm_eps=1e-2, **rope(500.0, **LLAMA3)),
        "wrong": [NO_ROPE_SCALING, {"rope_parameters.rope_theta": 500000.0},
                  {"rope_parameters.low_freq_factor": 2.0}, {"rope_parameters.high_freq_factor": 3.0},
                  {"rope_parameters.original_max_position_embeddings": 64}],
    },
    "llama_llama3_rope_2024": {
        "family": "llama", "same_as": "llama_llama3_rope",
        "published": published(
            "llama", "LlamaForCausalLM", sizes(64, 96, 101, positions=256), attention_bias=False, mlp_bias=False,
            head_dim=16, pretraining_tp=1, rms_norm_eps=1e-2, rope_scaling=LLAMA3, rope_theta=500.0,
            tie_word_embeddings=False, torch_dtype="bfloat16"),
        "wrong": [{"rope_scaling": DELETE}, {"rope_theta": DELETE}],
    },
    "llama_linear_rope": {
        "family": "llama",
        "config": sizes(48, 80, 97, rms_norm_eps=5e-3, **rope(3000.0, rope_type="linear", factor=2.5)),
        "wrong": [NO_ROPE_SCALING, {"rope_parameters.rope_theta": 10000.0}],
    },
    # the scaling's name under the still older key `type`
    "llama_linear_rope_2023": {
        "family": "llama", "same_as": "llama_linear_rope",
        "published": published(
            "llama", "LlamaForCausalLM", sizes(48, 80, 97), pretraining_tp=1, rms_norm_eps=5e-3,
            rope_scaling={"type": "linear", "factor": 2.5}, rope_theta=3000.0, tie_word_embeddings=False,
            torch_dtype="float16"),
        "wrong": [{"rope_scaling": DELETE}],
    },
    # nothing but what the first llama files said: theta, key/value heads, head_dim, tying and epsilon by default
    "llama_2023": {
        "family": "llama",
        "published": {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 72, "max_position_embeddings": 64,
            "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 3, "pad_token_id": 0,
            "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 97},
        "wrong": [{"rope_theta": 500000.0}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-2}],
    },
    "mistral_window": {
        "family": "mistral",
        "config": sizes(48, 88, 101, head_dim=16, sliding_window=7, rms_norm_eps=1e-2, **rope(2000.0)),
        "wrong": [{"sliding_window": None}, {"sliding_window": 6}, {"sliding_window": 8},
                  {"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    },
    "mistral_full": {
        "family": "mistral",
        "config": sizes(32, 56, 97, sliding_window=None, rms_norm_eps=2e-2, **rope(1000000.0)),
        "wrong": [{"sliding_window": 16}, {"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    },
    # biases on q, k and v, none on o
    "qwen2_tied": {
        "family": "qwen2",
        "config": sizes(32, 88, 101, tie_word_embeddings=True, rms_norm_eps=2e-2, **rope(1000000.0)),
        "wrong": [{"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}, {"tie_word_embeddings": False}],
    },
    # the first layer sees everything, the others only 6 tokens
    "qwen2_window": {
        "family": "qwen2",
        "config": sizes(48, 80, 97, use_sliding_window=True, sliding_window=6, max_window_layers=1, rms_norm_eps=1e-2,
                        **rope(4000.0)),
        "wrong": [{"layer_types": ["full_attention"] * 3}, {"layer_types": ["sliding_attention"] * 3},
                  {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, {"sliding_window": 7}],
    },
    # without `layer_types`, so that `max_window_layers` decides
    "qwen2_window_2024": {
        "family": "qwen2", "same_as": "qwen2_window",
        "published": published(
            "qwen2", "Qwen2ForCausalLM", sizes(48, 80, 97), max_window_layers=1, rms_norm_eps=1e-2, rope_theta=4000.0,
            sliding_window=6, tie_word_embeddings=False, torch_dtype="bfloat16", use_sliding_window=True),
        "wrong": [{"use_sliding_window": False}, {"max_window_layers": 2}, {"max_window_layers": 0}],
    },
    # as Qwen2.5 was published: a window is written down and not used
    "qwen2_2024": {
        "family": "qwen2",
        "published": published(
            "qwen2", "Qwen2ForCausalLM", sizes(32, 72, 101), max_window_layers=1, rms_norm_eps=1e-2, rope_theta=30000.0,
            sliding_window=5, tie_word_embeddings=False, torch_dtype="bfloat16", use_mrope=False,
            use_sliding_window=False),
        "wrong": [{"use_sliding_window": True}, {"rope_theta": DELETE}, {"rms_norm_eps": 1e-6}],
    },
    # norms on the heads of q and k; head_dim is not hidden / heads
    "qwen3": {
        "family": "qwen3", "step": True,
        "config": sizes(32, 72, 97, head_dim=12, rms_norm_eps=2e-2, **rope(8000.0)),
        "wrong": [{"rope_parameters.rope_theta": 1000000.0}, {"rms_norm_eps": 1e-6}],
    },
    # q, k, v in one matrix, gate and up in one matrix
    "phi3": {
        "family": "phi3",
        "config": sizes(48, 88, 97, rms_norm_eps=1e-2, **rope(6000.0)),
        "wrong": [{"rope_parameters.rope_theta": 10000.0}, {"rms_norm_eps": 1e-5}],
    },
    # Phi-4-mini: 12 of 16 dimensions of a head turn, tied head
    "phi3_partial_rotary": {
        "family": "phi3",
        "config": sizes(64, 104, 101, rms_norm_eps=2e-2, tie_word_embeddings=True,
                        **rope(9000.0, partial_rotary_factor=0.75)),
        "wrong": [{"rope_parameters.partial_rotary_factor": 1.0}, {"rope_parameters.partial_rotary_factor": 0.5},
                  {"tie_word_embeddings": False}],
    },
    # fits in 32 positions: short factors, and attention factor sqrt(1 + ln(128 / 32) / ln 32) on cos and sin
    "phi3_longrope": {
        "family": "phi3",
        "config": sizes(48, 88, 97, original_max_position_embeddings=32, rms_norm_eps=1e-2,
                        **rope(6000.0, rope_type="longrope", short_factor=SHORT, long_factor=LONG)),
        "wrong": [NO_ROPE_SCALING, {"rope_parameters.short_factor": LONG}, {"rope_parameters.attention_factor": 1.0},
                  {"original_max_position_embeddings": 16}],
    },
    # Phi-4-mini as published: longrope on 12 of 16 dimensions, everything at the top level
    "phi3_longrope_2024": {
        "family": "phi3",
        "published": published(
            "phi3", "Phi3ForCausalLM", sizes(64, 104, 101), attention_bias=False, embd_pdrop=0.0, full_attn_mod=1,
            interpolate_factor=1, lm_head_bias=False, mlp_bias=False, original_max_position_embeddings=32,
            pad_token_id=0, partial_rotary_factor=0.75, resid_pdrop=0.0, rms_norm_eps=1e-2,
            rope_scaling={"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, rope_theta=9000.0,
            sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16"),
        "wrong": [{"rope_theta": 500.0}, {"rope_scaling.attention_factor": 1.0}, {"max_position_embeddings": 64}],
    },
    "phi3_window": {
        "family": "phi3",
        "config": sizes(32, 56, 101, sliding_window=5, rms_norm_eps=5e-3, **rope(1500.0)),
        "wrong": [{"sliding_window": None}, {"sliding_window": 4}, {"sliding_window": 6}],
    },
}
