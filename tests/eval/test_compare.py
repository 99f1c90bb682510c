"""Comparisons against numbers computed by hand."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import PROBLEMS, make_config, write_run
from rich.console import Console

from eggroll_llm.config.schema import EngineConfig, EvalConfig, GrpoConfig, SamplingConfig
from eggroll_llm.errors import ConfigError
from eggroll_llm.records.baseline import Constant
from eval.compare import Comparison, Mean, compare_runs
from eval.runs import read_runs
from eval.statistics import bootstrap_interval, sign_flip_exact
from eval.tables import Grid, amount, grids, interval_text, mean_text, pair_text, tables

# Neither a package nor on the path: test modules are imported by their files.


def compare(paths: Sequence[Path]) -> Comparison:
    return compare_runs(read_runs(paths))


def grid(comparison: Comparison, title: str) -> Grid:
    (found,) = [grid for grid in grids(comparison) if grid.title == title]
    return found


def test_a_run_is_tested_against_its_own_base_model(tmp_path: Path) -> None:
    """Eight problems: four won, one lost, so that p = 2 (C(5,0) + C(5,1)) / 2^5."""
    comparison = compare([write_run(tmp_path / "run", {0: "10001000", 2: "11111111", 4: "01111010"})])
    (test,) = comparison.tests
    assert (test.first, test.second, test.available) == ("run, base model", "run, step 4", 8)
    assert test.accuracies == (0.25, 0.625)
    assert (test.result.wins, test.result.losses) == ((1, 2, 3, 6), (0,))
    assert test.result.difference == 0.375
    assert test.result.p_value == 2 * (1 + 5) / 2**5
    assert test.result.interval is None  # of five problems
    assert interval_text(test) == "–"
    assert [(example.id, example.first, example.second) for example in test.won] == [
        ("p1", "0:1:wrong", "4:1:right"),
        ("p2", "0:2:wrong", "4:2:right"),
        ("p3", "0:3:wrong", "4:3:right"),
    ]
    assert [(example.id, example.problem["target"]) for example in test.lost] == [("p0", 1)]
    (run,) = comparison.runs
    assert (run.base.accuracy, run.final.accuracy, run.best.accuracy) == (0.25, 0.625, 1.0)
    assert (run.best.step, run.total.completions, run.total.tokens, run.total.seconds) == (2, 40, 400, 240.0)
    assert comparison.notes == ()


def test_single_runs_of_other_settings_are_tested_against_the_first(tmp_path: Path) -> None:
    rights = {"a": "1100", "b": "1111", "c": "0100"}
    paths = [
        write_run(tmp_path / name, {0: "0000", 2: right}, config=make_config(sigma=sigma))
        for sigma, (name, right) in enumerate(rights.items(), start=1)
    ]
    tests = compare(paths).tests
    where = "final, same completions, same tokens, same time"
    assert [(pair_text(test), test.result.difference) for test in tests] == [
        ("a, base model → step 2", 0.5),
        ("b, base model → step 2", 1.0),
        ("c, base model → step 2", 0.25),
        (f"a, step 2 → b, step 2: {where}", 0.5),
        (f"a, step 2 → c, step 2: {where}", -0.25),
    ]
    assert tests[3].result.p_value == 0.5  # McNemar, 2 against 0


def test_groups_are_tested_on_the_mean_of_each_problem_over_seeds(tmp_path: Path) -> None:
    """Twelve problems, three seeds against two; no test among the seeds of a group."""
    rights = {
        "a0": (0.01, 0, "110000000000"),
        "a1": (0.01, 1, "111000000000"),
        "b0": (0.02, 0, "001111111111"),
        "a2": (0.01, 2, "110100000000"),
        "b1": (0.02, 1, "101111111110"),
    }
    problems = [{"id": i, "target": i} for i in range(12)]
    paths = [
        write_run(
            tmp_path / name, {0: "0" * 12, 2: right}, config=make_config(seed=seed, sigma=sigma), problems=problems
        )
        for name, (sigma, seed, right) in rights.items()
    ]
    comparison = compare(paths)
    *own, test = comparison.tests
    assert [pair_text(each) for each in own] == [f"{name}, base model → step 2" for name in rights]
    assert (test.first, test.second) == ("es sigma=0.01 (3 seeds)", "es sigma=0.02 (2 seeds)")
    assert test.at == "final, same completions, same tokens, same time"
    scores = {name: [int(mark) for mark in right] for name, (_, _, right) in rights.items()}
    firsts, seconds = ([scores[name] for name in names] for names in (("a0", "a1", "a2"), ("b0", "b1")))
    # Sums over seeds, brought to a common denominator: 3, 3, 1, 1, 0... of 3 and 1, 0, 2, 2, 2... of 2.
    sixths = [3 * (b0 + b1) - 2 * (a0 + a1 + a2) for a0, a1, a2, b0, b1 in zip(*firsts, *seconds, strict=True)]
    assert sixths == [-3, -6, 4, 4, 6, 6, 6, 6, 6, 6, 6, 3]
    assert test.result.difference == pytest.approx(sum(sixths) / 6 / 12)
    assert test.accuracies == pytest.approx((8 / 36, 20 / 24))
    assert test.result.p_value == sign_flip_exact(sixths)
    assert test.result.interval == bootstrap_interval(firsts, seconds)
    assert (test.result.losses, len(test.result.wins)) == ((0, 1), 10)
    # An answer of each side on which they differ: the first wrong one of the seeds, the first right one.
    assert [(each.id, each.first, each.second) for each in test.lost] == [
        (0, "2:0:right", "2:0:wrong"),
        (1, "2:1:right", "2:1:wrong"),
    ]
    assert (test.won[0].id, test.won[0].first, test.won[0].second) == (2, "2:2:wrong", "2:2:right")


def test_groups_are_tested_at_equal_budgets(tmp_path: Path) -> None:
    """The quick one has spent 300 tokens after 3 steps, the slow one 400 after 4: tested at 3 and 2 then."""
    slow = write_run(tmp_path / "slow", {0: "00", 2: "10", 4: "11"}, spent=(10, 100, 60.0))
    quick = write_run(tmp_path / "quick", {0: "00", 3: "01"}, config=make_config(sigma=0.5), spent=(20, 100, 120.0))
    assert [(pair_text(test), test.result.difference, len(test.lost)) for test in compare([slow, quick]).tests[2:]] == [
        ("slow, step 4 → quick, step 3: final", -0.5, 1),
        ("slow, step 4 → quick, base model: same completions, same time", -1, 0),  # examples are of the end
        ("slow, step 2 → quick, step 3: same tokens", 0, 0),
    ]


def test_the_same_runs_give_the_same_comparison(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10001000", 4: "01111010"})
    assert compare([path]) == compare([path])


def test_pairs_are_the_problems_that_both_have(tmp_path: Path) -> None:
    """b has p1 to p4, the target of p2 changed: three in common, in another order."""
    other = [PROBLEMS[4], {**PROBLEMS[2], "target": -1}, PROBLEMS[3], PROBLEMS[1]]
    a = write_run(tmp_path / "a", {0: "00000000", 2: "11111000"})
    b = write_run(tmp_path / "b", {0: "0000", 2: "0110"}, problems=other, config=make_config(sigma=0.5))
    *_, test = compare([a, b]).tests
    assert (test.result.problems, test.available) == (3, 8)
    assert test.accuracies == (1.0, 1 / 3)
    assert [example.id for example in test.lost] == ["p1", "p4"]
    assert [row[1] for row in grid(compare([a, b]), "Paired tests on the same problems").rows] == ["8", "4", "3 of 8"]


def test_runs_without_a_common_problem_are_not_tested(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {0: "00", 2: "11"})
    b = write_run(tmp_path / "b", {0: "00", 2: "11"}, problems=PROBLEMS[2:4], config=make_config(sigma=0.5))
    comparison = compare([a, b])
    assert len(comparison.tests) == 2
    assert comparison.notes == (
        "accuracies of these runs are not comparable, so there are no means, equal budgets or ranking: they differ in "
        "held-out problems",
        "a, step 2 and b, step 2 are not tested in pairs: they have no problem in common. Compare runs with the same "
        "task, task_options and eval.problems.",
    )


def test_runs_on_the_same_problems_are_compared_whatever_number_they_asked_for(tmp_path: Path) -> None:
    """More than there are, for instance."""
    configs = [make_config(eval=EvalConfig(problems=n), seed=n) for n in (4, 9)]
    paths = [write_run(tmp_path / f"{i}", {0: "0000", 4: "1100"}, config=configs[i]) for i in range(2)]
    assert compare(paths).comparable
    for path in paths:
        shutil.rmtree(path / "evaluations")
    assert not compare(paths).comparable  # where it is not known which


def test_runs_from_before_answers_were_recorded_are_compared_without_tests(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", {0: "0001", 2: "0011"}, finished=False)
    new = write_run(tmp_path / "new", {0: "0001", 2: "0011"}, config=make_config(sigma=0.5))
    for file in (old / "evaluations").iterdir():
        file.unlink()
    comparison = compare([old, new])
    assert [pair_text(test) for test in comparison.tests] == ["new, base model → step 2"]
    assert [run.final.accuracy for run in comparison.runs] == [0.5, 0.5]
    unfinished, *missing = comparison.notes
    assert unfinished == (
        "old is not finished, or has continued since: it has no final model of step 2; its final accuracy is that of "
        "step 2"
    )
    assert [note.partition(": ")[0] for note in missing] == [
        "old, base model and old, step 2 are not tested in pairs",
        "old, step 2 and new, step 2 are not tested in pairs",
    ]


def test_equal_budgets(tmp_path: Path) -> None:
    """Totals: slow 40 completions, 400 tokens, 400 s; quick 48, 320 and 80. Step by step, quick takes 6, 40 and 10."""
    slow = write_run(tmp_path / "slow", {0: "0000", 2: "1000", 4: "1110"}, spent=(10, 100, 100.0))
    quick = write_run(tmp_path / "quick", {0: "0000", 3: "1100", 6: "1000", 8: "1111"}, spent=(6, 40, 10.0))
    comparison = compare([slow, quick])
    reached = {
        cut.budget: (cut.amount, cut.set_by, [(point.step, point.accuracy) for point in cut.reached.values() if point])
        for cut in comparison.cuts
    }
    assert reached == {
        "completions": (40, "slow", [(4, 0.75), (6, 0.25)]),
        "tokens": (320, "quick", [(2, 0.25), (8, 1.0)]),
        "seconds": (80.0, "quick", [(0, 0.0), (8, 1.0)]),
    }
    shown = grid(comparison, "Accuracy at the same time: 1.3 minutes")
    assert shown.rows == [
        ["slow", "0.0 % [0.0, 49.0]", "0"],
        ["quick", "100.0 % [51.0, 100.0]", "8"],
        ["mean of es (1 seed)", "50.0 ± 50.0 %", ""],
        ["best constant answer: a + b", "100.0 % [51.0, 100.0]", ""],
    ]
    assert "What quick spent" in shown.note
    assert grid(comparison, "Accuracy of each run").rows[-1] == [
        "best constant answer: a + b", "4", "", "100.0 % [51.0, 100.0]", "", ""
    ]  # fmt: skip


def test_kinds_of_problem_have_accuracies_of_their_own(tmp_path: Path) -> None:
    """Of the recorded constant answer every table of accuracies speaks, also where the task is not Countdown."""
    config, kinds = make_config(task="sums.py:Sums"), ["carry", "carry", "no carry", ""]
    constant = Constant(pattern="107", accuracy=0.25, problems=4)
    run = write_run(tmp_path / "a", {0: "0010", 4: "1011"}, config=config, kinds=kinds, constant=constant)
    comparison = compare([run, write_run(tmp_path / "b", {0: "0000", 4: "1111"}, config=config)])
    assert grid(comparison, "Accuracy by kind of problem").rows == [
        ["a", "carry", "2", "0.0 % [0.0, 65.8]", "50.0 % [9.5, 90.5]"],
        ["a", "no carry", "1", "100.0 % [20.7, 100.0]", "100.0 % [20.7, 100.0]"],
    ]
    with_constant = [shown.title for shown in grids(comparison) if shown.rows[-1][0] == "best constant answer: 107"]
    assert with_constant == [shown.title for shown in grids(comparison) if shown.columns[-1] in ("step", "final")][:-1]
    assert len(with_constant) == 5
    one_kind = compare([write_run(tmp_path / "c", {0: "00", 4: "11"}, config=config, kinds=["carry"] * 2)])
    assert not any("kind" in shown.columns for shown in grids(one_kind))
    assert not any("constant" in cell for shown in grids(one_kind) for row in shown.rows for cell in row)


def test_runs_that_spent_or_recorded_nothing_set_no_budget(tmp_path: Path) -> None:
    """One has only its base model, one recorded no tokens: the others are compared at what they spent."""
    paths = [
        write_run(tmp_path / "begun", {0: "0000"}, config=make_config(seed=1), finished=False),
        write_run(tmp_path / "a", {0: "0000", 4: "1100"}),
        write_run(tmp_path / "b", {0: "0000", 2: "1110"}, config=make_config(sigma=0.5)),
        write_run(tmp_path / "silent", {0: "0000", 4: "1111"}, config=make_config(sigma=0.6), spent=(10, 0, 60.0)),
    ]
    comparison = compare(paths)
    assert [(cut.budget, cut.amount, cut.set_by) for cut in comparison.cuts] == [
        ("completions", 20, "b"),
        ("tokens", 200, "b"),
        ("seconds", 120.0, "b"),
    ]
    steps = [[point.step if point else None for point in cut.reached.values()] for cut in comparison.cuts]
    assert steps == [[None, 0, 2, 0], [None, 0, 2, None], [None, 0, 2, 0]]
    assert [group.runs for group in comparison.groups] == [("a",), ("b",), ("silent",)]
    assert comparison.notes[1:] == (
        "begun has no evaluation after an update and is left out of the groups",
        "silent recorded no tokens: left out at the same tokens",
    )


def test_means_over_seeds(tmp_path: Path) -> None:
    """Finals 1/4, 2/4, 3/4: mean 1/2, sample standard deviation 1/4, standard error 1/4 / sqrt 3."""
    rights = {0: "1000", 1: "1100", 2: "1110"}
    paths = [
        write_run(tmp_path / f"s{seed}", {0: "0000", 2: right}, config=make_config(seed=seed))
        for seed, right in rights.items()
    ]
    paths.append(write_run(tmp_path / "wide", {0: "0000", 1: "1111", 2: "1111"}, config=make_config(sigma=0.03)))
    seeds, wide = compare(paths).groups
    assert (seeds.label, seeds.runs) == ("es sigma=0.012 (3 seeds)", ("s0", "s1", "s2"))
    assert seeds.base.value == 0.0
    assert math.isnan(seeds.base.stderr)  # that three seeds agree does not mean that there is no error
    assert seeds.final.value == 0.5
    assert seeds.final.stderr == pytest.approx(0.25 / math.sqrt(3), rel=1e-12)
    assert seeds.within["tokens"] == seeds.final
    assert (wide.label, wide.final.value) == ("es sigma=0.03 (1 seed)", 1.0)
    assert math.isnan(wide.final.stderr)


def test_the_same_seed_twice_is_said_to_be_no_seed_more(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / name, {0: "01", 1: "11"}) for name in ("a", "b")])
    assert comparison.groups[0].label == "es (1 seed)"
    assert comparison.notes == ("es (1 seed) contains runs with the same seed, which are not independent",)


def test_a_run_with_nothing_but_its_base_model(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "run", {0: "01"}, finished=False)])
    assert comparison.tests == ()
    assert comparison.runs[0].final == comparison.runs[0].base
    assert [grid.title for grid in grids(comparison)] == ["Accuracy of each run", "What each run spent"]
    assert (comparison.cuts, len(comparison.notes)) == ((), 1)


def test_a_run_whose_base_model_was_not_evaluated(tmp_path: Path) -> None:
    comparison = compare(
        [
            write_run(tmp_path / "run", {2: "01", 4: "11"}),
            write_run(tmp_path / "b", {0: "00", 4: "01"}, config=make_config(sigma=0.5)),
        ]
    )
    assert comparison.runs[0].base is None
    assert [test.second for test in comparison.tests] == ["b, step 4"] * 2
    assert math.isnan(comparison.groups[0].base.value)
    assert grid(comparison, "Accuracy of each run").rows[0][2] == "–"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": make_config(task="gsm8k")}, "task"),
        ({"config": make_config(eval=EvalConfig(split="validation", problems=4))}, "eval.split"),
        ({"config": make_config(eval=EvalConfig(max_tokens=9))}, "eval.max_tokens"),
        ({"config": make_config(sampling=SamplingConfig(max_tokens=9))}, "eval.max_tokens"),
        ({"config": make_config(sampling=SamplingConfig(stop=("\n",)))}, "sampling.stop"),
        ({"config": make_config(sampling=SamplingConfig(thinking_token_budget=9))}, "sampling.thinking_token_budget"),
        ({"base_model": "f" * 16}, "base model"),
        ({"problems": PROBLEMS[1:]}, "held-out problems"),
    ],
)
def test_what_cannot_be_compared_is_not_ranked(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    paths = [
        write_run(tmp_path / "a", {0: "0000", 4: "1100"}),
        write_run(tmp_path / "b", {0: "0000", 4: "1110"}, **{"config": make_config(seed=1), **options}),
    ]
    comparison = compare(paths)
    assert comparison.notes[0] == (
        "accuracies of these runs are not comparable, so there are no means, equal budgets or ranking: they differ in "
        + said
    )
    assert (comparison.comparable, comparison.groups, comparison.cuts) == (False, (), ())
    assert compare(paths[:1]).comparable


def test_an_identity_of_the_base_model_counts_and_not_its_place(tmp_path: Path) -> None:
    """The model's own limit of answers is that of sampling, spelled out or not."""
    other = make_config(model="/elsewhere", eval=EvalConfig(max_tokens=256))
    paths = [write_run(tmp_path / "a", {0: "01"}), write_run(tmp_path / "b", {0: "01"}, config=other)]
    assert compare(paths).comparable
    (paths[0] / "journal.jsonl").write_text("damaged")
    assert compare(paths).notes[-1].endswith("they differ in base model")


