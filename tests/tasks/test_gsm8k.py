import json
import sys
import types
from pathlib import Path

import pytest
from scored import written

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.load import load_task

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def row(n, question=None):
    return {
        "question": question or f"What is {n} and {n}?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n:,}",
    }


def write(folder, train, test):
    for name, rows in (("train", train), ("test", test)):
        lines = [text if isinstance(text, bytes) else json.dumps(text).encode() + b"\n" for text in rows]
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines))


def load(folder, **options):
    return load_task("gsm8k", {"data_dir": str(folder), **options}, base_dir=Path("/nowhere"))


@pytest.mark.parametrize("ending", [".json", ".parquet", "-00000-of-00001.parquet"])
def test_files_of_other_kinds(folder, ending):
    before = load(folder)
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").unlink()
        if ending == ".json":
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
        else:
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(
                pyarrow.Table.from_pylist(rows), folder / f"{split}{ending}"
            )
    assert load(folder) == before


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, [row(n) for n in range(600, 606)], [row(1), row(2)])
    return tmp_path


def test_rows(folder):
    task = load(folder)
    assert [problem["id"] for problem in task.problems("train")] == [f"train-{n}" for n in range(1, 7)]
    problem = task.problems("train")[0]
    assert problem["answer"] == "1200"
    assert problem["solution"].endswith("#### 1,200")
    assert task.gold(problem) == problem["solution"]
    assert task.notes == ()


def test_a_relative_folder_is_the_recipes(folder):
    task = load_task("gsm8k", {"data_dir": folder.name}, base_dir=folder.parent)
    assert len(task.problems("test")) == 2


@pytest.mark.parametrize(("style", "asked"), [({}, "####"), ({"prompt_style": "boxed"}, "\\boxed{}")])
def test_chat_prompt(folder, style, asked):
    task = load(folder, **style)
    [message] = task.prompt(task.problems("test")[0])
    assert message["role"] == "user"
    assert message["content"].startswith("What is 1 and 1?\n")
    assert asked in message["content"]
    assert task.stop == ()


def test_few_shot_prompt(folder):
    task = load(folder, prompt_style="few_shot", shots=2)
    problem = task.problems("test")[0]
    first, second, last = task.prompt(problem).split("\n\n")
    assert last == "Question: What is 1 and 1?\nAnswer:"
    for shot, text in zip(task.shots, (first, second), strict=True):
        assert text.startswith(f"Question: {shot['question']}\nAnswer: ")
        assert text.endswith(f"#### {int(shot['answer']):,}")
        assert "<<" not in text
        assert shot not in task.problems("train")
    assert len(task.problems("train")) == 4
    assert task.stop == ("\nQuestion:",)
    assert load(folder, prompt_style="few_shot", shots=2).shots == task.shots
    assert any(load(folder, prompt_style="few_shot", shots=2, seed=seed).shots != task.shots for seed in (1, 2))


def test_score_and_grader(folder):
    problem = load(folder).problems("train")[0]
    assert load(folder).score(written("#### $1,200", problem)).correct
    assert load(folder).score(written("#### 1,200", problem, truncated=True)).detail == "truncated"
    assert load(folder, grader="flexible").score(written("about 1200", problem)).correct
    assert not load(folder, grader="strict").score(written("####1200", problem)).correct


def test_the_format_reward_is_for_a_finished_answer(folder):
    problem = load(folder).problems("train")[0]
    assert load(folder).score(written("#### 7", problem)).reward == 0
    task = load(folder, format_reward=0.2)
    assert task.score(written("#### 1,200", problem)).reward == 1
    wrong = task.score(written("#### 7", problem))
    assert (wrong.reward, wrong.correct, wrong.detail) == (0.2, False, "wrong_value")
    assert task.score(written("It is 7.", problem)).reward == 0
    assert task.score(written("#### 7", problem, truncated=True)).reward == 0


@pytest.mark.parametrize("style", ["chat", "boxed", "few_shot"])
def test_questions_of_test_are_left_out_of_train(tmp_path, style):
    write(tmp_path, [row(1), row(2), row(3), row(4)], [row(2), row(9)])
    task = load(tmp_path, prompt_style=style, shots=1)
    questions = [problem["question"] for problem in (*task.problems("train"), *task.shots)]
    assert sorted(questions) == ["What is 1 and 1?", "What is 3 and 3?", "What is 4 and 4?"]
    assert task.notes == ("GSM8K: 1 training problems were left out because they are also test problems.",)


