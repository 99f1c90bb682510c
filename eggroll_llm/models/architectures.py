"""Which architectures can be trained: those that the tests compare with transformers, and what is known not to work.

Read from config.json and the names of the tensors alone, so that a refusal comes before anything heavy is imported.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.system.hardware import serves_on_cpu
from eggroll_llm.system.terminal import inert

log = logging.getLogger(__name__)

# vLLM's Transformers backend serves these: activations are [1, T, I], and it changes the class in transformers.
BY_TRANSFORMERS = ("SmolLM3ForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")

MIXTURES = ("Qwen3MoeForCausalLM", "OlmoeForCausalLM")
"""Mixtures of experts, of which attention is trained: experts and routers stay as the checkpoint has them."""

# Of each, with tiny random weights in vLLM on a CPU (tests/engine/test_engine.py): every member's logits are those that
# transformers computes with W + sigma E, an updated model is the one exported, and weights from outside are served,
# except where experts are among them.
TESTED = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",  # sliding windows
    "GraniteForCausalLM",  # multipliers of embeddings, attention, residuals and logits
    "Gemma3ForCausalLM",  # norms that multiply by 1 + weight, scaled embeddings, another window in every layer
    "Phi3ForCausalLM",  # q, k, v and gate, up are one parameter each, and have one noise
    *BY_TRANSFORMERS,  # layers without rotary embedding; norms behind the layers and over all heads
    *MIXTURES,
)

NOT_CUT = ("Phi3ForCausalLM", *BY_TRANSFORMERS, *MIXTURES)
"""What tensor parallelism does not serve: a rank has rows here and there of a parameter, or the layers are others."""
PADDED_VOCABULARY = 64
"""vLLM pads a vocabulary to a multiple of this."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention on a CPU computes."""

_HEAD_SIZE_OF_CLASS = {"Qwen3ForCausalLM": 128, "Gemma3ForCausalLM": 256}
"""Where transformers does not take it from the hidden size when config.json has no head_dim."""

_NOT_BY_GRPO = dict.fromkeys(BY_TRANSFORMERS, "which vLLM patches in the process of the trainer") | dict.fromkeys(
    MIXTURES, "whose experts the engine cannot replace"
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_USE_ONE = "use one such as LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"


def architecture(config: Mapping[str, Any]) -> str:
    """Return the first architecture that a config.json names; empty when it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def check_architecture(config: Mapping[str, Any], where: Path) -> str:
    """Return the architecture of the config.json at `where`.

    Raises ModelError where it is known that vLLM cannot serve it with members here, however much a user insists.
    """
    name = architecture(config)
    if not name.endswith("ForCausalLM"):
        raise ModelError(
            f"{where}: architecture {name!r} cannot be trained here: it must be a text-only one called ...ForCausalLM, "
            f"with linear layers named like Llama's; {_USE_ONE}"
        )
    size = head_size(config)
    if size and size not in CPU_HEAD_SIZES and serves_on_cpu():
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise ModelError(
            f"{where}: attention heads of size {size}, but vLLM on a CPU supports only {sizes}: use another model, or "
            "a GPU"
        )
    return name


def is_expert(tensor: str) -> bool:
    """Return whether a tensor of this name belongs to one expert of a mixture."""
    return ".experts." in tensor


def experts_used(config: Mapping[str, Any]) -> float:
    """Return the share of its experts that each token of a mixture passes through; 1 when config.json does not say."""
    every = max((_number(config, key) for key in _EXPERTS), default=0)
    return min(1.0, _number(config, "num_experts_per_tok") / every) if every else 1.0


def check_dense(config: Mapping[str, Any], tensors: Iterable[str], where: Path) -> None:
    """Raise ModelError for an unknown mixture of experts, told by its config.json or by the names of its tensors."""
    if architecture(config) in MIXTURES:
        return
    found = [f"{key} = {config[key]}" for key in _EXPERTS if type(config.get(key)) is int and config[key] > 1]
    found += [f"tensor {inert(tensor)}" for tensor in tensors if is_expert(tensor)]
    if found:
        raise ModelError(
            f"{where}: {found[0]}: a mixture of experts, whose experts cannot be perturbed or updated here: {_USE_ONE}"
        )


def head_size(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head that a config.json means; 0 when it does not say."""
    hidden, heads, size = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if type(size) is int and size > 0:
        return size
    if default := _HEAD_SIZE_OF_CLASS.get(architecture(config)):
        return default
    return hidden // heads if type(hidden) is int and type(heads) is int and hidden > 0 and heads > 0 else 0


def check_method(name: str, method: str, where: Path) -> None:
    """Raise ConfigError where a method cannot train an architecture that the engine serves."""
    if method == "grpo" and name in _NOT_BY_GRPO:
        others = ", ".join(each for each in TESTED if each not in _NOT_BY_GRPO)
        raise ConfigError(
            f'method = "grpo": {where} has architecture {name}, {_NOT_BY_GRPO[name]}: set method = "es", or use a '
            f"model of one of {others}"
        )


def check_quantization(config: Mapping[str, Any], quantization: str, where: Path) -> None:
    """Raise ConfigError where the model of the config.json at `where` is not served in a `quantization`."""
    if quantization != "none" and architecture(config) in MIXTURES:
        raise ConfigError(
            f'engine.quantization = "{quantization}": {where} is a mixture of experts, which is not served in 8 bits '
            'here: set it to "none"'
        )


def check_tensor_parallel(config: Mapping[str, Any], ranks: int, where: Path) -> None:
    """Raise ConfigError where the layers of the config.json at `where` cannot be cut for so many devices."""
    name, key = architecture(config), f"engine.tensor_parallel = {ranks}"
    if ranks > 1 and name in NOT_CUT:
        others = ", ".join(each for each in TESTED if each not in NOT_CUT)
        raise ConfigError(
            f"{key}: {where} has architecture {name}, whose layers cannot be cut here: set it to 1, or use a model of "
            f"one of {others}"
        )
    heads = _number(config, "num_attention_heads")
    shared = _number(config, "num_key_value_heads") or heads
    inside, vocabulary = _number(config, "intermediate_size"), _number(config, "vocab_size")

    def fits(ranks: int) -> bool:
        rows = -(-vocabulary // PADDED_VOCABULARY) * PADDED_VOCABULARY
        cut = not any(size % ranks for size in (heads, inside, rows))
        return cut and (shared % ranks == 0 or ranks % max(1, shared) == 0)

    if not fits(ranks):
        fitting = max(number for number in range(1, ranks) if fits(number))
        raise ConfigError(
            f"{key}: {where} has {heads} attention heads, {shared} of them with keys and values of their own, "
            f"{inside} intermediate features and {vocabulary} tokens, which so many devices cannot share equally: set "
            f"it to {fitting}"
        )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int else 0


def check_tested(name: str, where: Path, *, allow_untested: bool) -> None:
    """Raise ModelError for an architecture that the tests do not cover; log a warning instead when it is allowed."""
    if name in TESTED:
        return
    shown = inert(name)
    if not allow_untested:
        raise ModelError(
            f"{where}: architecture {shown} is not one of those that are tested ({', '.join(TESTED)}): use one of "
            f"them, or set engine.allow_untested_architecture = true to try it"
        )
    log.warning("architecture %s is not tested: members and exported weights may be wrong", shown)