def test_training_times_of_other_machines_are_not_comparable(tmp_path: Path) -> None:
    here = {"machine": "x86_64", "cpu_count": 2, "packages": {"torch": "2.13.0", "numpy": "2.3"}}
    there = {**here, "cpu_count": 8, "packages": {"torch": "2.14.0", "numpy": "2.3"}}
    a = write_run(tmp_path / "a", {0: "01", 2: "11"}, environment=here)
    b = write_run(tmp_path / "b", {0: "01", 2: "11"}, config=make_config(seed=1), environment=here)
    assert compare([a, b]).notes == ()
    engine = EngineConfig(threads=4)
    c = write_run(tmp_path / "c", {0: "01", 2: "11"}, config=make_config(seed=2, engine=engine), environment=there)
    assert compare([a, b, c]).notes == ("training times are not comparable: engine.threads, cpu_count, torch differ",)


def test_slots_are_no_difference_between_methods(tmp_path: Path) -> None:
    """GRPO has none, so that it does not matter how many its engine is said to have."""
    es = make_config(engine=EngineConfig(slots=32))
    grpo = dataclasses.replace(
        make_config(engine=EngineConfig(slots=1), sampling=SamplingConfig(samples_per_prompt=8, temperature=1.0)),
        method="grpo",
        grpo=GrpoConfig(learning_rate=1e-5),
    )
    paths = [write_run(tmp_path / config.method, {0: "01", 2: "11"}, config=config) for config in (es, grpo)]
    assert compare(paths).notes == ()
    other = write_run(tmp_path / "b", {0: "01", 2: "11"}, config=make_config(seed=1, engine=EngineConfig(slots=8)))
    assert compare([*paths, other]).notes == ("training times are not comparable: engine.slots differ",)


