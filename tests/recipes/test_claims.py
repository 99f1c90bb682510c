"""The tables of docs/claims.md are those of the results beside it, and `make claims` runs what it says."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["tables", "run"])
def script(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes" / "claims"))
        yield importlib.import_module(request.param)
    sys.modules.pop(request.param)


@pytest.mark.parametrize("script", ["tables"], indirect=True)
def test_the_page_has_the_tables_of_what_was_measured(script):
    """`python recipes/claims/tables.py` prints them."""
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    found = set()
    for title, table in script.TABLES.items():
        try:
            assert table(script.MEASURED) in page, title
        except FileNotFoundError:
            continue
        found.add(title)
    assert {"Error of low rank", "Reinforcement learning", "Time of a generation"} <= found


@pytest.mark.parametrize("script", ["tables"], indirect=True)
def test_what_fits_is_what_the_line_leaves(script, tmp_path):
    """2 GiB and 4 MiB a sequence leave room for 512 in 4 GiB; what is off the line is said."""
    points = [{"method": "ES", "sequences": n, "peak_gib": 2 + n / 256} for n in (64, 128, 256)]
    points += [{"method": "GRPO", "sequences": n, "peak_gib": 3 + n / 8 + 0.1 * (n == 16)} for n in (8, 16, 24)]
    (tmp_path / "generations.json").write_text(json.dumps({"points": points}))
    es, grpo = script.generations(tmp_path).splitlines()[2:]
    assert es.endswith("| 2.00 | 4.0 | 0.00 | 512 | 1,536 | 3,584 |")
    assert grpo.endswith("| 3.03 | 128.0 | 0.07 | 7 | 39 | 103 |")


@pytest.mark.parametrize("script", ["tables"], indirect=True)
def test_a_task_is_learned_where_the_tests_that_reach_its_mark_begin(script, tmp_path):
    history = [[0.5, 100, 20.0], [1.0, 2000, 490.0], [2.0, 9000, 480.0]]
    runs = [
        {"task": "cartpole", "width": 64, "seed": seed, "held": 2, "solved": True, "history": history}
        | {"method": method}
        for method, seed in (("EGGROLL", 1), ("EGGROLL", 0), ("OpenES", 0), ("OpenES", 1))
    ]
    runs[0] |= {"solved": False}
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert "| cartpole | 3 × 64 | EGGROLL | 2, – | 2, – | 1.0, – | 330, 330 |" in script.returns(tmp_path)
    assert "cartpole" not in script.ratios(tmp_path)
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs[1:3]))
    assert "| cartpole | 3 × 64 | 1 | 1.00 | 1.00 |" in script.ratios(tmp_path)


@pytest.mark.parametrize("script", ["run"], indirect=True)
def test_a_part_replaces_its_results_and_one_that_fails_is_named(script, tmp_path, monkeypatch, capfd):
    results = "import pathlib, sys; pathlib.Path(sys.argv[1], 'one.json').write_text('new')"
    (tmp_path / "job.py").write_text(results)
    parts = {
        "bad": script.Part(jobs={"bad": "-c raise(SystemExit(3))"}),
        "good": script.Part(jobs={"good": f"{tmp_path}/job.py {{out}}"}, results="*.json"),
        "left": script.Part(jobs={"left": "-c raise(SystemExit(4))"}, results="*.jsonl"),
    }
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["run.py", "bad", "good", "--out", str(tmp_path)])
    for name in ("old.json", "old.jsonl"):
        (tmp_path / name).write_text("{}")
    assert script.main() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bad.log", "good.log", "job.py", "old.jsonl", "one.json"}
    assert "failed: bad\n" in capfd.readouterr().out


@pytest.mark.parametrize("script", ["run"], indirect=True)
def test_every_job_has_its_script(script):
    for part in script.PARTS.values():
        for arguments in part.jobs.values():
            first, second, *_ = arguments.format(here=script.HERE, out="").split()
            module = ROOT / (second.replace(".", "/") + "/__main__.py")
            assert Path(first).is_file() or (first == "-m" and (module.is_file() or second == "pytest"))
