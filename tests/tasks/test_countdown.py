import io
import json
import random
import re
import sys
import time
from fractions import Fraction

import pytest
from scored import written

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.countdown_generate import Space, _text, draw_problems, key_of
from eggroll_llm.tasks.load import load_task
from rewards import Score, countdown

SMALL = {
    "count": [2, 2],
    "number_range": [1, 20],
    "target_range": [1, 100],
    "operators": "+-*",
    "prompt_style": "few_shot",
}
RANGES = [
    SMALL,
    {"count": [1, 3], "number_range": [0, 9], "target_range": [-5, 30], "test_size": 50, "train_size": 100},
    {"count": [3, 4], "number_range": [1, 99], "target_range": [10, 99], "test_size": 50, "train_size": 100},
    {"count": [6, 6], "number_range": [25, 75], "operators": "-/+", "test_size": 20, "train_size": 20},
]


def load(tmp_path, **options):
    return load_task("countdown", options, base_dir=tmp_path)


def keys(problems):
    return [key_of(problem["numbers"], problem["target"]) for problem in problems]


@pytest.mark.parametrize("options", RANGES)
def test_generated_problems_are_in_range_solvable_and_different(tmp_path, options):
    task = load(tmp_path, **options)
    problems = [*task.problems("train"), *task.problems("test"), *task.shots]
    assert len(set(keys(problems))) == len({problem["id"] for problem in problems}) == len(problems)
    for problem in problems:
        numbers, target, solution = problem["numbers"], problem["target"], problem["solution"]
        assert options["count"][0] <= len(numbers) <= options["count"][1]
        assert all(options["number_range"][0] <= number <= options["number_range"][1] for number in numbers)
        low, high = options.get("target_range", [1, 100])
        assert low <= target <= high
        assert set(solution) <= set("0123456789()" + options.get("operators", "+-*/"))
        assert countdown.score(f"<answer>{solution}</answer>", numbers, target).correct
        assert task.score(written(task.gold(problem), problem)).correct


def test_the_test_split_comes_first_and_train_gets_the_rest(tmp_path):
    task = load(tmp_path, **SMALL)
    # By brute force: every pair, operator and order.
    space = set()
    for a in range(1, 21):
        for b in range(1, 21):
            space |= {key_of([a, b], value) for value in (a + b, a - b, a * b) if 1 <= value <= 100}
    assert len(task.problems("test")) == 256
    assert len(task.problems("train")) == len(space) - 256 - 3
    assert set(keys([*task.problems("train"), *task.problems("test"), *task.shots])) == space
    [note] = task.notes
    assert note.startswith(
        f"Countdown trains on all {len(space) - 259} available problems, fewer than train_size = 4096"
    )


def test_problems_are_the_same_every_time_and_another_seed_gives_others(tmp_path):
    first, second = load(tmp_path, **SMALL), load(tmp_path, **SMALL)
    assert (first.train, first.test, first.shots) == (second.train, second.test, second.shots)
    assert first.test != load(tmp_path, **SMALL, seed=1).test
    assert first.test[0] == {"id": "7_13=6", "numbers": [13, 7], "target": 6, "solution": "13-7"}


def test_the_test_split_does_not_depend_on_the_size_of_train(tmp_path):
    assert load(tmp_path, **SMALL, train_size=5).test == load(tmp_path, **SMALL).test
    assert len(load(tmp_path, **SMALL, train_size=5).train) == 5


def test_the_end_of_train_is_like_its_beginning(tmp_path):
    """A validation split is cut off there. Where nearly all problems are drawn, the last ones are the unlikely ones."""
    train = load(tmp_path, count=[2, 2], number_range=[1, 50], target_range=[1, 100], operators="+-*").problems("train")
    assert 2000 < len(train) < 2500  # all there are
    sums = [sum("+" in problem["solution"] for problem in part) / 700 for part in (train[:700], train[-700:])]
    assert abs(sums[0] - sums[1]) < 0.08


def test_too_small_a_space(tmp_path):
    with pytest.raises(TaskError, match="only 514 different problems, too few for test_size = 514"):
        load(tmp_path, **SMALL, test_size=514)
    with pytest.raises(TaskError, match="only 0 different problems"):
        load(tmp_path, count=[2, 2], number_range=[1, 3], target_range=[50, 60])


def test_drawing_from_a_large_space_is_fast():
    space = Space(count=(3, 4), number_range=(1, 99), target_range=(1, 100), operators="+-*/")
    start = time.process_time()
    assert len(draw_problems(space, random.Random(0), 2000, set())) == 2000
    assert time.process_time() - start < 2