def test_missing_answers_are_noted_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "1000", 2: "1100"})
    answers = path / "evaluations" / "step-000002.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    assert compare([path]).notes == ("run, step 2: 3 answers are recorded, its accuracy is of 4 problems",)


def test_json_is_strict(tmp_path: Path) -> None:
    text = compare([write_run(tmp_path / "run", {0: "1000", 2: "1111"})]).json()
    assert text.isascii()
    values = json.loads(text, parse_constant=pytest.fail)
    assert values["tests"][0]["result"]["wins"] == [1, 2, 3]
    assert values["groups"][0]["final"] == {"value": 1.0, "stderr": None}
    assert values["cuts"][1]["budget"] == "tokens"
    assert values["tests"][0]["result"]["interval"] is None


def test_the_terminal_gets_inert_text(tmp_path: Path) -> None:
    hostile = "\x1b]0;title\x07\u202e[bold]x[/bold]\x00"
    path = write_run(tmp_path / "run \x1b[31m", {0: "00", 2: "10"}, answer=lambda *_: hostile)
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables(compare([path])):
        console.print(table)
    shown = console.export_text(styles=False)
    assert not set(shown) & set("\x1b\x07\x00\u202e")
    assert r"\x1b]0;title\x07\u202e[bold]x[/bold]\x00" in shown
    assert r"run \x1b[31m" in shown
    assert "numbers: [0, 1]\\ntarget: 1" in shown
    assert "secret" not in shown
    assert "selected on these problems, so it is optimistic" in " ".join(shown.split())


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_of_any_width_gets_all_of_it(tmp_path: Path, width: int) -> None:
    """As `eggroll-llm compare` prints into a pipe: nothing is cut, no line is wider."""
    names = [f"countdown-smollm2-135m-a-long-name-{i}" for i in range(4)]
    configs = [make_config(seed=i % 2, sigma=(0.012, 0.024)[i // 2]) for i in range(4)]
    marks = "1100110011001100"
    problems = [{"id": i, "target": i} for i in range(16)]
    paths = [
        write_run(tmp_path / name, {0: "0" * 16, 2: marks[i:] + marks[:i]}, config=config, problems=problems)
        for i, (name, config) in enumerate(zip(names, configs, strict=True))
    ]
    comparison = compare(paths)
    console = Console(width=width, file=io.StringIO(), soft_wrap=True, highlight=False)
    for table in tables(comparison):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    first_columns = "".join(line[: line.find("  ", 1)].strip() for line in shown.splitlines())
    assert all(name in first_columns for name in names)  # folded, but there
    for found in grids(comparison):
        for row in found.rows:
            for cell in row[found.texts :]:
                assert cell in shown
        assert all(word in " ".join(shown.split()) for word in found.note.split()), found.note


def test_numbers_in_words() -> None:
    assert [amount(value) for value in (0, 999, 1000, 12_800, 999_499, 999_600, 1_561_000, 2e9)] == [
        "0",
        "999",
        "1.00 k",
        "12.8 k",
        "999 k",
        "1.00 M",
        "1.56 M",
        "2.00 G",
    ]
    means = [mean_text(Mean(value=0.5156, stderr=stderr)) for stderr in (0.0313, math.nan)]
    assert means == ["51.6 ± 3.1 %", "51.6 %"]


def test_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="name at least one"):
        compare([])


def test_importing_does_not_load_what_only_figures_need() -> None:
    code = "import sys, eval.compare; print('matplotlib' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "False\n"
