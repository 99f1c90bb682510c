"""Task "dataset": where rows come from, what becomes of their columns, and what is said of bad ones."""

import csv
import datetime
import math

import pytest
from dataset_files import SUMS, write
from scored import written

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.errors import ConfigError, TaskError
from eggroll_llm.tasks.dataset.columns import BadRowError, fill
from eggroll_llm.tasks.load import load_task
from eggroll_llm.training.prepare import with_absolute_paths

OPTIONS = {"dataset": "data.jsonl", "rewards": "exact"}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, ending):
    path = write(tmp_path / f"data.{ending}")
    task = load_task("dataset", OPTIONS | {"dataset": path.name, "test_share": 0.2}, base_dir=tmp_path)
    assert (len(task.problems("train")), len(task.problems("test"))) == (80, 20)
    assert {(p["question"], p["answer"]) for split in ("train", "test") for p in task.problems(split)} == {
        (row["question"], row["answer"]) for row in SUMS
    }
    first = task.problems("train")[0]
    assert task.prompt(first) == [{"role": "user", "content": first["question"]}]
    assert task.notes == (
        f"data set: {path.name}, 20 % of whose rows are held out (seed 0); prompt: question; answer: answer; "
        "rewards: exact",
    )


def test_rows_are_held_out_by_seed(load):
    def held_out(seed):
        return [problem["question"] for problem in load(seed=seed).problems("test")]

    assert held_out(0) == held_out(0) != held_out(1)


@pytest.mark.parametrize(
    ("train", "test", "options", "evaluated"),
    [
        (["train.jsonl"], "test.jsonl", {}, "test"),
        (["train.csv"], "validation.json", {}, "validation"),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "data/dev-00000-of-00001.parquet",
            {"test_split": "dev"},
            "dev",
        ),
        (["main/train.jsonl"], "main/test.jsonl", {"subset": "main"}, "test"),
        (["train.jsonl"], "other.jsonl", {"test_file": "hub/other.jsonl"}, "hub/other.jsonl"),
    ],
)
def test_a_folder_is_laid_out_like_a_repository_of_the_hub(tmp_path, train, test, options, evaluated):
    rows = SUMS[:60]
    for i, file in enumerate(train):
        write(tmp_path / "hub" / file, rows[i :: len(train)])
    write(tmp_path / "hub" / test, SUMS[60:])
    task = load_task("dataset", OPTIONS | {"dataset": "hub"} | options, base_dir=tmp_path)
    assert [p["question"] for p in task.problems("test")] == [row["question"] for row in SUMS[60:]]
    assert {p["question"] for p in task.problems("train")} == {row["question"] for row in rows}
    assert f"hub, evaluated on {evaluated};" in task.notes[0]


def test_a_name_that_is_no_path_is_on_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return SUMS[:5] if split == "test" else SUMS[5:]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: ["train", "test", "validation"])
    task = load_task("dataset", OPTIONS | {"dataset": "me/sums", "subset": "main"}, base_dir=tmp_path)
    assert (len(task.problems("train")), len(task.problems("test"))) == (95, 5)
    assert asked == [("me/sums", "main", "train"), ("me/sums", "main", "test")]


def test_configurations_of_a_hub_data_set_are_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, subset, split):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"^openai/gsm8k has several configurations: 'main', 'socratic'. Choose one"):
        load_task("dataset", OPTIONS | {"dataset": "openai/gsm8k"}, base_dir=tmp_path)


@pytest.mark.parametrize("kind", [int, str, float])
def test_a_choice_by_its_position(load, kind):
    rows = [{"question": f"{i}?", "choices": ["a", "b", "c"], "answer": kind(i % 3)} for i in range(9)]
    task = load(rows, rewards="choice", template="{question}\n{choices}")
    for problem in [*task.problems("train"), *task.problems("test")]:
        assert task.gold(problem) == "ABC"[int(problem["answer"])]
        assert task.score(written(f"({task.gold(problem).lower()})", problem)).reward == 1.0
    rows[0]["answer"] = kind(3)
    with pytest.raises(TaskError, match="answer = 3, but choices has 3, counted from 0"):
        load(rows, rewards="choice", template="{question}\n{choices}")


