"""Modules beside a user's task: found for it alone, the same in both processes, and part of the journal's hash."""

import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.modules import find_modules
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.task import Answer
from eggroll_llm.tasks.user import UserTask

ROOT = Path(__file__).parents[2]
FILES = {
    "mine.py": """
        import importlib
        from helper import right, Words
        from rewards import Score
        import graders.strict as strict, lib.deep.plain
        random = importlib.import_module("random")

        class Mine:
            def problems(self, split):
                return [{"word": w} for w in Words("drawer", split).words]
            def prompt(self, problem):
                return problem["word"]
            def score(self, completion, problem):
                from late import LATE
                plugin = importlib.import_module("plugin")
                random.random()
                return Score(1.0, True, f"{right()} {strict.NAME} {lib.deep.plain.NAME} {LATE} {plugin.NAME}")
    """,
    "helper.py": """
        from __future__ import annotations
        import dataclasses
        from second import SECOND
        @dataclasses.dataclass
        class Words:
            first: str
            second: str
            @property
            def words(self): return [self.first, self.second]
        def right(): return f"helper {SECOND}"
    """,
    "second.py": "SECOND = 2\nimport helper",
    "late.py": "LATE = 'late'",
    "plugin.py": "NAME = 'plugin'",
    "graders/__init__.py": "from . import base",
    "graders/base.py": "from .inner.marks import MARK",
    "graders/inner/__init__.py": "",
    "graders/inner/marks.py": "from ..other import *\nMARK = 'mark'",
    "graders/other.py": "",
    "graders/strict.py": "from graders.base import MARK\nNAME = f'strict {MARK}'",
    "lib/deep/plain.py": "NAME = 'plain'",
}
SAYS = "helper 2 strict mark plain late plugin"
# Of these names the installed modules are meant, by the task and by everything that is loaded after it.
TRAPS = ("random", "rewards", "eval", "json", "torch", "numpy", "transformers", "datasets", "typing", "eggroll_llm")
NOT_INSTALLED = "a_package_that_is_not_installed"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    traps = {f"{name}.py": f"raise SystemExit('loaded {name}.py')" for name in (*TRAPS, NOT_INSTALLED)}
    write(tmp_path, FILES | traps)
    return tmp_path


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Leave no module behind for other tests."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {file.partition(".")[0].partition("/")[0] for file in FILES}:
            del sys.modules[name]


def load(folder: Path) -> UserTask:
    task = load_task("mine.py:Mine", {}, base_dir=folder)
    assert isinstance(task, UserTask)
    return task


def said_there(task: UserTask) -> str:
    """What the score returns in its own process."""
    with UserProcess(task, RewardConfig(timeout_seconds=60)) as process:
        (verdict,) = process.judge([Answer(text="a", problem=task.problems("test")[0])], voted=False)
    assert verdict.score, verdict.failure
    return verdict.score.detail


def test_modules_and_packages_beside_the_file_are_imported_here_and_there(folder: Path) -> None:
    """Whatever the current directory. Also one that is imported late, dynamically, or by another, in a circle."""
    task = load(folder)
    assert task.score(Answer(text="a", problem=task.problems("train")[0])).detail == SAYS
    assert said_there(task) == SAYS
    assert str(folder) not in sys.path


def test_they_are_loaded_as_they_were_read_though_edited_since(folder: Path) -> None:
    task = load(folder)
    for name in FILES:
        (folder / name).write_text("raise SystemExit('edited')")
    assert task.score(Answer(text="a", problem=task.problems("train")[0])).detail == SAYS
    assert said_there(task) == SAYS


