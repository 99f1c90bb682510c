"""A full disk: nothing half-written is left, the old state stays, and the message names the path and bytes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_stub
import pytest
import torch
from safetensors import SafetensorError

from eggroll_llm.cli.main import main
from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import EngineConfig, RunConfig
from eggroll_llm.errors import CheckpointError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.fitness import shape_fitness
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.files import check_model, model_identity
from eggroll_llm.records.checkpoint import verify_checkpoint
from eggroll_llm.records.journal import Journal, JournalHeader
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.updates import journal_entry
from eggroll_llm.training.plan import plan_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "small_disk.py"
TRY = 'mount -t tmpfs -o size=4096 none "$0" && mount -o remount,size=8192 "$0"'


@pytest.fixture
def mounting(tmp_path: Path) -> list[str]:
    """The words before a command that may mount."""
    words = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*words, "sh", "-c", TRY, str(tmp_path)], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    return words


def test_a_disk_that_fills_up_anywhere_keeps_the_old_state(tmp_path: Path, mounting: list[str]) -> None:
    """Page by page, until the run fits; each time it goes on once there is room, and ends like the others."""
    result = subprocess.run(
        [*mounting, sys.executable, str(SCRIPT), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    files = set(json.loads(result.stdout.splitlines()[-1]))
    assert {"", "journal.jsonl", "metrics.jsonl", "final"} <= files
    assert {file.partition("/")[0] for file in files} >= {"checkpoints", "evaluations"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_a_checkpoint_of_grpo_keeps_the_one_before(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """Which torch writes: the second checkpoint fails, the first one stays, and the run goes on from it."""
    from eggroll_llm.training.grpo_trl.trainer import EngineGrpoTrainer

    bench = grpo_stub.Bench(tmp_path, tiny_model("llama"), pytest.MonkeyPatch())
    flags = {"steps": 3, "checkpoint__every": 1, "eval__every": 0}
    bench.train("whole", **flags)
    real, run = EngineGrpoTrainer._save_optimizer_and_scheduler, tmp_path / "run"

    def save(self: Any, folder: str) -> None:
        if self.state.global_step == 2:
            Path(folder, "optimizer.pt").symlink_to("/dev/full")
        real(self, folder)

    with bench.monkeypatch.context() as patch:
        patch.setattr(EngineGrpoTrainer, "_save_optimizer_and_scheduler", save)
        with pytest.raises(CheckpointError) as info:
            bench.train("run", **flags)
    said = (
        rf"{run}/checkpoints/step-000002: cannot write the checkpoint \(torch\.save failed: .* after \d{{5,}} bytes, "
    )
    assert re.match(rf"{said}which were removed again; \d+ bytes are free\)", str(info.value))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    verify_checkpoint(run / "checkpoints" / "step-000001")
    bench.train("run", "resume", **flags)
    grpo_stub.same_run(tmp_path / "whole", run)


def test_a_full_disk_under_a_replay_leaves_no_half_model(
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whole or not at all: the model, and what describes it."""
    base = tiny_model("llama")
    es = EsSettings(population=4, sigma=0.02, learning_rate=0.01)
    config = RunConfig(model=str(base), task="countdown", steps=1, es=es, engine=EngineConfig(dtype="float32"))
    with RunDir.create(tmp_path / "run", to_toml(config)) as run:
        with Journal.open(run.journal, JournalHeader(frozen_hash="a", base_model=model_identity(base))) as journal:
            rewards_MP = torch.arange(8, dtype=torch.float64).view(4, 2) ** 2
            update = UpdateSpec.of(plan_of(config, 1), shape_fitness(rewards_MP, "centered").fitness_M.tolist())
            journal.append(journal_entry(update, dropped=(), checksum=""))
        run.append_metrics({"step": 0, "eval/accuracy": 0.5, "eval/problems": 4})
    out = tmp_path / "model"
    command = ["replay", str(tmp_path / "run"), "--out", str(out)]

    def fail(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a model")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        assert main(command) == 2
    said = rf"error: --out {out}: cannot write the model \(No space left on device after \d+ bytes, which were removed "
    assert re.match(rf"{said}again; \d+ bytes are free\)[^\n]*\n$", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert main(command) == 0
    assert check_model(out) == "LlamaForCausalLM"
    assert json.loads((out / "eggroll.json").read_text())["step"] == 1
    assert "countdown" in (out / "README.md").read_text()
