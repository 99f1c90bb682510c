"""Task "verifiers": what becomes of an environment, and which are refused. A stand-in takes the place of the package,
but in the last test."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.cli.doctor import check_verifiers
from eggroll_llm.config.schema import RewardConfig, RunConfig
from eggroll_llm.errors import ConfigError, InstallError, TaskError
from eggroll_llm.models.card import _task
from eggroll_llm.system import installed
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.sandbox.pool import ScorePool
from eggroll_llm.tasks.task import Answer, Task, sandboxed
from eggroll_llm.tasks.verifiers.environment import Environment
from eggroll_llm.tasks.verifiers.load import describe
from eggroll_llm.tasks.verifiers.options import VerifiersOptions
from eggroll_llm.training.prepare import with_absolute_paths
from rewards import Score

STUB = Path(__file__).parents[2] / "support" / "verifiers_stub"
CODE = """
import uuid
import verifiers as vf
try:
    from datasets import Dataset
    as_data = Dataset.from_list if hasattr(vf, "__version__") else list
except ImportError:
    as_data = list

def rows(count, start=0):
    return [{"question": f"{n} + 1 =", "answer": str(n + 1), "info": {"n": n}} for n in range(start, start + count)]

def right(completion, answer, info):
    assert answer == str(info["n"] + 1)
    return float(completion[-1]["content"] == answer)

async def brief(parser, completion, state, **kwargs):
    return 1 / len(parser.parse_answer(completion))

def broken(completion, state):
    return 0.5 if state["is_truncated"] else 1 / 0

class Moody(vf.SingleTurnEnv):
    async def setup_state(self, state):
        state["input"]["prompt"] = "another"

def judged(state):
    return state["client"].client.chat("1?")

def compared(completions):
    return [1.0 for _ in completions]

def load_environment(kind="sums", count=9):
    if kind == "sums":
        parser = vf.Parser(extract_fn=lambda text: text.rpartition("=")[2])
        return vf.SingleTurnEnv(
            dataset=as_data(rows(count)), eval_dataset=as_data(rows(3, start=count)), system_prompt="Add.",
            few_shot=[{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}],
            rubric=vf.Rubric(funcs=[right, brief, broken], weights=[1.0, 0.5, 0.0], parser=parser), parser=parser,
        )
    held = [{"question": uuid.uuid4().hex if kind == "changing" else f"{n}?", "answer": n} for n in range(count)]
    text = [{"prompt": "2 + 2 =", "example_id": n} for n in range(count)]
    image = [{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "example_id": 0}]
    one = dict(dataset=held, rubric=vf.Rubric(funcs=[brief]))
    return {
        "held": lambda: vf.SingleTurnEnv(**one),
        "changing": lambda: vf.SingleTurnEnv(**one),
        "text": lambda: vf.SingleTurnEnv(dataset=text, rubric=vf.Rubric(funcs=[brief])),
        "turns": lambda: vf.Environment(max_turns=-1, **one),
        "group": lambda: vf.EnvGroup([vf.SingleTurnEnv(**one), vf.Environment(max_turns=5, **one)]),
        "tools": lambda: vf.SingleTurnEnv(tool_defs=[print], **one),
        "judge": lambda: vf.SingleTurnEnv(dataset=held, rubric=vf.RubricGroup([vf.Rubric(), vf.JudgeRubric()])),
        "compared": lambda: vf.SingleTurnEnv(dataset=held, rubric=vf.Rubric(funcs=[compared])),
        "untrained": lambda: vf.SingleTurnEnv(eval_dataset=held),
        "image": lambda: vf.SingleTurnEnv(dataset=image * 3),
        "moody": lambda: Moody(**one),
        "client": lambda: vf.SingleTurnEnv(dataset=held, rubric=vf.Rubric(funcs=[judged])),
        "none": lambda: None,
        "fails": lambda: 1 / 0,
    }[kind]()
