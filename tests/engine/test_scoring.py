"""Attention that the forward pass over a tree of tokens does not compute is refused, and not computed wrongly."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.v1.attention.backend import AttentionType

from eggroll_llm.engine.vllm.scoring import Scorer
from eggroll_llm.errors import ModelError

pytestmark = pytest.mark.vllm


def scorer(kind: type[torch.nn.Module] = Attention, impl: dict[str, Any] | None = None, **changes: Any) -> Scorer:
    """A scorer of a model with one attention layer, causal but for the changes."""
    layer: Any = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    plain = {"alibi_slopes": None, "logits_soft_cap": 0, "sinks": None}
    layer.impl = SimpleNamespace(**plain | (impl or {}))
    known = {"attn_type": AttentionType.DECODER, "kv_sharing_target_layer_name": None, "query_quant": None}
    for name, value in (known | changes).items():
        setattr(layer, name, value)
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"attn": layer}))
    return Scorer(torch.nn.Module(), config)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"kind": ChunkedLocalAttention}, "ChunkedLocalAttention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "Attention"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "keys of another layer"),
        ({"query_quant": torch.nn.Identity()}, "quantized queries"),
        ({"impl": {"sinks": torch.zeros(4)}}, "sinks"),
        ({"impl": {"alibi_slopes": torch.ones(4)}}, "alibi_slopes"),
        ({"impl": {"logits_soft_cap": 50.0}}, "logits_soft_cap"),
    ],
)
def test_other_attention_is_refused(changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(ModelError, match=rf'\({kind}\) cannot score completions: use es.fitness_from = "rewards"'):
        scorer(**changes).check()
    with pytest.raises(ModelError, match=r"cannot score completions$"):  # a caller says what to do instead
        scorer(**changes).logprobs(None, 1, 1.0)  # type: ignore[arg-type]
    scorer().check()
