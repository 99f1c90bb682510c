"""Run directories read back: budgets summed, groups told apart, damage named."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from made_up_runs import PROBLEMS, make_config, write_run

from eggroll_llm.config.schema import EngineConfig, LogConfig, SamplingConfig
from eggroll_llm.errors import ConfigError, RunDirError, SamplesError
from eggroll_llm.records.weights import write_provenance
from eval.runs import about, group_seeds, read_runs


def test_a_row_is_what_all_steps_up_to_it_took(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", {0: "1000", 2: "1100"}, spent=(10, 100, 60.0))])
    spent = [(point.step, point.completions, point.tokens, point.seconds) for point in run.points]
    assert spent == [(0, 0, 0, 0.0), (1, 10, 100, 60.0), (2, 20, 200, 120.0)]
    assert [(point.step, point.accuracy, point.problems) for point in run.evaluations] == [(0, 0.25, 4), (2, 0.5, 4)]
    assert math.isnan(run.points[0].reward)
    assert run.points[2].reward == 0.2
    assert run.base == run.points[0]
    assert run.finished
    assert run.base_model == "0123456789abcdef"


def test_a_run_is_finished_when_its_final_model_is_of_its_last_step(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10", 4: "11"}, steps=6)
    assert read_runs([path])[0].finished
    write_provenance(path / "final", step=4, base_model="0")  # it has gone on since
    assert not read_runs([path])[0].finished
    (path / "final" / "eggroll.json").unlink()
    assert not read_runs([path])[0].finished


def test_the_best_evaluation_is_the_first_of_equals(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", {0: "00", 1: "10", 3: "01", 4: "00"})])
    assert run.best == run.points[1]


def test_repeated_problems_stay_apart(tmp_path: Path) -> None:
    problems = [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]]
    a, b = read_runs([write_run(tmp_path / name, {0: "101"}, problems=problems) for name in "ab"])
    assert [sample.completion for sample in a.answers(0).values()] == ["0:0:right", "0:1:wrong", "0:2:right"]
    assert a.answers(0).keys() == b.answers(0).keys()


def test_the_last_evaluation_within_a_budget_counts(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", {0: "10", 2: "11", 4: "00"}, spent=(10, 100, 60.0))])
    reached = {amount: run.within("tokens", amount) for amount in (0, 199, 200, 399, 400)}
    assert {amount: point.step if point else None for amount, point in reached.items()} == {
        0: 0,
        199: 0,
        200: 2,
        399: 2,
        400: 4,
    }
    assert run.within("tokens", -1) is None
    assert (within := run.within("seconds", 240.0)) is not None
    assert within.step == 4


def test_what_was_not_finite_is_not_a_number(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10", 2: "11"})
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"reward/mean": None, "wall_time": None, "tokens/generated": None}
    rows[2] |= {"eval/accuracy": None, "reward/mean": 10**400}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "cut sh')
    (run,) = read_runs([path])
    assert math.isnan(run.points[1].reward)
    assert (run.points[1].seconds, run.points[2].seconds) == (0.0, 120.0)
    assert math.isnan(run.points[2].reward)
    assert (run.points[1].tokens, run.points[2].tokens) == (0, 100)
    assert [point.step for point in run.evaluations] == [0]
    assert len(run.points) == 3


def test_figures_are_to_be_compared_with_the_base_model_and_the_best_constant_answer(tmp_path: Path) -> None:
    demo = write_run(tmp_path / "demo", {0: "01"})
    said = [
        "Base model: SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16.",
        "The best constant answer to these problems (a + b) is right for 100.0 %.",
    ]
    assert about(read_runs([demo])) == said
    other = write_run(tmp_path / "other", {0: "01"}, config=make_config(model="/data/mine", task="gsm8k"))
    both = about(read_runs([demo, other]))
    assert both == ["Base models: SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16; mine.", said[1]]
    next((demo / "evaluations").iterdir()).unlink()
    assert about(read_runs([demo])) == said[:1]


def test_an_edited_problem_is_another_one(tmp_path: Path) -> None:
    edited = [dict(PROBLEMS[0]), {**PROBLEMS[1], "target": 99}]
    a, b = read_runs(
        [write_run(tmp_path / "a", {0: "10"}), write_run(tmp_path / "b", {0: "10"}, problems=edited, finished=False)]
    )
    answers = a.answers(0)
    assert [sample.completion for sample in answers.values()] == ["0:0:right", "0:1:wrong"]
    assert [sample.id for problem, sample in b.answers(0).items() if problem in answers] == ["p0"]
    assert not b.finished


def test_names_are_as_long_as_it_takes(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, {0: "10"}) for name in ("x/run", "y/run", "other")]
    assert [run.name for run in read_runs(paths)] == ["x/run", "y/run", f"{tmp_path.name}/other"]
    assert [run.name for run in read_runs(paths[1:])] == ["run", "other"]


def test_only_the_seed_and_what_no_update_depends_on_may_differ_in_a_group(tmp_path: Path) -> None:
    configs = {
        "a": make_config(seed=0),
        "b": make_config(seed=1, log=LogConfig(samples=0), engine=EngineConfig(slots=4)),
        "wide": make_config(seed=0, sigma=0.03),
        "longer": make_config(seed=1, steps=8),
        "exact": make_config(seed=1, engine=EngineConfig(dtype="float32")),
    }
    runs = read_runs([write_run(tmp_path / name, {0: "10"}, config=config) for name, config in configs.items()])
    assert [(group.label, [run.name for run in group.runs]) for group in group_seeds(runs)] == [
        ("es steps=4 sigma=0.012 dtype=auto (2 seeds)", ["a", "b"]),
        ("es steps=4 sigma=0.03 dtype=auto (1 seed)", ["wide"]),
        ("es steps=8 sigma=0.012 dtype=auto (1 seed)", ["longer"]),
        ("es steps=4 sigma=0.012 dtype=float32 (1 seed)", ["exact"]),
    ]
    assert [group.label for group in group_seeds(runs[:2])] == ["es (2 seeds)"]


def test_a_label_names_what_tells_groups_apart_first(tmp_path: Path) -> None:
    """Five settings differ, and only the last of them tells all three apart."""
    common = {"minutes": 2.0, "model": "m", "sampling": SamplingConfig(prompts_per_step=2, max_tokens=9)}
    configs = [
        make_config(task_options={"seed": 1}),
        *(make_config(task_options={"seed": i}, **common) for i in (2, 3)),
    ]
    runs = read_runs([write_run(tmp_path / f"{i}", {0: "10"}, config=config) for i, config in enumerate(configs)])
    assert [group.label for group in group_seeds(runs)] == [
        "es model=smollm2-135m-instruct minutes=0 task_options.seed=1 … (1 seed)",
        "es model=m minutes=2 task_options.seed=2 … (1 seed)",
        "es model=m minutes=2 task_options.seed=3 … (1 seed)",
    ]


def test_a_label_names_only_what_its_method_has(tmp_path: Path) -> None:
    """Settings of evolution strategies tell its own groups apart; shared ones are named for every group."""
    configs = [
        *(make_config(sigma=sigma, steps=steps) for sigma, steps in ((0.01, 4), (0.02, 4))),
        make_config(steps=8),
        make_config(sigma=0.01, steps=8),
    ]
    runs = read_runs([write_run(tmp_path / f"{i}", {0: "10"}, config=config) for i, config in enumerate(configs)])
    runs[2:] = [
        dataclasses.replace(run, config=dataclasses.replace(run.config, method="grpo"))  # type: ignore[arg-type]
        for run in runs[2:]
    ]
    assert [(group.label, [run.name for run in group.runs]) for group in group_seeds(runs)] == [
        ("es steps=4 sigma=0.01 (1 seed)", ["0"]),
        ("es steps=4 sigma=0.02 (1 seed)", ["1"]),
        ("grpo steps=8 (1 seed)", ["2", "3"]),
    ]


def test_methods_are_told_apart_by_their_name_however_they_sample(tmp_path: Path) -> None:
    """Of two groups of one method it is said how."""
    members = SamplingConfig(prompts_per_step=8, max_tokens=9)
    group = SamplingConfig(prompts_per_step=2, samples_per_prompt=8, temperature=1.0, max_tokens=9)
    configs = [make_config(sampling=members), make_config(sampling=group), make_config(sampling=members)]
    runs = read_runs([write_run(tmp_path / f"{i}", {0: "10"}, config=config) for i, config in enumerate(configs)])
    runs[1] = dataclasses.replace(runs[1], config=dataclasses.replace(runs[1].config, method="grpo"))
    assert [group.label for group in group_seeds(runs[:2])] == ["es (1 seed)", "grpo (1 seed)"]
    less = dataclasses.replace(runs[2].config, sampling=dataclasses.replace(members, prompts_per_step=4))
    runs[2] = dataclasses.replace(runs[2], config=less)
    labels = [group.label for group in group_seeds(runs)]
    assert [label.partition(" samples")[0] for label in labels[::2]] == [
        "es prompts_per_step=8 (1 seed)",
        "es prompts_per_step=4 (1 seed)",
    ]


def test_labels_differ_although_long_values_are_cut(tmp_path: Path) -> None:
    configs = [make_config(task=f"{'long' * 10}{i}.py:TASK") for i in range(2)]
    runs = read_runs([write_run(tmp_path / f"{i}", {0: "10"}, config=config) for i, config in enumerate(configs)])
    assert [group.label for group in group_seeds(runs)] == [
        f"es task={'long' * 5}lon… #1 (1 seed)",
        f"es task={'long' * 5}lon… #2 (1 seed)",
    ]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10"})
    with pytest.raises(ConfigError, match="no run given"):
        read_runs([])
    with pytest.raises(ConfigError, match=r"run: given twice"):
        read_runs([path, path / ".." / "run"])
    with pytest.raises(RunDirError, match=r"not a run directory"):
        read_runs([tmp_path])
    with pytest.raises(RunDirError, match=r"step-000007.jsonl: no such file, so single answers cannot be compared"):
        read_runs([path])[0].answers(7)
    (path / "evaluations" / "step-000000.jsonl").write_text("{}\n")
    with pytest.raises(SamplesError, match=r"step-000000.jsonl:1: is not a file of graded completions"):
        read_runs([path])[0].answers(0)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ('{"step": 0, "eval/accuracy": 0.5}\n[1]\n', r"metrics.jsonl:2: is damaged"),
        ('{"step": 0, "eval/accuracy": 0.5}\n{oh\n', r"metrics.jsonl:2: is damaged"),
        ('{"step": 2, "eval/accuracy": 0.5}\n{"step": 2}\n', r"metrics.jsonl:2: step 2 after 2"),
        ('{"step": "1"}\n', r"metrics.jsonl:1: step '1' after -1"),
        ('{"step": 0}\n', r"metrics.jsonl: has no evaluation yet"),
        ("", r"metrics.jsonl: has no evaluation yet"),
        ("[" * 2000 + "\n", r"metrics.jsonl:1: is damaged"),
        (f'{{"step": 0, "a": {"[" * 2000 + "]" * 2000}}}\n', r"metrics.jsonl:1: is damaged"),
        (None, r"metrics.jsonl: cannot be read"),
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, metrics: str | None, said: str) -> None:
    path = write_run(tmp_path / "run", {0: "10"})
    (path / "metrics.jsonl").unlink()
    if metrics is not None:
        (path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(RunDirError, match=said):
        read_runs([path])


@pytest.mark.parametrize("text", ["", "[]", "[" * 2000, '{"starts": 3}', '{"starts": ["no object"]}'])
def test_an_environment_is_not_needed(tmp_path: Path, text: str) -> None:
    path = write_run(tmp_path / "run", {0: "10"})
    assert read_runs([path])[0].starts[0]["python"] == "3.11.7"
    (path / "environment.json").write_text(text)
    assert read_runs([path])[0].starts == ()