"""


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("verifiers", "my_sums")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an environment, and the stand-in for the package."""
    (tmp_path / "sums.py").write_text(CODE)
    monkeypatch.syspath_prepend(STUB)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    environment = dict(os.environ)
    forget()
    yield tmp_path
    forget()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def here(folder: Path) -> Iterator[Callable[..., Environment]]:
    """Loads a kind of environment in this process."""
    loaded = []

    def load(kind: str, name: str = "sums.py", **options: Any) -> Environment:
        options = {"environment": name, "args": {"kind": kind}, **options}
        loaded.append(Environment(describe(VerifiersOptions(**options), folder)[0]))
        return loaded[-1]

    yield load
    for environment in loaded:
        if environment._runner:
            environment._runner.close()


def load(folder: Path, **args: Any) -> Task:
    return load_task("verifiers", {"environment": "sums.py", "args": args}, base_dir=folder)


def scores(task: Task, answers: list[Answer], *, voted: bool = False) -> list[tuple[Score | None, str | None]]:
    own = sandboxed(task)
    assert own
    with ScorePool(own, RewardConfig()) as pool:
        return [(verdict.score, verdict.vote) for verdict in pool.judge(answers, voted=voted)]


def check_sums(task: Task) -> None:
    """Prove that prompts, rewards, their names and answers are those of the environment."""
    train, test = task.problems("train"), task.problems("test")
    assert [problem["id"] for problem in test] == ["test-1", "test-2", "test-3"]
    assert task.prompt(train[4]) == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "4 + 1 ="},
    ]
    given = [("5", train[4], False), ("1 = 5", train[4], True), (f"{len(train) + 1}", test[0], False)]
    answers = [Answer(text=text, problem=problem, truncated=cut) for text, problem, cut in given]
    (right, cut, tested) = scores(task, answers, voted=True)
    assert right == (Score(1.5, True, "reward", {"right": 1.0, "brief": 1.0, "broken": 0.0}), None)
    assert cut == (Score(0.25, False, "reward", {"right": 0.0, "brief": 0.5, "broken": 0.5}), " 5")
    assert tested[0] is not None
    assert tested[0].correct


def test_prompts_and_rewards_are_those_of_the_environment(folder: Path) -> None:
    task = load(folder, count=3000)  # more than fits one reply
    assert [problem["id"] for problem in task.problems("train")] == [f"train-{n}" for n in range(1, 3001)]
    assert task.notes == ("environment sums.py: 3,000 training and 3 test problems",)
    check_sums(task)
    assert "verifiers" not in sys.modules


def test_an_installed_environment_is_the_same_task_and_known_by_its_code(
    folder: Path, here: Callable[..., Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folder / "site" / "my_sums"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from my_sums.inner import load_environment")
    (package / "inner.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder / "site")
    environment = here("text", "me/my-sums")
    problem = environment.problems("test", 0)["problems"][0]
    assert problem["prompt"] == "2 + 2 ="
    assert environment.score(Answer(text="1234", problem=problem)) == Score(0.25, False, "reward")
    options = VerifiersOptions(environment="me/my-sums")
    _, before = describe(options, folder)
    (package / "inner.py").write_text(CODE + "#")
    assert describe(options, folder)[1] != before


def test_rows_are_held_out_by_seed_where_there_is_no_other_data(here: Callable[..., Environment]) -> None:
    def held(seed: int) -> list[Any]:
        test = here("held", seed=seed, test_share=0.3).problems("test", 0)["problems"]
        return [problem["answer"] for problem in test]

    assert held(0) == held(0) != held(1)
    environment = here("held", test_share=0.3)
    whole = [problem["answer"] for split in ("train", "test") for problem in environment.problems(split, 0)["problems"]]
    assert sorted(whole) == list(range(9))
    assert len(held(0)) == 3


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("turns", r"Environment has several turns \(max_turns = -1\)\. Only environments of one turn"),
        ("group", r"several turns \(max_turns = 5\)"),
        ("tools", "SingleTurnEnv offers tools, which are never called"),
        ("judge", r"rubric of SingleTurnEnv asks a judge model \(JudgeRubric\)"),
        ("compared", "rewards that compare the answers to a problem"),
        ("untrained", "no training data set"),
        ("image", r"the prompt of row train-1 holds \[\{'type': 'image_url'\}\], which is not text"),
        ("none", r"load_environment\(\) returned None, not an environment"),
    ],
)
def test_what_one_written_answer_cannot_satisfy_is_refused(
    here: Callable[..., Environment], kind: str, said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        here(kind)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("moody", "sends another prompt than its data set has"), ("client", "uses client of the client, as judges do")],
)
def test_so_is_what_shows_only_in_a_rollout(here: Callable[..., Environment], kind: str, said: str) -> None:
    environment = here(kind)
    problem = environment.problems("train", 0)["problems"][0]
    with pytest.raises((TaskError, AttributeError), match=said):
        environment.score(Answer(text="1", problem=problem))


