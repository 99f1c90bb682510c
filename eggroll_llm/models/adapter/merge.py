"""An adapter and its base -> an ordinary model in the cache, merged once: W' = W + s B A, computed in float32.

The merged weights are rounded once, to the dtype of the base. The tokenizer is that of the adapter where it has one,
for that is what it was trained with.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from eggroll_llm.errors import ModelError
from eggroll_llm.models.adapter.peft_format import CONFIG, WEIGHTS, Adapter, check_fits, key_of, read_adapter
from eggroll_llm.models.expanded import made_once, place_in_cache
from eggroll_llm.models.export import export_model
from eggroll_llm.models.files import model_identity, tensor_shapes, weight_files
from eggroll_llm.records.weights import recorded_origin
from eggroll_llm.system import installed
from eggroll_llm.system.files import sha256_of

log = logging.getLogger(__name__)

MERGE = 1  # counts changes in what `_merge` writes, so that an old merge is not used
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


def merged_adapter(directory: Path, base: str, resolve: Callable[[str], Path]) -> Path:
    """Return the model of an adapter merged into its base, merged now if it never was.

    `resolve` turns the name `base` into a model's directory. Raises ModelError, also when the two do not fit.
    """
    adapter = read_adapter(directory)
    try:
        base_dir = resolve(base)
    except ModelError as error:
        raise ModelError(f"{directory}, its base: {error}, or name the base after an @: {directory}@BASE") from error
    check_fits(adapter, tensor_shapes(base_dir), base_dir)
    identity = model_identity(base_dir)
    _, made_on = recorded_origin(directory)
    if made_on and made_on != identity:
        log.warning("%s was made for base model %s, and %s is %s", directory, made_on, base_dir, identity)
    digest = hashlib.sha256(identity.encode())
    texts = sorted({path for pattern in ("*.json", *_TOKENIZER) for path in base_dir.glob(pattern)})
    for file in [*texts, directory / CONFIG, directory / WEIGHTS, *_own_tokenizer(directory)]:
        digest.update(f"\n{file.name} {sha256_of(file)}".encode())
    installed.check(f"merging {directory}", "torch", "safetensors")
    return made_once(
        place_in_cache(directory.name, digest.hexdigest(), f"adapter-{MERGE}"),
        f"{directory}: the model that it is merged into",
        lambda scratch: _merge(adapter, base_dir, scratch),
    )


def _merge(adapter: Adapter, base_dir: Path, destination: Path) -> None:
    from safetensors import safe_open
    from torch import float32

    log.info("merging %s, once, into %s", adapter.path, base_dir)
    merged = {}
    with safe_open(adapter.path / WEIGHTS, framework="pt") as factors:
        for file in weight_files(base_dir):
            with safe_open(file, framework="pt") as base:
                for name in adapter.shapes.keys() & set(base.keys()):
                    W = base.get_tensor(name)
                    B, A = (factors.get_tensor(key_of(name, factor)).to(float32) for factor in "BA")
                    merged[name] = W.to(float32).addmm_(B, A, alpha=adapter.scale).to(W.dtype)
                    if not merged[name].isfinite().all():
                        raise ModelError(f"{adapter.path}: {name} is not finite once merged: use another adapter")
    export_model(base_dir, destination, merged, next(iter(merged.values())).dtype)
    for path in _own_tokenizer(adapter.path):
        shutil.copyfile(path, destination / path.name)


def _own_tokenizer(directory: Path) -> list[Path]:
    """Return the files of a tokenizer that lies with an adapter; none where it is not complete."""
    files = [directory / name for name in _TOKENIZER if (directory / name).is_file()]
    return files if {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in files} else []