def test_a_choice_that_is_a_number_is_no_position(load):
    rows = [{"question": f"{i}?", "choices": ["1", "2", "3"], "answer": "3"} for i in range(9)]
    with pytest.raises(TaskError, match="choice gives the right answer '3' 0"):
        load(rows, rewards="choice", template="{question}\n{choices}")
    task = load([row | {"answer": 2} for row in rows], rewards="choice", template="{question}\n{choices}")
    assert {task.gold(problem) for problem in task.problems("train")} == {"C"}


def test_of_several_lists_the_choices_are_those_called_so(load):
    rows = [{"question": f"{i}?", "facts": ["x", "y"], "choices": ["a", "b", "c"], "answer": 2} for i in range(9)]
    task = load(rows, rewards="choice", template="{facts}\n{question}\n{choices}")
    assert task.gold(task.problems("train")[0]) == "C"
    unclear = [{"question": f"{i}?", "facts": ["x", "y"], "ways": ["a", "b", "c"], "answer": 2} for i in range(9)]
    with pytest.raises(TaskError, match="choice gives the right answer '2' 0"):
        load(unclear, rewards="choice", template="{facts}\n{question}\n{ways}")


def test_chat_messages_are_the_prompt(load):
    task = load([{"prompt": CHAT, "answer": "2"}, {"prompt": CHAT[1:], "answer": "2"}])
    prompts = [task.prompt(problem) for split in ("train", "test") for problem in task.problems(split)]
    assert sorted(prompts, key=len) == [CHAT[1:], CHAT]


def test_text_to_complete(load):
    task = load(prompt_style="text", template="{question}\nA:", stop=("\n",))
    assert task.prompt(task.problems("train")[0]).endswith("= ?\nA:")
    assert task.stop == ("\n",)


def test_columns_inside_objects_as_verl_has_them(load):
    task = load(
        [
            {"prompt": [{"role": "user", "content": row["question"]}], "reward_model": {"ground_truth": row["answer"]}}
            for row in SUMS
        ]
    )
    assert "prompt: prompt; answer: reward_model.ground_truth" in task.notes[0]
    problem = task.problems("test")[0]
    assert task.gold(problem) == f"<answer>{problem['reward_model']['ground_truth']}</answer>"


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{q}\nA:", "What is {answer}?\nA:"),
        (r"Put it in \boxed{{}} or \boxed{}: { q }", r"Put it in \boxed{} or \boxed{}: What is {answer}?"),
        ("{options}", "A. yes\nB. no"),
        ("{choices}", "1. yes\n2. no"),
        ("{inner.n}", "7"),
        ("{q.__class__} {1} {}", None),
    ],
)
def test_a_template_is_plain_substitution(template, filled):
    row = {
        "q": "What is {answer}?",
        "answer": "hidden",
        "options": ["yes", "no"],
        "choices": {"text": ["yes", "no"], "label": ["1", "2"]},
        "inner": {"n": 7},
    }
    if filled is None:
        with pytest.raises(BadRowError, match="__class__ is missing"):
            fill(template, row)
    else:
        assert fill(template, row) == filled


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": None, "answer": "1"}, r"question is missing or null"),
        ({"answer": "1"}, r"question is missing or null"),
        ({"question": " ", "answer": "1"}, r"question is empty"),
        ({"question": 5, "answer": "1"}, r"question = 5 is not text"),
        ({"question": "?", "answer": ["1"]}, r"answer = \['1'\] is not text"),
        ({"question": "?", "answer": math.nan}, r"answer is missing or nan"),
        ({"question": "?", "answer": "."}, r"exact gives the right answer '.' 0 \(bad_gold\)"),
        ({"question": [{"role": "user"}], "answer": "1"}, r"question holds \{'role': 'user'\}, not a chat message"),
        (
            {"question": [{"role": "assistant", "content": "1"}], "answer": "1"},
            r"question ends with the assistant's message",
        ),
    ],
)
def test_bad_rows_are_counted_and_named(load, row, said):
    rows = [*SUMS[:30], row, *SUMS[30:], row]
    with pytest.raises(TaskError, match=rf"^2 of 102 rows are not usable: .*data\.jsonl:31: {said}.*; .*jsonl:102: "):
        load(rows)
    task = load(rows, skip_bad_rows=True)
    assert len(task.problems("train")) + len(task.problems("test")) == 100
    assert task.notes[1].startswith("2 of 102 rows were left out: ")


