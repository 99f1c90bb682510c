"""What the passes of TRL share and save: one over a prompt for its completions, and bfloat16 products and weights."""

import contextlib
from typing import Any

import torch
from torch.nn.functional import pad
from trl.kernels import chunked_logprob

from eggroll_llm.es.matmul import float32_products


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to a float32 matrix in place, as TRL does, without rounding the product first.

    Of bfloat16 matrices on CPU, TRL makes float32 ones for it. Their products can still be had from bfloat16
    instructions, which add up in float32 too, in half the time.
    """
    with float32_products("medium") if a.dtype == b.dtype == torch.bfloat16 else contextlib.nullcontext():
        _trl_add_product(total, a, b)


_trl_add_product, chunked_logprob._addmm_fp32 = chunked_logprob._addmm_fp32, add_product


def narrow_beneath_adapters(model: Any) -> None:
    """Keep the frozen weights that have an adapter in bfloat16, where they are bfloat16 numbers already.

    Autocast multiplies by these same numbers, but would convert them anew in every pass, as they need no gradient, and
    keep each pass's copy until its gradients are computed.
    """
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            for weight in layer.get_base_layer().parameters():
                narrow = weight.detach().bfloat16()
                if torch.equal(narrow.to(weight.dtype), weight):
                    weight.data = narrow


def side_by_side(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the completions of a step with those of a prompt in a row, short before long."""
    _, prompt = torch.unique(batch["prompt_ids"], dim=0, return_inverse=True)
    length = batch["completion_mask"].sum(dim=1)
    order = (prompt * (1 + length.max()) + length).argsort(stable=True)
    return {key: value[order] if torch.is_tensor(value) and value.ndim else value for key, value in batch.items()}


def score_completions(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities and entropies (B, length) of the last `length` tokens, 0 where there is padding.

    A prompt's keys and values are computed once and selected for each of its completions; gradients add up on the way
    back. The last token of the prompt goes with the completion, as it predicts the first one. Columns that are padding
    in every row are left out.
    """
    used = mask.any(dim=0).nonzero()
    first, padding = int(used[0]), min(mask.size(1) - 1 - int(used[-1]), length - 1)  # one column stays, whatever it is
    ids, mask = (tensor[:, first : tensor.size(1) - padding] for tensor in (ids, mask))
    head = ids.size(1) - (length - padding) - 1
    cache = None
    if head:  # else all prompts are of one token
        prompts, which = torch.unique(torch.stack([ids, mask], dim=-1)[:, :head], dim=0, return_inverse=True)
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        passed = inner.base_model(input_ids=prompts[..., 0], attention_mask=prompts[..., 1], use_cache=True)
        cache = passed.past_key_values
        cache.batch_select_indices(which)
    tail = ids[:, head:]
    labels = tail.masked_fill(mask[:, head:] == 0, -100)
    out = model(input_ids=tail, attention_mask=mask, past_key_values=cache, labels=labels, fused_lm_head=True)
    entropy = None if out.entropy is None else pad(out.entropy, (0, padding))
    return pad(out.log_probs, (0, padding)), entropy