def test_solutions_have_the_parentheses_they_need_and_no_others():
    leaf = [(value, None) for value in range(10)]

    def join(left, sign, right):
        return 0, (left, sign, right)

    assert _text(join(join(leaf[1], "+", leaf[2]), "*", leaf[3]))[0] == "(1+2)*3"
    assert _text(join(leaf[3], "*", join(leaf[1], "*", leaf[2])))[0] == "3*1*2"
    assert _text(join(leaf[3], "-", join(leaf[1], "+", leaf[2])))[0] == "3-(1+2)"
    assert _text(join(leaf[3], "+", join(leaf[1], "-", leaf[2])))[0] == "3+1-2"
    assert _text(join(leaf[8], "/", join(leaf[4], "*", leaf[2])))[0] == "8/(4*2)"
    assert _text(join(join(leaf[8], "/", leaf[4]), "/", leaf[2]))[0] == "8/4/2"


def test_few_shot_prompt(tmp_path):
    task = load(tmp_path, **SMALL)
    problem = {"id": "4_5=9", "numbers": [5, 4], "target": 9}
    *shots, last = task.prompt(problem).split("\n")
    assert last == "Make 9 from 5 and 4:"
    assert len(shots) == 3
    for shot, sign in zip(shots, "+-*", strict=True):
        assert sign in shot.partition(":")[2]
    assert task.stop == ("\n",)
    assert task.score(written(" 4+5=9", problem)).reward == 1
    assert task.score(written(" 4+5", problem)).reward == 1
    assert task.score(written(" 4*5=9\nMake", problem)).reward == 0.1
    assert task.score(written("<answer>4+5</answer>", problem)).reward == 0


def test_few_shot_prompt_lists_three_numbers(tmp_path):
    task = load(tmp_path, prompt_style="few_shot", test_size=1, train_size=1)
    assert task.prompt({"numbers": [3, 4, 5], "target": 12}).endswith("\nMake 12 from 3, 4 and 5:")


def test_chat_prompt(tmp_path):
    problem = {"numbers": [3, 7, 25], "target": 46}
    [message] = load(tmp_path, test_size=1, train_size=1).prompt(problem)
    assert message["role"] == "user"
    for words in ("equals 46", "3, 7 and 25", "each exactly once", "+ - * /", "<answer>"):
        assert words in message["content"]
    task = load(tmp_path, test_size=1, train_size=1, use_all=False)
    assert "each at most once" in task.prompt(problem)[0]["content"]
    assert task.score(written("<answer>25 - 3</answer>", {**problem, "target": 22})).correct
    assert task.stop == ()


def test_tinyzero_prompt(tmp_path):
    prompt = load(tmp_path, prompt_style="tinyzero", test_size=1, train_size=1).prompt(
        {"numbers": [3, 7], "target": 21}
    )
    assert "Using the numbers [3, 7], create an equation that equals 21." in prompt
    assert prompt.endswith("Assistant: Let me solve this step by step.\n<think>")


def test_a_tinyzero_answer_inside_the_thought_is_none(tmp_path):
    """The prompt opens the thought: what is not behind its end was not answered, cut off or not."""
    task = load(tmp_path, prompt_style="tinyzero", test_size=1, train_size=1)
    problem = {"numbers": [44, 19, 35], "target": 98, "solution": "44+19+35"}
    for cut in (False, True):
        inside = "... it is <answer>44 + 19 + 35</answer>? Wait, must I"
        assert task.score(written(inside, problem, truncated=cut)) == Score(0.0, False, "no_answer")
        assert task.answer(written(inside, truncated=cut)) is None
        assert task.score(written(f"{inside}</think>\n<answer>44+19+35</answer>", problem, truncated=cut)).correct
    assert task.gold(problem) == "</think>\n<answer>44+19+35</answer>"
    assert task.score(written(task.gold(problem), problem)).correct


