"""`init` writes what loads, and overwrites nothing."""

import pytest
from dataset_files import SUMS, write
from scored import written

from eggroll_llm.cli.main import main
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.tasks.load import load_task


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)


def loaded(recipe, folder):
    config = load_recipe(folder / recipe)
    return load_task(config.task, config.task_options, base_dir=(folder / recipe).parent)


def test_a_task_that_loads(tmp_path, capsys):
    assert main(["init", "made/my_task.py"]) == 0
    out = capsys.readouterr().out
    assert "wrote made/my_task.py and made/my_task.toml" in out
    assert "train made/my_task.toml" in out
    task = loaded("made/my_task.toml", tmp_path)
    problem = task.problems("train")[0]
    assert "my_task.toml --dry-run" in (tmp_path / "made/my_task.py").read_text()
    assert [task.score(written(text, problem)).reward for text in (task.gold(problem), " 7", "?")] == [1.0, 0.1, 0.0]
    assert not {task.prompt(p) for p in task.problems("train")} & {task.prompt(p) for p in task.problems("test")}


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (SUMS, ['template = "{question}\\nThink', 'answer_column = "answer"', 'rewards = "gsm8k"']),
        ([{"problem": f"{i}?", "solution": f"\\frac{{{i}}}{{7}}"} for i in range(9)], ["\\\\boxed{}", "math"]),
        (
            [{"question": f"{i}?", "choices": ["a", "b"], "answer": "B"} for i in range(9)],
            ["{question}\\n{choices}\\nAnswer with the letter", 'rewards = "choice"'],
        ),
        (
            [{"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(9)],
            ["{question}\\n{choices}\\nAnswer with the letter", 'rewards = "choice"'],
        ),
        ([{"nums": [1, i], "target": 1 + i} for i in range(9)], ['template = "Give an', 'rewards = "countdown"']),
        (
            [
                {"prompt": [{"role": "user", "content": f"{i}?"}], "choices": ["1", "0"], "answer": "1"}
                for i in range(9)
            ],
            ['prompt_column = "prompt"', 'rewards = "gsm8k"'],
        ),
        (
            [
                {"prompt": [{"role": "user", "content": f"{i}?"}], "reward_model": {"ground_truth": "yes"}}
                for i in range(9)
            ],
            ['prompt_column = "prompt"', 'answer_column = "reward_model.ground_truth"', 'rewards = "exact"'],
        ),
        ([{"nums": [1, i], "target": 1 + i, "question": f"{i}?"} for i in range(9)], ['rewards = "countdown"']),
    ],
)
def test_a_recipe_for_the_columns_of_a_file(tmp_path, rows, lines):
    write(tmp_path / "data.jsonl", rows)
    assert main(["init", "made/r.toml", "--dataset", "data.jsonl"]) == 0
    text = (tmp_path / "made/r.toml").read_text()
    assert 'dataset = "../data.jsonl"' in text
    assert all(line in text for line in lines), text
    if "math" in lines:
        pytest.importorskip("math_verify")
    task = loaded("made/r.toml", tmp_path)
    assert len(task.problems("train")) + len(task.problems("test")) == len(rows)
    if "nums" in rows[0]:
        assert "uses 1, " in task.prompt(task.problems("train")[0])[0]["content"]


def test_columns_with_other_names_are_left_to_fill_in(tmp_path, capsys):
    write(tmp_path / "data.csv", [{"frage": "?", "antwort": "1"}] * 3)
    assert main(["init", "r.toml", "--dataset", "data.csv"]) == 0
    text = (tmp_path / "r.toml").read_text()
    assert "# columns: 'frage', 'antwort'" in text
    assert 'prompt_column = ""' in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["made/my_task.py"], "made/my_task.toml: exists already. Name another file, or remove it first."),
        (["made/my_task.toml"], "made/my_task.toml: name a file that ends with .py. With --dataset DATA it writes"),
        (["made/t.py", "--dataset", "d.csv"], "made/t.py: name a file that ends with .toml."),
        (["made/t.toml", "--dataset", "d.csv"], "d.csv: there is no such file."),
        (["made/t.py", "--subset", "main"], "--subset belongs to --dataset"),
        (["none/t.py"], "none/t.py: cannot be written (No such file or directory)"),
    ],
)
def test_nothing_is_overwritten(tmp_path, capsys, words, said):
    (tmp_path / "made/my_task.toml").write_text("mine")
    assert main(["init", *words]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["my_task.toml"]
    assert (tmp_path / "made/my_task.toml").read_text() == "mine"
