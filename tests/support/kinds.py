"""The tiny models of the tests: configuration class of transformers, and what sets the architecture apart."""

from typing import Any

# Windows are shorter than the prompts of the tests, and multipliers are none that cancel out.
TWO_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),  # biases of q, k and v
    "qwen3": ("Qwen3Config", {}),  # norms of the heads of q and k
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "granite": (
        "GraniteConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True, "query_pre_attn_scalar": 24, **TWO_WINDOWS}),
    "phi3": ("Phi3Config", {"sliding_window": 16}),  # q, k, v and gate, up are one parameter each
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True, "no_rope_layers": [1, 0], "attention_bias": True}),
    "olmo2": ("Olmo2Config", {}),  # norms behind the layers, and of all of q and k
    "olmo3": ("Olmo3Config", TWO_WINDOWS),
    "qwen3moe": (  # a block with experts, and before it one without
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
}
MIXTURES = ("qwen3moe", "olmoe")
"""Kinds with experts, which ES does not train, and GRPO not at all."""