def test_the_format_reward_can_be_set(tmp_path):
    task = load(tmp_path, test_size=1, train_size=1, format_reward=0.0)
    assert task.score(written("<answer>1</answer>", {"numbers": [3, 7], "target": 21})).reward == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": [3, 2]}, r"count = \[3, 2\] is not a range"),
        ({"count": [0, 2]}, r"count = \[0, 2\] is not a range"),
        ({"count": [2, 17]}, "count = .* is too large"),
        ({"number_range": [-1, 5]}, "number_range = .* is not a range"),
        ({"target_range": [5, 1]}, "target_range = .* is not a range"),
        ({"operators": ""}, 'operators = "" is not valid'),
        ({"operators": "+^"}, "operators = .* is not valid"),
        ({"operators": "++"}, "operators = .* is not valid"),
        ({"train_size": 0}, "train_size = 0 is too small"),
        ({"test_size": 0}, "test_size = 0 is too small"),
        ({"format_reward": 1.0}, "format_reward = 1.0 is not in"),
        ({"file": "a", "hub": "b"}, "file and hub are both given"),
        ({"test_file": "a"}, "test_file is given without file"),
    ],
)
def test_contradictory_options(tmp_path, options, message):
    with pytest.raises(TaskError, match=message):
        load(tmp_path, **options)


def write(path, *problems):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")


ROW = b'{"nums": [4, 5], "target": 9}\n'


def numbered(amount):
    return [{"nums": [n, 1], "target": n + 1, "solution": f"{n}+1"} for n in range(2, amount + 2)]


def test_one_file_is_split_by_the_seed(tmp_path):
    write(tmp_path / "all.jsonl", *numbered(30))
    task = load(tmp_path, file="all.jsonl", test_size=10)
    assert (len(task.test), len(task.train)) == (10, 20)
    assert len(set(keys([*task.test, *task.train]))) == 30
    assert [row["id"] for row in task.test] == [
        row["id"] for row in load(tmp_path, file="all.jsonl", test_size=10, train_size=3).test
    ]
    assert task.test != load(tmp_path, file="all.jsonl", test_size=10, seed=1).test
    assert len(load(tmp_path, file="all.jsonl", test_size=10, train_size=3).train) == 3


def test_problems_of_the_test_file_are_left_out_of_train(tmp_path):
    write(tmp_path / "train.jsonl", *numbered(8))
    write(tmp_path / "test.jsonl", {"numbers": [1, 3], "target": 4}, {"numbers": [9, 9], "target": 1.5})
    task = load(tmp_path, file="train.jsonl", test_file="test.jsonl", train_size=7)
    assert [row["id"] for row in task.test] == ["1_3=4", "9_9=1.5"]
    assert len(task.train) == 7
    assert task.notes == (
        "Countdown: 1 rows were left out because they are repeated, or also in test or in the prompt.",
    )
    assert task.gold(task.test[0]) is None
    assert len(load(tmp_path, file="train.jsonl", test_file="test.jsonl", train_size=5).train) == 5


def test_test_rows_that_are_in_the_prompt_are_left_out_and_counted(tmp_path):
    few_shot = {"prompt_style": "few_shot", "shots": 2, "count": [2, 2], "number_range": [1, 9], "operators": "+"}
    first, second = load(tmp_path, **few_shot, test_size=1, train_size=1).shots
    again = {"numbers": second["numbers"][::-1], "target": second["target"]}
    write(tmp_path / "train.jsonl", *({"nums": [n, 50], "target": n + 50} for n in range(8)), again)
    write(tmp_path / "test.jsonl", first, {"numbers": [11, 3], "target": 14})
    task = load(tmp_path, **few_shot, file="train.jsonl", test_file="test.jsonl", train_size=8)
    assert [row["id"] for row in task.test] == ["3_11=14"]
    assert len(task.train) == 8
    assert task.notes[1:] == (
        "Countdown: 2 rows were left out because they are repeated, or also in test or in the prompt.",
    )


