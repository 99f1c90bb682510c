"""The model card of an adapter: what it was made from, how much of the change of weights it keeps, how to load it."""

from collections import defaultdict

from eggroll_llm.models.adapter.kept import Kept
from eggroll_llm.models.card import base_on_hub, described
from eggroll_llm.models.markdown import code
from eggroll_llm.models.targets import TARGET_MODULES, block_of

_MOST_NAMES = 20


def adapter_card(kept: Kept, *, base_model: str, identity: str, trained: str) -> str:
    """Return README.md of an adapter.

    Args:
        kept: what the adapter keeps.
        base_model: the model that it belongs to, as a run names it.
        identity: of that model, 16 hex digits.
        trained: the model whose change it has, in a few words.
    """
    from huggingface_hub import ModelCardData

    # Not what the base was made from: the adapter would be added to other weights than those that it belongs to.
    on_hub = base_model if base_on_hub(base_model) == base_model else None
    metadata = ModelCardData(
        base_model=on_hub, library_name="peft", pipeline_tag="text-generation", tags=["lora", "eggroll-llm"]
    ).to_yaml()
    parts = [
        f"---\n{metadata}\n---",
        f"# LoRA adapter of rank {kept.rank}",
        f"""\
The change of weights that fine-tuning made, approximated by eggroll-llm: of every linear layer the truncated singular
value decomposition of W_trained - W_base.

- Base model: {described(base_model)}. Identity {code(identity)}.
- Trained model: {code(trained)}.
- Kept: {kept.share:.1%} of the change (its squared Frobenius norm); relative error {kept.error:.3f}.

The adapter itself was not evaluated: accuracies of the run are those of its full model.""",
        *([f"**Warning:** {kept.warning}."] if kept.warning else []),
        "## Relative error by layer",
        "Frobenius norm of what is lost, divided by that of the change; a dash where nothing changed.",
        _table(kept),
        *(["## Not in the adapter", _left_out(kept)] if kept.left_out else []),
        "## How to load it",
        _loading(on_hub or "BASE", kept.rank),
        "## Licence",
        "An adapter has the licence of its base model; see its page.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(kept: Kept) -> str:
    """Return a row for each block, a column for each kind of layer."""
    rows: dict[int, dict[str, str]] = defaultdict(dict)
    for layer in kept.layers:
        rows[block_of(layer.name)][layer.module] = f"{layer.error:.3f}" if layer.change else "-"
    columns = [name for name in TARGET_MODULES if any(name in row for row in rows.values())]
    lines = [["block", *columns], ["---"] * (1 + len(columns))]
    lines += [[str(block), *(row.get(name, "") for name in columns)] for block, row in sorted(rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _left_out(kept: Kept) -> str:
    names = list(kept.left_out)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"An adapter changes linear layers of blocks only. {kept.share_left_out:.1%} of the change is in "
        f"{', '.join(map(code, names[:_MOST_NAMES]))}{more}."
    )


def _loading(base: str, rank: int) -> str:
    # vLLM takes only some numbers for the largest rank.
    most = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    return f"""\
PATH is this directory, or the name of the repository that it was pushed to; {base} is the base model. In PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}", dtype="auto"), "PATH")
```

In vLLM: `vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules trained=PATH`. In eggroll-llm:
`eggroll-llm eval PATH --task gsm8k`, which merges it first."""