def test_a_second_question_is_refused(here: Callable[..., Environment]) -> None:
    environment = here("held")
    environment._env.max_turns = -1
    with pytest.raises(AttributeError, match="asks the model again"):
        environment.score(Answer(text="1", problem=environment.problems("train", 0)["problems"][0]))


def test_the_trial_finds_it_before_the_engine_starts(folder: Path) -> None:
    with pytest.raises(
        TaskError, match=r"(?s)'sums\.py': its rubric fails on the completion '\d' of problem train-1.*"
    ):
        load(folder, kind="moody")
    with pytest.raises(TaskError, match=r"(?s)environment 'sums\.py': in the scoring process.*ZeroDivisionError"):
        load(folder, kind="fails")


def test_problems_that_change_from_one_process_to_the_next_are_refused(folder: Path) -> None:
    task = load(folder, kind="changing")
    with pytest.raises(TaskError, match="different problems each time"):
        scores(task, [Answer(text="1", problem=task.problems("train")[0])])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "environment is missing"),
        ({"environment": "none.py"}, "none.py: there is no such file"),
        ({"environment": "me/not-here"}, r"no module 'not_here'. Install it with `prime env install"),
        ({"environment": "sums.py", "arg": {}}, "did you mean .*args"),
    ],
)
def test_an_environment_that_is_not_there_is_named(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises((TaskError, ConfigError), match=f"(?i){said}"):
        load_task("verifiers", options, base_dir=folder)


def test_a_package_that_is_missing_or_has_no_rubrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_verifiers() == []
    for version in ("0.4.0", "1.0rc1", "0.1.9.post3"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        with pytest.raises(InstallError, match=f"but {version} is installed; its tasksets are not supported. Run: "):
            load(folder)
    (check,) = check_verifiers()
    assert check.status == "note"
    monkeypatch.setattr(installed, "_is_installed", lambda name: name != "verifiers")
    with pytest.raises(InstallError, match=r'task "verifiers" needs verifiers, not installed here'):
        load(folder)
    assert check_verifiers() == []


def test_a_file_is_relative_to_the_recipe_and_a_card_names_it(tmp_path: Path) -> None:
    for given, absolute in (("a/sums.py", f"{tmp_path}/a/sums.py"), ("me/sums", "me/sums")):
        config = RunConfig(task="verifiers", task_options={"environment": given})
        assert with_absolute_paths(config, tmp_path).task_options["environment"] == absolute
        assert _task(config) == f"`{Path(given).name}`"


@pytest.mark.slow
def test_with_the_package_itself(tmp_path: Path) -> None:
    pytest.importorskip("verifiers")
    if check_verifiers():
        pytest.skip("verifiers is too new")
    (tmp_path / "sums.py").write_text(CODE)
    check_sums(load(tmp_path))
