"""The benchmark's arithmetic, from rounds to the table."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eggroll_llm.bench.plan import COMPILED, EAGER, SHIPPED, Size, population
from eggroll_llm.bench.report import Measured, rows, show
from eggroll_llm.bench.subject import Subject, population_bytes
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.system.hardware import GIB

SIZE = Size(num_prompts=8, output_len=64)
OURS = population(2, 4, slots=2)


def answer(tokens_per_second: float, **more: float | None) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens_per_second,
        "generated_per_second": tokens_per_second / 2,
        "noise_seconds": None,
        "update_seconds": None,
        "serve_seconds": None,
        "rest_of_step": None,
        "memory_gib": 1.0,
    } | more


@pytest.fixture
def subject(tiny_model: Any) -> Subject:
    engine = EngineConfig(dtype="bfloat16")
    return Subject(model_dir=Path(tiny_model("llama")), prompts=[[1] * 10], engine=engine, sigma=0.01)


def test_ratios_are_taken_within_a_round(subject: Subject) -> None:
    waves = [
        Measured(
            workload="even",
            variants=(EAGER, COMPILED, OURS),
            rounds=[
                {
                    EAGER.name: answer(100 * drift),
                    COMPILED.name: answer(125 * drift),
                    OURS.name: answer(95 * drift, noise_seconds=0.1, memory_gib=1.5),
                }
                for drift in drifts
            ],
            about={OURS: {"start_seconds": 7.0}},
        )
        for drifts in ((1.0, 2.0), (0.5,))
    ]
    plain, compiled, ours = rows(waves, subject, SIZE)
    assert plain["ratio_to"] == {EAGER.name: [1, 1, 1], COMPILED.name: [pytest.approx(0.8)] * 3}
    assert compiled["ratio_to"][EAGER.name] == [pytest.approx(1.25)] * 3
    assert ours["ratio_to"] == {EAGER.name: [pytest.approx(0.95)] * 3, COMPILED.name: [pytest.approx(0.76)] * 3}
    assert (ours["tokens_per_second"], ours["tokens_per_second_range"], ours["rounds"]) == (95, [47.5, 190], 3)
    assert (ours["name"], ours["rank"], ours["slots"], ours["population"]) == (OURS.name, 2, 2, 4)
    assert (ours["noise_seconds"], ours["update_seconds"], ours["start_seconds"]) == (0.1, None, 7.0)
    assert (ours["prompt_tokens"], ours["generated_tokens"]) == (80, 512)
    assert ours["memory_over_plain_gib"] == pytest.approx(0.5)
    assert ours["memory_over_plain_gib_predicted"] == population_bytes(subject, OURS) / GIB
    assert plain["memory_over_plain_gib_predicted"] is None


def test_what_was_not_alive_together_is_compared_with_the_median(subject: Subject) -> None:
    """On a GPU that is too small for all: plain vLLM has gone when the population comes."""
    waves = [
        Measured(workload="even", variants=[EAGER], rounds=[{EAGER.name: answer(s)} for s in (90.0, 100.0, 120.0)]),
        Measured(workload="even", variants=[SHIPPED, OURS], rounds=[{OURS.name: answer(s)} for s in (50.0, 80.0)]),
    ]
    plain, ours = rows(waves, subject, SIZE)  # the other reference did not run
    assert plain["ratio_to"] == {EAGER.name: [1, 1, 1]}
    assert ours["ratio_to"] == {EAGER.name: [pytest.approx(0.65), 0.5, 0.8]}


def test_the_table_has_phases_and_the_share_of_what_is_no_sampling(subject: Subject) -> None:
    phases = {
        "prefill_seconds": 0.5,
        "prefill_tokens_per_second": 160.0,
        "decode_tokens_per_second": 1234.0,
        "decode_step_seconds": 0.0123,
    }
    step = {"noise_seconds": 0.015, "update_seconds": 0.025, "serve_seconds": 0.001, "rest_of_step": 0.0204}
    step |= {"scored_tokens_per_second": 144.0}
    wave = Measured(
        workload="even",
        variants=(EAGER, OURS),
        rounds=[{EAGER.name: answer(100, **phases), OURS.name: answer(95, **phases, **step)}],
        about={
            EAGER: {"device": "H100", "async_scheduling": True, "cudagraph_mode": "NONE"},
            OURS: {"multiprocess": True, "second_model_runner": True, "cudagraph_mode": "CUDAGraphMode.FULL"},
        },
    )
    text = io.StringIO()
    show(rows([wave], subject, SIZE), SIZE, Console(file=text, width=230))
    eager, ours = (line for line in text.getvalue().splitlines() if line.startswith("│ p"))
    assert "64 new tokens each: 80 prompt and 512 new tokens, 8 at a time, greedy, on H100" in text.getvalue()
    for cell in (
        "95",
        "0.50",
        "1,234",
        "12.30",
        "144 (0.90)",
        "0.95 (0.95-0.95)",
        "15 + 25 + 1, 2.0 %",
        "1.00",
        "mp v2 full",
    ):
        assert f" {cell} " in ours
    assert " 15 + 25" not in eager
    assert eager.split()[-2:] == ["async", "│"]