def test_targets_with_a_fraction(tmp_path):
    write(
        tmp_path / "all.jsonl",
        {"nums": [10, 3], "target": 3.3333333333333335, "solution": "10/3"},
        {"nums": [1], "target": 1},
    )
    task = load(tmp_path, file="all.jsonl", test_size=1)
    [problem] = [row for row in (*task.test, *task.train) if len(row["numbers"]) == 2]
    assert task.score(written("<answer>10/3</answer>", problem)).correct
    assert abs(Fraction(10, 3) - Fraction(problem["target"])) < Fraction(1, 10**9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": 3}, "nums is missing"),
        ({"nums": [1, 2]}, "target is missing"),
        ({"nums": ["1", "two"], "target": 3}, r"is not a list of whole numbers. Write them as \[3, 7, 25\]"),
        ({"nums": ["1", "2.0"], "target": 3}, "is not a list of whole numbers"),
        ({"nums": ["1", "-2"], "target": 3}, "is not a list of whole numbers"),
        ({"nums": "[1, 2", "target": 3}, "is not a list of whole numbers"),
        ({"nums": [1, 2.5], "target": 3}, "is not a list of whole numbers"),
        ({"nums": [1, -2], "target": 3}, "is not a list of whole numbers"),
        ({"nums": [1, True], "target": 3}, "is not a list of whole numbers"),
        ({"nums": [], "target": 3}, "is not a list of whole numbers"),
        ({"nums": "12", "target": 3}, "is not a list of whole numbers"),
        ({"nums": [1, 2], "target": "three"}, "target = 'three' is not a number. Write it as 46"),
        ({"nums": [1, 2], "target": "1e3"}, "target = '1e3' is not a number"),
        ({"nums": [1, 2], "target": "nan"}, "target = 'nan' is not a number"),
        ({"nums": [1, 2], "target": ""}, "target = '' is not a number"),
        ({"nums": [1, 2], "target": 3, "note\ud83d": 1}, r"'note\\ud83d' = 1 is not valid Unicode text"),
        ({"nums": [1, 2], "target": 3, "note": {"a": ["\ude00 x"]}}, "'note' = .* holds half of a surrogate pair"),
        ({"nums": [1, 2], "target": float("nan")}, "target = nan is not a number"),
        ({"nums": [1, 2], "target": 10**400}, "target = 10{79}: too large or too small. Remove the row."),
        ({"nums": [1, 2], "target": 1e-70}, "target = 1e-70: too large or too small"),
        ({"nums": [1, 10**70], "target": 3}, "nums = .*, target = 3: too large or too small"),
        ({"nums": [1, 4], "target": 5}, r"the same problem is already at .*all.jsonl:3"),
    ],
)
def test_malformed_rows_are_named_with_file_and_line(tmp_path, row, message):
    write(tmp_path / "all.jsonl", *numbered(4), row)
    with pytest.raises(TaskError, match=rf"all.jsonl:5: .*{message}"):
        load(tmp_path, file="all.jsonl", test_size=2)


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (b"", 1, "the file is empty"),
        (b"\xef\xbb\xbf" + ROW, 1, "byte order mark"),
        (ROW + ROW.replace(b"\n", b"\r\n"), 2, "ends with CR LF"),
        (ROW + ROW[:-4], 2, "the last line is cut off"),
        (ROW + b"\n" + ROW, 2, "the line is empty"),
    ],
    ids=["empty", "byte order mark", "CR LF", "cut off", "empty line"],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, data, line, message):
    (tmp_path / "all.jsonl").write_bytes(data)
    with pytest.raises(TaskError, match=rf"all.jsonl:{line}: .*{message}"):
        load(tmp_path, file="all.jsonl", test_size=1)


ES_AT_SCALE = [
    {
        "id": 0,
        "context": "Using ...",
        "numbers": [44, 19, 35],
        "target": "98",
        "solution": "((44 + 19) + 35)",
    },
    {"id": 1, "context": "", "numbers": [3, 7, 25], "target": "-46", "solution": None},
    {"id": 2, "context": "", "numbers": [10, 3], "target": "3.3333333333333335", "solution": "10 / 3"},
    {"id": 3, "context": "", "numbers": [5, 6], "target": "11", "solution": "(5 + 5) + 1"},
    {"id": 4, "context": "", "numbers": ["5", " 7 "], "target": " 12 ", "solution": "5+7"},
    {"id": 5, "context": "", "numbers": "[5, 8]", "target": 40, "solution": "40"},
]
"""Rows like those of ES at Scale's countdown.json: a target in quotes, and solutions that are null or wrong."""


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows):
    return json.dumps(rows, indent=2).replace("\n", "\r\n").encode()