def test_no_name_of_ours_or_of_the_installed_is_taken_by_a_file_beside_the_task(folder: Path) -> None:
    """In a process that loads the task first, and then all that there is to load."""
    code = f"""
        import importlib, pkgutil, sys
        from pathlib import Path
        from eggroll_llm.tasks.load import load_task
        load_task("mine.py:Mine", {{}}, base_dir=Path({str(folder)!r}))
        import eggroll_llm, eval, rewards
        for package in (eggroll_llm, eval, rewards):
            for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                if not set(("vllm", "bench", "grpo_trl", "__main__")) & set(found.name.split(".")):
                    importlib.import_module(found.name)
        for name in {TRAPS!r}:
            importlib.import_module(name)
        try:
            import {NOT_INSTALLED}
        except ModuleNotFoundError:
            print("held")
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.stdout.endswith("held\n"), done.stderr


def test_the_hash_is_of_every_file_that_is_imported_and_of_no_other(folder: Path) -> None:
    (folder / "aside.py").write_text("1")
    before = load(folder).file_hash
    assert before == load(folder).file_hash
    changing = set()
    for path in folder.rglob("*.py"):
        old = path.read_bytes()
        path.write_bytes(old + b"\n# edited\n")
        if load(folder).file_hash != before:
            changing.add(str(path.relative_to(folder)))
        path.write_bytes(old)
    assert changing == set(FILES)
    source = "class Mine:\n    problems = lambda self, split: [{}]\n    prompt = score = lambda self, *_: 1.0\n"
    (folder / "mine.py").write_text(source)
    assert load(folder).file_hash == hashlib.sha256(source.encode()).hexdigest()  # as in journals before this one


def test_it_is_the_same_when_the_folder_is_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is with `python -m` there. Then the traps are the user's own business."""
    for name in TRAPS:
        (folder / f"{name}.py").unlink()
    before = load(folder).file_hash
    monkeypatch.syspath_prepend(str(folder))
    task = load(folder)
    assert task.file_hash == before
    assert said_there(task) == SAYS


def test_a_second_task_imports_its_own(folder: Path, tmp_path: Path) -> None:
    load(folder)
    write(tmp_path / "other", FILES | {"late.py": "LATE = 'early'", "second.py": "SECOND = 3"})
    assert said_there(load(tmp_path / "other")) == "helper 3 strict mark plain early plugin"


@pytest.mark.parametrize("code", ["from numpy import right", "from rewards import right", "import random.right"])
def test_an_import_that_means_another_says_that_the_name_is_taken(folder: Path, code: str) -> None:
    (folder / "mine.py").write_text(code)
    name = code.split()[1].partition(".")[0]
    with pytest.raises(TaskError, match=r"mine\.py: importing it failed:\n") as info:
        load(folder)
    said = f"The {name} next to mine.py cannot be imported, because an installed or loaded module has that name. "
    assert str(info.value).endswith(f"{said}Rename yours.")


def test_an_error_in_a_module_beside_has_its_line(folder: Path) -> None:
    (folder / "second.py").write_text("SECOND = 1 / 0")
    with pytest.raises(
        TaskError, match=r"mine\.py: importing it failed:(?s:.)*second\.py\", line 1(?s:.)*SECOND = 1 / 0"
    ):
        load(folder)
    (folder / "second.py").write_text("SECOND = (")
    with pytest.raises(TaskError, match=r"second\.py\", line 1(?s:.)*SyntaxError"):
        load(folder)


def test_names_that_are_no_modules_lead_nowhere(tmp_path: Path) -> None:
    """Above all not out of the folder."""
    (tmp_path / "outside.py").write_text("")
    (tmp_path / "in" / "pkg").mkdir(parents=True)
    write(tmp_path / "in", {"pkg/__init__.py": "from ... import outside\nfrom .... import x\nfrom . import y"})
    source = b"import pkg\n__import__('../outside')\n__import__('/etc')\nimport_module('..outside')\n__import__('')\n"
    assert set(find_modules(tmp_path / "in" / "mine.py", source)) == {"pkg"}
    for broken in (b"def f(:", b"\0", b"(" * 10_000, b"\xff"):
        assert find_modules(tmp_path / "in" / "mine.py", broken) == {}