def test_a_column_says_what_kind_a_problem_is(load):
    rows = [{"question": f"{i}?", "answer": "1", "level": level} for i, level in enumerate(["easy", 2, None, "easy"])]
    task = load(rows, rewards="exact", kind_column="level")
    kinds = {p["question"]: task.kind(p) for split in ("train", "test") for p in task.problems(split)}
    assert kinds == {"0?": "easy", "1?": "2", "2?": "", "3?": "easy"}
    assert {load(rows, rewards="exact").kind(p) for p in task.problems("train")} == {""}
    with pytest.raises(TaskError, match=r"kind_column = 'levle': no such column.*Did you mean 'level'"):
        load(rows, rewards="exact", kind_column="levle")


def test_what_occurs_twice_is_said(tmp_path):
    write(tmp_path / "hub/train.jsonl", [*SUMS[:50], SUMS[3], {**SUMS[4], "answer": "0"}, SUMS[70]])
    write(tmp_path / "hub/test.jsonl", SUMS[60:])
    task = load_task("dataset", OPTIONS | {"dataset": "hub"}, base_dir=tmp_path)
    assert len(task.problems("train")) == 50
    train = tmp_path / "hub/train.jsonl"
    assert task.notes[1:] == (
        f"1 training rows were left out: they have the prompt of a test row: {train}:53",
        f"2 training rows were left out: they repeat a prompt: {train}:51 as {train}:4; {train}:52 as {train}:5",
    )


@pytest.mark.parametrize(
    ("grader", "answer", "extra"),
    [("gsm8k", "seven", {}), ("choice", "Paris", {}), ("countdown", "1", {"numbers": [1, 2]})],
)
def test_an_answer_that_its_own_grader_refuses_is_found(load, grader, answer, extra):
    with pytest.raises(TaskError, match=rf"100 of 100 rows .*{grader} gives"):
        load([{"question": row["question"], "answer": answer, **extra} for row in SUMS], rewards=grader)


def test_integers_that_a_null_has_made_floats_are_answers_as_they_were(load):
    """Pandas has no null among integers; the row with it is named."""
    task = load([{"question": row["question"], "answer": float(row["answer"])} for row in SUMS])
    assert {str(int(problem["answer"])) == task.rewards.columns.gold(problem) for problem in task.train} == {True}
    assert load([{"question": f"{i}?", "answer": i + 0.5} for i in range(4)]).gold({"answer": 0.5}) == (
        "<answer>0.5</answer>"
    )


