"""Commands that are printed run when they are pasted, and a user's own files do not hide modules of ours."""

import ast
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import Bare, with_dependencies

from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.system.invocation import ROOT, command

NAME = "eggroll-llm"
ODD = "mit Leer'zeichen äöü 漢 $(x)"
# As pip writes it for an interpreter whose path has spaces.
SCRIPT = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
import sys
from eggroll_llm.cli.main import run
sys.exit(run())
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the program in "my env/bin", where PATH does not lead, and a run that is not finished."""
    folder = tmp_path_factory.mktemp("invocation")
    bare = Bare(folder / "my env", with_dependencies(["eggroll-llm"]))
    script = bare.python.with_name(NAME)
    script.write_text(SCRIPT.format(python=bare.python))
    script.chmod(0o755)
    # Nothing of the engine is needed to come to the settings of the run, but it is looked for.
    for name in ("torch", "vllm"):
        (bare.site / f"{name}.py").touch()
    with RunDir.create(folder / ODD, "stepz = 1\n") as run:
        run.journal.write_text("kept\n")
    return folder


def shell(line: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-c", line], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False
    )


def printed(line: str, cwd: Path, **environment: str) -> str:
    """The command at the end of the refusal to push a run that is not finished."""
    result = shell(f"{line} push {shlex.quote(ODD)} me/mine --dry-run", cwd, **environment)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr.rstrip("\n").partition("or finish it with: ")[2]


@pytest.mark.parametrize(
    ("called", "path"),
    [
        (NAME, "my env/bin:/usr/bin:/bin"),
        ("'my env/bin/eggroll-llm'", "/usr/bin:/bin"),
        ("'{folder}/my env/bin/eggroll-llm'", "/usr/bin:/bin"),
        ("'my env/bin/python' -m eggroll_llm", "/usr/bin:/bin"),
        ("python -m eggroll_llm.cli.main", "my env/bin:/usr/bin:/bin"),
    ],
)
def test_a_printed_command_runs_when_it_is_pasted(folder: Path, called: str, path: str) -> None:
    """Into the same shell: it comes to the very run, and says what is wrong with that."""
    called = called.format(folder=folder)
    line = printed(called, folder, PATH=path)
    assert line.startswith(f"{called.removesuffix('.cli.main')} resume ")
    result = shell(line, folder, PATH=path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {ODD}/config.toml:1: unknown key stepz. Did you mean steps?")


def test_a_path_that_looks_like_a_flag() -> None:
    assert command("resume", Path("-x"), "--steps", 3).endswith(" resume ./-x --steps 3")


TELLS = """
import sys
from pathlib import Path
from eggroll_llm.cli.display import ConsoleDisplay
from eggroll_llm.system.invocation import command
ConsoleDisplay().message(f"go on: {command('resume', Path(sys.argv[1]))}")
"""


def test_a_message_is_not_wrapped() -> None:
    """On a narrow terminal: what it wraps itself is copied in one piece."""
    name = f"runs/{ODD} " * 9
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TELLS, name], stdout=slave, env=ENVIRONMENT | {"COLUMNS": "20", "TERM": "xterm"}
    ) as process:
        os.close(slave)
        output = b""
        try:
            while piece := os.read(master, 4096):
                output += piece
        except OSError:  # how a terminal tells its end
            pass
        os.close(master)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", output.decode())
    assert text.count("\n") == 1
    assert shlex.split(text)[-1] == name


TASK = """
from rewards import Score

class Words:
    def problems(self, split):
        return [{"word": f"{split} {n}"} for n in range(5)]
    def prompt(self, problem):
        return problem["word"]
    def gold(self, problem):
        return "x"
    def score(self, completion, problem):
        return Score(reward=1.0, correct=True, detail="")
"""
RECIPE = """
model = "{model}"
task = "words.py:Words"
steps = 1
[es]
sigma = 0.1
learning_rate = 0.1
[sampling]
max_tokens = 9
"""
OWN = "raise SystemExit('the user has a file of that name')\n"


@pytest.mark.parametrize(
    ("module", "path", "files"),
    [
        ("eggroll_llm", "{root}", ("rewards.py", "eval.py", "datasets.py", "torch.py", "rich.py")),
        # Where only ours can know better than the user.
        ("eggroll_llm.cli.main", ".:{root}", ("rewards.py", "eval.py")),
    ],
)
def test_files_of_the_user_hide_no_modules(
    tmp_path: Path, tiny_model: Callable[[str], Path], module: str, path: str, files: tuple[str, ...]
) -> None:
    """In the process of the command and in that of the user's score."""
    for name in files:
        (tmp_path / name).write_text(OWN)
    (tmp_path / "words.py").write_text(TASK)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=tiny_model("llama")))
    result = subprocess.run(
        [sys.executable, "-m", module, "train", recipe, "--dry-run"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": path.format(root=ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "# in all: 1 steps" in result.stdout


WRITTEN = re.compile(
    r"\beggroll-llm (train|resume|eval|replay|sweep|compare|push|bench|doctor)\b|pip install|--on-existing resume"
)
CARDS = {"eggroll_llm/models/card.py", "eggroll_llm/models/adapter/card.py"}
DOCUMENTS = CARDS | {"eggroll_llm/system/installed.py", "eval/report.py"}
"""For readers elsewhere: what the program is called there is not known. `installed` is what knows how to install."""


def messages(path: Path) -> list[str]:
    """The strings in a module, but for docstrings and the sentences under fields."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def test_commands_in_messages_are_made_in_one_place() -> None:
    """`command` and `python_command` know how the program is called, and quote."""
    sources = [path for name in ("eggroll_llm", "rewards", "eval") for path in (ROOT / name).rglob("*.py")]
    written = {
        f"{path.relative_to(ROOT)}: {text}"
        for path in sources
        if str(path.relative_to(ROOT)) not in DOCUMENTS
        for text in messages(path)
        if WRITTEN.search(text)
    }
    assert written == set()
    assert len(sources) > 50
