"""Rebuilds the weights of any step from the base model and the journal: no engine, no sampling, no rewards.

    W_n = W_0 + updates 1 ... n,      each regenerated from (seed, step) and the fitness in the journal

The arithmetic is that of training, so that on the same machine the bits are those of the checkpoint of that step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import JournalError
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.kernels.fold import fold_for
from eggroll_llm.kernels.noise import served_factors_of
from eggroll_llm.models.export import export_model
from eggroll_llm.models.files import model_identity, weight_files
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.records.journal import JournalContents, read_journal
from eggroll_llm.records.updates import check_weights, recorded_update
from eggroll_llm.system.hardware import resolve_dtype, serves_on_cpu
from eggroll_llm.training.plan import plan_of


def replay(
    config: RunConfig,
    base_dir: Path,
    journal_path: Path,
    step: int,
    directory: Path,
) -> str:
    """Write the model after `step` updates into `directory`; return the checksum of its trained weights.

    Raises JournalError when the journal is damaged, does not reach that far, belongs to another base model, or records
    a checksum that the rebuilt weights do not have.
    """
    journal = read_journal(journal_path)
    check_base(journal, journal_path, base_dir)
    if step > len(journal.entries):
        raise JournalError(f"{journal_path}: --step {step} is beyond its {len(journal.entries)} updates: lower --step")
    dtype: torch.dtype = getattr(torch, resolve_dtype(config.engine.dtype))
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    device = "cpu" if serves_on_cpu() else "cuda"
    weights = {name: tensor.to(device) for name, tensor in load_trained(base_dir, dtype, config.es.layers).items()}
    offload = config.engine.offload_masters and device != "cpu"
    masters = MasterWeights(weights, config.es, dtype, fold_for(torch.device(device)), offload=offload)
    checked = step == 0
    for entry in journal.entries[:step]:
        check_weights(journal_path, entry, masters.checksum)
        checked |= entry.step > 1 and bool(entry.checksum)
        masters.apply(recorded_update(plan_of(config, entry.step), entry), served_factors_of)
    served = {name: masters.served(name).to("cpu", copy=True) for name in weights}
    checksum = masters.checksum()
    for entry in () if checked else journal.entries[step:]:  # updates of a few more steps, to have compared once
        check_weights(journal_path, entry, masters.checksum)
        if entry.checksum:
            break
        masters.apply(recorded_update(plan_of(config, entry.step), entry), served_factors_of)
    export_model(base_dir, directory, served, dtype)
    return checksum


def check_base(journal: JournalContents, journal_path: Path, base_dir: Path) -> None:
    """Raise JournalError when the journal's updates are not updates of this base model."""
    identity = model_identity(base_dir)
    if journal.header is None or journal.header.base_model != identity:
        found = "nothing" if journal.header is None else journal.header.base_model
        raise JournalError(
            f"{journal_path}: was recorded on base model {found}, but {base_dir} is {identity}: use the recorded one"
        )


def load_trained(base_dir: Path, dtype: torch.dtype, layers: Sequence[int] = ()) -> dict[str, Any]:
    """Return the trained tensors of a checkpoint in the dtype that the engine loads them in; `layers`: `es.layers`."""
    from safetensors import safe_open

    names = {name for name, _, _ in trained_parameters(base_dir, layers)}
    tensors: dict[str, Any] = {}
    for file in weight_files(base_dir):
        with safe_open(file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name).to(dtype) for name in stored.keys() if name in names}  # noqa: SIM118
    return tensors