def test_what_json_cannot_hold_is_left_out(tmp_path):
    rows = [{**row, "image": b"\xff", "day": datetime.date(2026, 1, 2)} for row in SUMS]
    write(tmp_path / "data.parquet", rows)
    task = load_task("dataset", OPTIONS | {"dataset": "data.parquet"}, base_dir=tmp_path)
    assert {key: task.problems("test")[0].get(key) for key in ("image", "day")} == {"image": None, "day": "2026-01-02"}
    assert task.notes[1] == "columns left out because rewards get only text, numbers and lists: image"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rewards": ()}, r"rewards is missing\. Name a grader \(gsm8k, math, exact"),
        ({"rewards": "exat"}, r"'exat' is not known\. Valid: gsm8k"),
        ({"rewards": ("exact", "exact")}, r"two rewards are called exact"),
        (
            {"rewards": ("exact", "choice"), "reward_weights": (1.0,)},
            r"reward_weights = \[1\.0\] does not have a number",
        ),
        ({"rewards": "other.py:f"}, r"other\.py: there is no such file"),
        ({"rewards": "my.py:reward"}, r"my\.py: does not define reward\."),
        ({"dataset": "dta.jsonl"}, r"dta\.jsonl: there is no such file"),
        ({"test_split": "test"}, r"data\.jsonl is one file, which has no splits\. Remove test_split"),
        ({"prompt_column": "qestion"}, r"prompt_column = 'qestion': no such column; .* Did you mean 'question'"),
        ({"template": "{qestion}"}, r"template has \{qestion\}, but .* Did you mean \{question\}"),
        ({"template": "{question} {answer}"}, r"template shows the answer"),
        ({"template": "Hello"}, r"template shows no column"),
        ({"template": "{question}", "prompt_column": "question"}, r"both a prompt"),
        ({"test_share": 1.0}, r"test_share = 1 is not between 0 and 1"),
        ({"answer_colunm": "x"}, r"unknown key task_options\.answer_colunm.* Did you mean"),
    ],
)
def test_mistakes_are_named(load, options, said):
    with pytest.raises((TaskError, ConfigError), match=said):
        load(**options)


def test_columns_that_have_other_names_are_asked_for(load):
    with pytest.raises(TaskError, match=r"which column is the prompt\? There are 'frage', 'antwort'"):
        load([{"frage": "?", "antwort": "1"}] * 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('question,answer\n"a,1\n', r":\d: is not CSV \(unexpected end of data\)"),
        ("question,answer\na,b,1\n", r"data\.csv:2: the row has more cells"),
        ("question,answer\na\n", r"data\.csv:2: the row has fewer cells"),
        ("question,question\na,1\n", r"data\.csv:1: the first line has to name the columns, each once"),
        ("question,answer\n", r"the table is empty"),
        ("question,answer\n\xe9,1\n".encode("latin-1"), r"data\.csv:2: is not UTF-8"),
    ],
)
def test_damaged_csv(tmp_path, text, said):
    (tmp_path / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TaskError, match=said):
        load_task("dataset", OPTIONS | {"dataset": "data.csv"}, base_dir=tmp_path)


def test_a_cell_may_be_long(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "data.csv").write_text(f"question,answer\n{'a' * 200_000},1\nb,2\n")
    task = load_task("dataset", OPTIONS | {"dataset": "data.csv", "test_share": 0.5}, base_dir=tmp_path)
    both = [*task.problems("train"), *task.problems("test")]
    assert {len(p["question"]) for p in both} == {1, 200_000}
    assert csv.field_size_limit() == before


def test_a_csv_of_a_spreadsheet_reads_as_it_looks(tmp_path):
    cells = '\ufeffquestion,answer\r\n"a, or\u2028b?\r\nsecond line",1\r\nc?,2\r\n'
    (tmp_path / "data.csv").write_bytes(cells.encode())
    task = load_task("dataset", OPTIONS | {"dataset": "data.csv", "test_share": 0.5}, base_dir=tmp_path)
    both = [*task.problems("train"), *task.problems("test")]
    assert {p["question"] for p in both} == {"a, or\u2028b?\r\nsecond line", "c?"}


def test_paths_become_absolute_and_names_on_the_hub_stay(tmp_path):
    recipe = tmp_path / "r.toml"
    (tmp_path / "here").mkdir()
    recipe.write_text(
        'task = "dataset"\nsteps = 1\n[task_options]\ndataset = "here"\nrewards = ["math", "my.py:f"]\n'
        "[es]\nsigma = 1e-3\nlearning_rate = 1e-3\n"
    )
    options = with_absolute_paths(load_recipe(recipe), tmp_path).task_options
    assert options == {"dataset": str(tmp_path / "here"), "rewards": ["math", f"{tmp_path / 'my.py'}:f"]}
    config = load_recipe(recipe, [("task_options.dataset", "openai/gsm8k")])
    assert with_absolute_paths(config, tmp_path).task_options["dataset"] == "openai/gsm8k"
