"""The benchmark's arithmetic, and its variants on a tiny model."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eggroll_llm.bench import run
from eggroll_llm.cli.main import main
from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import ConfigError, UserError
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.training.budget import member_bytes
from eggroll_llm.training.prepare import prepare

OURS = run.population(2, 4, slots=2)


def config(model: Path) -> RunConfig:
    from eggroll_llm.config.schema import EngineConfig, SamplingConfig
    from eggroll_llm.es.settings import EsSettings

    return RunConfig(
        model=str(model),
        task="countdown",
        task_options={"prompt_style": "few_shot", "shots": 1, "test_size": 8, "train_size": 32},
        steps=1,
        es=EsSettings(population=4, sigma=0.05, learning_rate=0.01),
        sampling=SamplingConfig(max_tokens=4),
        engine=EngineConfig(kv_cache_gib=0.05, dtype="bfloat16"),
    )


def answer(tokens_per_second: float, **more: float | None) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens_per_second,
        "generated_per_second": tokens_per_second / 2,
        "noise_seconds": None,
        "update_seconds": None,
        "serve_seconds": None,
        "resident_gib": 1.0,
    } | more


def test_names_say_what_differs() -> None:
    names = [variant.name for _, variants in run.GROUPS for variant in variants]
    assert len(names) == len(set(names))
    assert OURS.name == "population of 4, rank 2, 2 slots"


SIZE = run.Size(sequences=128, new_tokens=64)


def test_mixed_lengths_are_from_a_quarter_to_all_of_the_tokens_in_waves() -> None:
    assert SIZE.lengths("even") == [64] * 128
    mixed = SIZE.lengths("mixed")
    assert (len(mixed), min(mixed), max(mixed), sum(mixed)) == (512, 16, 64, 20_240)
    assert mixed != sorted(mixed)
    assert SIZE.lengths("mixed") == mixed
    for sequences, new_tokens, lengths in (
        (1, 2, [1, 1, 1, 2]),
        (2, 16, [4, 5, 7, 9, 10, 12, 14, 16]),
        (1, 1, [1] * 4),
    ):
        assert sorted(run.Size(sequences=sequences, new_tokens=new_tokens).lengths("mixed")) == lengths


def test_every_member_of_every_variant_answers_as_much() -> None:
    for sequences, wanted, refused in ((128, "", ""), (64, "population of 64", ""), (64, "", "128"), (100, "", "64")):
        size = run.Size(sequences=sequences, new_tokens=64)
        chosen = [(work, [v for v in variants if wanted in v.name]) for work, variants in run.GROUPS]
        with pytest.raises(UserError, match=f"use a multiple of {refused}") if refused else nullcontext():
            for work, variants in chosen:
                run._check_shares(size, work, variants)


@pytest.mark.vllm
def test_ratios_are_taken_within_a_round(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    prepared = prepare(config(tiny_model("llama")), tmp_path)
    variants = (run.EAGER, run.COMPILED, OURS)
    groups = [
        run.Measured(
            workload="even",
            variants=variants,
            rounds=[
                {
                    run.EAGER.name: answer(100 * drift),
                    run.COMPILED.name: answer(125 * drift),
                    OURS.name: answer(95 * drift, noise_seconds=0.1, resident_gib=1.5),
                }
                for drift in drifts
            ],
        )
        for drifts in ((1.0, 2.0), (0.5,))
    ]
    (merged,) = run._merge_references(groups)
    assert len(merged.rounds) == 3
    plain, compiled, ours = run.rows(merged, prepared, SIZE)
    assert (plain["ratio_to_plain_eager"], plain["ratio_to_plain_best"]) == (1.0, pytest.approx(0.8))
    assert (compiled["ratio_to_plain_eager"], compiled["ratio_to_plain_best"]) == (pytest.approx(1.25), 1.0)
    assert ours["ratio_to_plain_eager_range"] == [pytest.approx(0.95), pytest.approx(0.95)]
    assert ours["ratio_to_plain_best"] == pytest.approx(0.76)
    assert ours["tokens_per_second"] == 95
    assert ours["tokens_per_second_range"] == [47.5, 190]
    assert (ours["name"], ours["rank"], ours["slots"], ours["population"]) == (OURS.name, 2, 2, 4)
    assert (ours["noise_seconds"], ours["update_seconds"]) == (0.1, None)
    assert ours["resident_over_plain_gib"] == pytest.approx(0.5)
    shapes = trained_parameters(prepared.model_dir)
    masters = 4 * sum(out * inside for _, out, inside in shapes)
    assert ours["resident_over_plain_gib_predicted"] * 2**30 == masters + (2 + 2) * member_bytes(shapes, 2, 2)
    assert plain["resident_over_plain_gib_predicted"] is None


@pytest.mark.vllm
def test_every_kind_of_variant_runs_and_the_table_is_written(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = [
        run.Variant(name=kind, kind=kind, rank=1, slots=4, population=4)  # type: ignore[arg-type]
        for kind in ("population", "stock", "files", "swap")
    ]
    monkeypatch.setattr(run, "GROUPS", (("even", tuple(kinds)), ("mixed", (OURS,))))
    out = tmp_path / "run.json"
    run.bench(config(tiny_model("llama")), tmp_path, run.Size(sequences=8, new_tokens=4), 1, out)
    rows = json.loads(out.read_text())
    names = [run.EAGER.name, run.COMPILED.name]
    assert [row["name"] for row in rows] == [*names, *(kind.name for kind in kinds), *names, OURS.name]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["resident_gib"] > 0.1
        assert row["prompt_tokens"] > row["generated_tokens"] > 0
    by_kind = {row["kind"]: row for row in rows if row["workload"] == "even"}
    assert all(by_kind["population"][f"{part}_seconds"] > 0 for part in ("noise", "update", "serve"))
    assert by_kind["files"]["noise_seconds"] > 0
    assert by_kind["swap"]["noise_seconds"] > 0
    assert "population of 4, rank 2, 2 slots" in capsys.readouterr().out.replace("\n", "")
    assert asdict(OURS).items() <= rows[-1].items()


def test_a_file_that_cannot_be_written_is_refused_before_hours_are_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(config(tmp_path)))
    for out, said in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "no" / "b.json", "does not exist: create it"),
    ):
        assert main(["bench", str(tmp_path / "recipe.toml"), "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out {out}: {said}")


def test_a_full_disk_leaves_the_table_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured; the new table is on the terminal."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    eager = SimpleNamespace(variant=run.EAGER, close=lambda: None)
    changes = {"prepare": None, "_job": {}, "_start": [eager], "_measure": None, "_merge_references": [], "show": None}
    for name, value in changes.items():
        monkeypatch.setattr(run, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(os, "fsync", fail)
    out = tmp_path / "run.json"
    out.write_text("before")
    with pytest.raises(ConfigError, match=rf"^--out {out}: cannot write 3 bytes \(No space left on device; \d+ bytes"):
        run.bench(config(tmp_path), tmp_path, SIZE, 1, out)
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(out, "before")]


def test_a_name_that_no_variant_has_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in none of these names"):
        run.bench(config(tmp_path), tmp_path, SIZE, 1, None, "no such variant")


def test_a_variant_that_does_not_start_says_why() -> None:
    with pytest.raises(UserError, match=r"(?s)'broken' ended with status 1.*KeyError: 'workloads'"):
        run.Worker(run.Variant(name="broken", kind="plain"), {})
