"""Comparisons against numbers computed by hand."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_runs import PROBLEMS, make_config, write_run
from rich.console import Console

from eggroll_llm.errors import ConfigError
from eval.compare import compare
from eval.tables import amount, grids, p_text, pair_text, percent, points, tables

# Neither a package nor on the path: test modules are imported by their files.


def test_a_run_is_tested_against_its_own_base_model(tmp_path: Path) -> None:
    """Eight problems: four won, one lost, so that p = 2 (C(5,0) + C(5,1)) / 2^5."""
    comparison = compare([write_run(tmp_path / "run", {0: "10001000", 2: "11111111", 4: "01111010"})])
    (test,) = comparison.tests
    assert (test.first, test.second, test.available) == ("run, base model", "run, step 4", 8)
    assert test.accuracies == (0.25, 0.625)
    assert (test.result.wins, test.result.losses) == ((1, 2, 3, 6), (0,))
    assert test.result.difference == 0.375
    assert test.result.p_value == 2 * (1 + 5) / 2**5
    low, high = test.result.interval
    assert -0.25 <= low < 0.375 < high <= 1
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


def test_others_are_tested_against_the_first(tmp_path: Path) -> None:
    rights = {"a": "1100", "b": "1111", "c": "0100"}
    paths = [write_run(tmp_path / name, {0: "0000", 2: right}) for name, right in rights.items()]
    tests = compare(paths).tests
    assert [(pair_text(test), test.result.difference) for test in tests] == [
        ("a, base model → step 2", 0.5),
        ("b, base model → step 2", 1.0),
        ("c, base model → step 2", 0.25),
        ("a, step 2 → b, step 2", 0.5),
        ("a, step 2 → c, step 2", -0.25),
    ]


def test_the_same_runs_give_the_same_comparison(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10001000", 4: "01111010"})
    assert compare([path]) == compare([path])


def test_pairs_are_the_problems_that_both_have(tmp_path: Path) -> None:
    """b has p1 to p4, the target of p2 changed: three in common, in another order."""
    other = [PROBLEMS[4], {**PROBLEMS[2], "target": -1}, PROBLEMS[3], PROBLEMS[1]]
    a = write_run(tmp_path / "a", {0: "00000000", 2: "11111000"})
    b = write_run(tmp_path / "b", {0: "0000", 2: "0110"}, problems=other)
    *_, test = compare([a, b]).tests
    assert (test.result.problems, test.available) == (3, 8)
    assert test.accuracies == (1.0, 1 / 3)
    assert [example.id for example in test.lost] == ["p1", "p4"]
    assert [row[1] for row in grids(compare([a, b]))[2].rows] == ["8", "4", "3 of 8"]


def test_runs_without_a_common_problem_are_not_tested(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {0: "00", 2: "11"})
    b = write_run(tmp_path / "b", {0: "00", 2: "11"}, problems=PROBLEMS[2:4], config=make_config(seed=1))
    comparison = compare([a, b])
    assert len(comparison.tests) == 2
    assert comparison.notes == (
        "a, step 2 and b, step 2 are not tested in pairs: they have no problem in common. Compare runs with the same "
        "task, task_options and eval.problems.",
    )


def test_runs_from_before_answers_were_recorded_are_compared_without_tests(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", {0: "0001", 2: "0011"}, finished=False)
    new = write_run(tmp_path / "new", {0: "0001", 2: "0011"}, config=make_config(seed=1))
    for file in (old / "evaluations").iterdir():
        file.unlink()
    comparison = compare([old, new])
    assert [pair_text(test) for test in comparison.tests] == ["new, base model → step 2"]
    assert [run.final.accuracy for run in comparison.runs] == [0.5, 0.5]
    unfinished, *missing = comparison.notes
    assert unfinished == "old is not finished: its final accuracy is that of step 2"
    assert [note.partition(": ")[0] for note in missing] == [
        "old, base model and old, step 2 are not tested in pairs",
        "old, step 2 and new, step 2 are not tested in pairs",
    ]


def test_equal_budgets(tmp_path: Path) -> None:
    """Totals: slow 40 completions, 400 tokens, 400 s; quick 48, 320 and 80. Step by step, quick takes 6, 40 and 10."""
    slow = write_run(tmp_path / "slow", {0: "0000", 2: "1000", 4: "1110"}, spent=(10, 100, 100.0))
    quick = write_run(tmp_path / "quick", {0: "0000", 3: "1100", 6: "1000", 8: "1111"}, spent=(6, 40, 10.0))
    reached = {
        cut.budget: (cut.amount, [(point.step, point.accuracy) for point in cut.reached if point])
        for cut in compare([slow, quick]).cuts
    }
    assert reached == {
        "completions": (40, [(4, 0.75), (6, 0.25)]),
        "tokens": (320, [(2, 0.25), (8, 1.0)]),
        "seconds": (80.0, [(0, 0.0), (8, 1.0)]),
    }


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
    assert (seeds.base.value, seeds.base.stderr) == (0.0, 0.0)
    assert seeds.final.value == 0.5
    assert seeds.final.stderr == pytest.approx(0.25 / math.sqrt(3), rel=1e-12)
    assert seeds.within["tokens"] == seeds.final
    assert (wide.label, wide.final.value) == ("es sigma=0.03 (1 seed)", 1.0)
    assert math.isnan(wide.final.stderr)


def test_the_same_seed_twice_is_said_to_be_no_seed_more(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / name, {0: "01", 1: "11"}) for name in ("a", "b")])
    assert comparison.groups[0].label == "es (1 seed)"
    assert comparison.notes == ("es (1 seed) holds runs of the same seed, which are not independent",)


def test_a_run_with_nothing_but_its_base_model(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "run", {0: "01"}, finished=False)])
    assert comparison.tests == ()
    assert comparison.runs[0].final == comparison.runs[0].base
    assert [grid.title for grid in grids(comparison)] == ["Runs"]


def test_a_run_whose_base_model_was_not_evaluated(tmp_path: Path) -> None:
    comparison = compare(
        [write_run(tmp_path / "run", {2: "01", 4: "11"}), write_run(tmp_path / "b", {0: "00", 4: "01"})]
    )
    assert comparison.runs[0].base is None
    assert [pair_text(test) for test in comparison.tests] == ["b, base model → step 4", "run, step 4 → b, step 4"]
    assert math.isnan(comparison.groups[0].base.value)
    assert grids(comparison)[0].rows[0][7] == "–"


def test_json_is_strict(tmp_path: Path) -> None:
    text = compare([write_run(tmp_path / "run", {0: "1000", 2: "1111"})]).json()
    assert text.isascii()
    values = json.loads(text, parse_constant=pytest.fail)
    assert values["tests"][0]["result"]["wins"] == [1, 2, 3]
    assert values["groups"][0]["final"] == {"value": 1.0, "stderr": None}
    assert values["cuts"][1]["budget"] == "tokens"


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
    assert "selected on these very problems, so it is optimistic" in " ".join(shown.split())


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
    assert (percent(0.5156), percent(0.5156, 0.0313), percent(math.nan)) == ("51.6 %", "51.6 ± 3.1 %", "–")
    assert (points(0.145), points(-0.02)) == ("+14.5", "−2.0")
    assert (p_text(0.03125), p_text(1.0), p_text(2e-5)) == ("0.031", "1", "< 0.0001")


def test_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="name at least one"):
        compare([])


def test_importing_does_not_load_what_only_figures_need() -> None:
    code = "import sys, eval.compare; print('matplotlib' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "False\n"
