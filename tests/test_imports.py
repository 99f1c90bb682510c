"""The import rules, read from the source: who may know whom. And what must stay cheap to import."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("rewards", "eggroll_llm", "eval")
CLI = ("eggroll_llm.cli", "eggroll_llm.commands")
PURE = {"eggroll_llm.noise", "eggroll_llm.fitness", "eggroll_llm.update"}
PURE_MAY_IMPORT = PURE | {
    "eggroll_llm.errors",
    *(
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "itertools",
        "math",
        "operator",
        "typing",
    ),
    "torch",
}


def modules() -> dict[str, Path]:
    """Dotted name -> source file of everything of ours."""
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `source` imports anywhere, relative ones resolved, `import_module("x")` included.

    `from a import b` counts as `a.b`, which is the module b of a, or a name in a.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=target, names=aliases, level=level):
                base = package[: len(package) - level + 1] if level else []
                prefix = ".".join([*base, *([target] if target else [])])
                names |= {f"{prefix}.{alias.name}" for alias in aliases}
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(module: str, names: set[str]) -> Iterator[str]:
    """The rules. Yields one sentence for each import in `names` that `module` may not have."""
    for name in sorted(names):
        top = name.split(".")[0]
        if within(name, "vllm") and not within(module, "eggroll_llm.engine"):
            yield f"{module} imports {name}: vllm is known to eggroll_llm.engine alone"
        if within(module, "rewards") and top != "rewards" and top not in sys.stdlib_module_names:
            yield f"{module} imports {name}: rewards has the standard library and itself"
        if module in PURE and not within(name, *PURE_MAY_IMPORT):
            yield f"{module} imports {name}: noise, fitness and update are mathematics"
        if within(module, "eggroll_llm") and module not in CLI:
            # What a turn is, is no grader: prompts and the engine's text keep to it, too.
            if top == "rewards" and not within(name, "rewards.turns") and not within(module, "eggroll_llm.tasks"):
                yield f"{module} imports {name}: only tasks know the graders"
            if top == "eval":
                yield f"{module} imports {name}: only the command line joins eval to the rest"
            if within(name, *CLI):
                yield f"{module} imports {name}: nothing imports the command line"
        if within(module, "eval") and within(name, *CLI):
            yield f"{module} imports {name}: nothing imports the command line"


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_rules(module: str) -> None:
    path = modules()[module]
    names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert list(violations(module, names)) == []


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_modules_open_no_files(module: str) -> None:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls & {"open", "torch.load", "torch.save"} == set()


def test_every_package_is_looked_at() -> None:
    for module in (*OURS, *CLI, *PURE, "rewards.countdown", "eggroll_llm.engine.worker", "eggroll_llm.tasks"):
        assert module in modules()


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("eggroll_llm.trainer", "import vllm", "known to eggroll_llm.engine alone"),
        ("eggroll_llm.cli", "from vllm.engine import x", "known to eggroll_llm.engine alone"),
        ("eval.stats", "def f():\n    import vllm.x", "known to eggroll_llm.engine alone"),
        ("eggroll_llm.doctor", "importlib.import_module('vllm')", "known to eggroll_llm.engine alone"),
        ("rewards.trl", "import eggroll_llm.errors", "standard library and itself"),
        ("rewards.trl", "import numpy", "standard library and itself"),
        ("eggroll_llm.trainer", "from rewards import Score", "only tasks know the graders"),
        ("eggroll_llm.trainer", "from eval import stats", "only the command line joins eval"),
        ("eggroll_llm.tasks.gsm8k", "import eval.stats", "only the command line joins eval"),
        ("eggroll_llm.trainer", "from . import cli", "nothing imports the command line"),
        ("eval.stats", "from eggroll_llm.cli import main", "nothing imports the command line"),
        ("eval.stats", "from eggroll_llm import commands", "nothing imports the command line"),
        ("eggroll_llm.noise", "from pathlib import Path", "are mathematics"),
        ("eggroll_llm.update", "from .engine import worker", "are mathematics"),
        ("eggroll_llm.fitness", "from eggroll_llm import journal", "are mathematics"),
    ],
)
def test_each_rule_can_fail(module: str, source: str, said: str) -> None:
    (violation,) = violations(module, imported(source, module))
    assert said in violation


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("eggroll_llm.engine.worker", "import vllm"),
        ("eggroll_llm.tasks.gsm8k", "from rewards import gsm8k"),
        ("eggroll_llm.cli", "import eval, rewards, eggroll_llm.engine"),
        ("eval.stats", "from eggroll_llm.engine import engine"),
        ("rewards.gsm8k", "import re\nfrom .score import Score"),
        ("eggroll_llm.update", "import torch\nfrom eggroll_llm.noise import served_factors"),
        ("eggroll_llm.trainer", "import vllm_like_name"),
    ],
)
def test_what_the_rules_allow(module: str, source: str) -> None:
    assert list(violations(module, imported(source, module))) == []


@pytest.mark.parametrize(
    "module",
    ["eggroll_llm", "rewards", "eggroll_llm.cli", "eggroll_llm.config", "eggroll_llm.models", "eggroll_llm.push"],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'vllm', 'datasets', 'huggingface_hub'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


def test_help_answers_at_once() -> None:
    """Best of three, as other work on the machine can only make it slower."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "eggroll_llm.cli", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        seconds.append(time.perf_counter() - start)
        assert "train" in result.stdout
    assert min(seconds) < 0.5