@pytest.mark.parametrize(
    ("bad", "line", "message"),
    [
        ({"question": "q"}, 2, "answer is missing"),
        ({"answer": "#### 1"}, 2, "question is missing"),
        ({"question": "q", "answer": 5}, 2, "answer = 5 is not text"),
        ({"question": " ", "answer": "#### 1"}, 2, "question = ' ' is not text"),
        ({"question": "q", "answer": "it is 5"}, 2, "answer ends with 'it is 5', not with a line ####"),
        ({"question": "q", "answer": "#### many"}, 2, "not with a line #### and a plain number"),
        ({"question": "q", "answer": "#### 18 eggs"}, 2, "not with a line #### and a plain number"),
        ({"question": "q \ud83d", "answer": "#### 1"}, 2, r"'question' = 'q \\ud83d' is not valid Unicode text"),
        ({"question": "q", "answer": "\udc00 #### 1"}, 2, "'answer' = .* is not valid Unicode text"),
        (row(1), 2, r"the same question is already at .*train.jsonl:1"),
        ([1, 2], 2, "is not a JSON object"),
        (b"\n", 2, "the line is empty"),
        (b'{"question": "q", "answer": "#### 1"}\r\n', 2, "ends with CR LF"),
        (b'{"question": "q", "answer": \n', 2, "is not JSON"),
        (b'{"question": "q", "answer": "\xff#### 1"}\n', 2, "is not JSON in UTF-8"),
        (b"[" * 100_000 + b"\n", 2, "is not JSON"),
        ('{"question": "q", "answer": "#### 1"}'.encode("utf-16-le") + b"\n", 2, "is not JSON in UTF-8"),
        (b'{"question": "q", "ans', 2, "the last line is cut off"),
    ],
)
def test_malformed_rows_are_named_with_file_and_line(tmp_path, bad, line, message):
    write(tmp_path, [row(1), bad], [row(2)])
    with pytest.raises(TaskError, match=rf"train.jsonl:{line}: .*{message}"):
        load(tmp_path)


def test_a_byte_order_mark_an_empty_file_and_none_are_named(tmp_path):
    write(tmp_path, [b"\xef\xbb\xbf", row(1)], [row(2)])
    with pytest.raises(TaskError, match=r"train.jsonl:1: .*byte order mark"):
        load(tmp_path)
    write(tmp_path, [row(1)], [b""])
    with pytest.raises(TaskError, match=r"test.jsonl:1: the file is empty"):
        load(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(TaskError, match=r"test.jsonl: there is no such file"):
        load(tmp_path)
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(TaskError, match=r"test.jsonl: cannot be read"):
        load(tmp_path)


def test_a_last_line_without_newline_is_complete(tmp_path):
    write(tmp_path, [row(1), json.dumps(row(3)).encode()], [row(2)])
    assert len(load(tmp_path).problems("train")) == 2


def test_too_few_problems(tmp_path):
    write(tmp_path, [row(1)], [row(1)])
    with pytest.raises(TaskError, match="no training problem is left"):
        load(tmp_path)
    with pytest.raises(TaskError, match="shots = 4 leaves none of 0"):
        load(tmp_path, prompt_style="few_shot")
    with pytest.raises(TaskError, match="shots = 0 is too small"):
        load(tmp_path, shots=0)


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_format_reward_as_large_as_a_right_answers_is_refused(folder, value):
    with pytest.raises(TaskError, match=r"format_reward = .* is not in"):
        load(folder, format_reward=value)


def test_the_hub(monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config) == ("openai/gsm8k", "main")
        return [row(1), row(2), row(2)] if split == "train" else [row(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load_task("gsm8k", {}, base_dir=Path())
    assert [problem["id"] for problem in task.problems("train")] == ["train-1", "train-2"]
    assert task.notes == ("GSM8K: 1 repeated rows were left out of train.",)


def test_the_hub_out_of_reach(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TaskError, match=r"openai/gsm8k cannot be loaded .*ConnectionError: no route\). .*Set data_dir"):
        load_task("gsm8k", {}, base_dir=Path())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"Run: .* -m pip install .*datasets.*, or set data_dir"):
        load_task("gsm8k", {}, base_dir=Path())


def test_the_published_data():
    if not (DATA / "train.jsonl").is_file():
        pytest.skip(f"{DATA} is not here")
    task = load(DATA)
    assert (len(task.problems("train")), len(task.problems("test")), task.notes) == (7473, 1319, ())
    assert task.problems("test")[0]["answer"] == "18"
    assert len({problem["id"] for split in ("train", "test") for problem in task.problems(split)}) == 7473 + 1319


def test_what_a_majority_votes_on(folder):
    task = load_task("gsm8k", {"data_dir": str(folder)}, base_dir=folder)
    assert task.answer(written("So #### $1,018.")) == "1018"
    assert task.answer(written("#### 18 or 17")) is None
    assert task.answer(written("#### 18", truncated=True)) is None
    strict = load_task("gsm8k", {"data_dir": str(folder), "grader": "strict"}, base_dir=folder)
    assert strict.answer(written("#### 18 or 17")) == "18"