def as_parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {key: [row[key] for row in rows] for key in ("id", "target", "solution")}
    columns = {key: list(map(str, column)) if key == "target" else column for key, column in columns.items()}
    numbers = [[int(n) for n in str(row["numbers"]).strip("[]").replace("'", "").split(",")] for row in rows]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({**columns, "nums": numbers}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("encode", [as_jsonl, as_array, as_parquet])
def test_a_file_of_any_kind_with_targets_in_quotes_and_solutions_that_are_wrong(tmp_path, encode):
    """Told apart by content. What is wrong with a solution is a warning with a count, and the problem stays."""
    (tmp_path / "countdown.json").write_bytes(encode(ES_AT_SCALE))
    task = load(tmp_path, file="countdown.json", test_size=2)
    problems = {row["id"]: row for row in (*task.test, *task.train)}
    assert {row["id"]: row.get("solution") for row in problems.values()} == {
        "19_35_44=98": "((44 + 19) + 35)",
        "3_7_25=-46": None,
        "3_10=3.3333333333333335": "10 / 3",
        "5_6=11": None,
        "5_7=12": "5+7",
        "5_8=40": None,
    }
    assert all(type(n) is int for row in problems.values() for n in row["numbers"])
    assert task.score(written("<answer>44+19+35</answer>", problems["19_35_44=98"])).correct
    wrong, missing, *_ = task.notes
    assert re.fullmatch(
        r"Countdown: the solution of 2 of 6 rows is wrong and left out, first .*countdown\.json.[34]\]?: "
        r"'\(5 \+ 5\) \+ 1' for 11\.",
        wrong,
    )
    assert missing == "Countdown: 1 of 6 rows have no solution."


def test_rows_that_all_come_without_solution_are_no_reason_for_a_warning(tmp_path):
    write(tmp_path / "all.jsonl", *({"nums": [n, 1], "target": n + 1} for n in range(2, 9)))
    assert load(tmp_path, file="all.jsonl", test_size=2, train_size=5).notes == ()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[]", "all.json: the array is empty"),
        (b"[" + ROW, r"all.json: is not a JSON array in UTF-8 \("),
        (b"[" + ROW + b", 5]", r"all.json\[1\]: 5 is not a JSON object"),
        (
            b"[" + ROW + b', {"nums": [1]}]',
            r"all.json\[1\]: target is missing or null; the row has 'nums'. A",
        ),
        (b"[{}]", r"all.json\[0\]: nums is missing or null; the row has no keys. A row needs nums \(or numbers\) and"),
        (
            b'{"version": 1, "data": [' + ROW.strip() + b"]}",
            r"all.json:1: nums .* 'version', 'data'. .* If 'data' holds the rows, write that array alone",
        ),
        (
            b'{\n  "nums": [1, 2],\n  "target": 3\n}\n',
            "a single JSON object over several lines.* an array of them.$",
        ),
        (b'{"data": [\n' + ROW + b"]}", "a single JSON object over several lines.* If 'data' holds the rows, write"),
        (b"[" + ROW + b"," + ROW + b"]", r"all.json\[1\]: the same problem is already at .*all.json\[0\]"),
        (b'[{"nums": [1], "target": 1, "a": "\\uD83D"}]', r"all.json\[0\]: 'a' = '\\ud83d' is not valid Unicode"),
        (b"PAR1 and no more", "all.json: cannot be read as parquet .*Fetch the file again"),
    ],
)
def test_a_damaged_array_or_table_is_named_with_its_row(tmp_path, data, said):
    (tmp_path / "all.json").write_bytes(data)
    with pytest.raises(TaskError, match=said):
        load(tmp_path, file="all.json", test_size=1)


def test_parquet_without_the_package_for_it(tmp_path, monkeypatch):
    (tmp_path / "all.parquet").write_bytes(as_parquet(ES_AT_SCALE))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TaskError, match=r"all\.parquet: parquet needs pyarrow\. Run: .*-m pip install pyarrow"):
        load(tmp_path, file="all.parquet", test_size=1)


def test_hub_rows_are_drawn_at_random_and_repeated_ones_left_out(tmp_path, monkeypatch):
    table = [{"nums": [n, 1], "target": n + 1} for n in range(2, 42)] + [{"nums": [1, 2], "target": 3}]
    monkeypatch.setattr("eggroll_llm.tasks.countdown_read.load_hub", lambda name, split, instead: table)
    task = load(tmp_path, hub="someone/countdown", test_size=10)
    assert (len(task.test), len(task.train)) == (10, 30)
    assert [row["target"] for row in task.train] != sorted(row["target"] for row in task.train)
    assert task.notes[0].startswith("Countdown: 1 rows were left out")
    table.append({"nums": ["two"], "target": 2})
    with pytest.raises(TaskError, match=r"someone/countdown\[41\]: nums"):
        load(tmp_path, hub="someone/countdown", test_size=10)


def test_without_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        TaskError, match="Jiayi-Pan/Countdown-Tasks-3to4 is on the hub, which needs the package datasets"
    ):
        load(tmp_path, hub="Jiayi-Pan/Countdown-Tasks-3to4")


def test_what_a_majority_votes_on(tmp_path):
    chat, line = (load_task("countdown", {"prompt_style": style}, base_dir=tmp_path) for style in ("chat", "few_shot"))
    assert chat.answer(written("first <answer>(1 + 2) * 3</answer>")) == "(1+2)*3"
    assert chat.answer(written("(1 + 2) * 3")) is None
    assert line.answer(written(" 3 * 4 = 12\nMake")) == "3*4=12"
    assert line.answer(written("\n")) is None
