"""The direction of imports, read from the source, types included; and what must stay cheap to import."""

import ast
import functools
import graphlib
import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    {"errors", "bounds"},
    {"es", "rewards"},
    {"system"},
    {"config", "kernels"},
    {"records"},
    {"models", "tasks", "module", "integer"},
    {"engine"},
    {"training"},
    {"bench", "eval", "tuning"},
    {"cli"},
    {"api"},
)
"""Rooms: the folders of `eggroll_llm`, `errors`, `rewards`, `eval`. Each imports itself and rooms of earlier rows."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE = {
    "vllm": ("eggroll_llm.engine.vllm", "eggroll_llm.bench.ours", "eggroll_llm.bench.plain"),
    "trl": ("eggroll_llm.training.grpo_trl",),
    "ray": ("eggroll_llm.engine.replicas",),
}
"""Packages that these places alone may import."""
METHOD_MAY_IMPORT = {"torch", "annotated_types", "collections", "contextlib", "dataclasses", "functools"} | {
    *("hashlib", "itertools", "math", "typing")
}
"""Besides itself: the method knows no files, no vLLM and no clock."""


@functools.cache
def modules() -> dict[str, Path]:
    """Return the source file of each module of ours by its dotted name."""
    found = {}
    for package in ("eggroll_llm", "rewards", "eval"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str) -> set[str]:
    """Return the dotted names that `source` imports anywhere; `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=target, names=aliases, level=0):
                names |= {f"{target}.{alias.name}" for alias in aliases}
            case ast.ImportFrom():
                names.add(".relative")
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str | None:
    """Return the room that a module of ours is in; None for other packages and for the top of `eggroll_llm`."""
    top, *rest = module.split(".")
    if top == "eggroll_llm":
        return rest[0] if rest and rest[0] in FLOOR else None
    return top if top in FLOOR else None


def violations(module: str, names: set[str]) -> Iterator[str]:
    """Yield a sentence for each name that `module` may not import."""
    room = room_of(module)
    for name in sorted(names):
        top, target = name.split(".")[0], room_of(name)
        if not top:
            yield f"{module}: imports are absolute"
        if room and target and target != room and FLOOR[target] >= FLOOR[room]:
            yield f"{module} imports {name}: {target} stands above {room}"
        for package, places in OUTSIDE.items():
            if within(name, package) and not any(within(module, place) for place in places):
                yield f"{module} imports {name}: {package} is known to {places[0]} alone"
        # What a turn is, is no grader: the engine's text keeps to it, too.
        grader = target == "rewards" and not within(name, "rewards.turns")
        if grader and room not in ("rewards", "tasks") and module != "eval.lm_eval":
            yield f"{module} imports {name}: only tasks know the graders"
        if room == "rewards" and target != "rewards" and top not in sys.stdlib_module_names:
            yield f"{module} imports {name}: rewards has the standard library and itself"
        if room == "es" and target not in ("es", "bounds") and top not in METHOD_MAY_IMPORT:
            yield f"{module} imports {name}: the method is torch and mathematics"


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module: str) -> None:
    assert list(violations(module, imported(modules()[module].read_text(encoding="utf-8")))) == []


def test_no_imports_in_a_circle() -> None:
    known = modules()
    graph = defaultdict(set)
    for module, path in known.items():
        for name in imported(path.read_text(encoding="utf-8")):
            graph[module] |= {target for target in (name, name.rpartition(".")[0]) if target in known} - {module}
    graph["eggroll_llm"].clear()  # its public names load lazily
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_every_folder_is_a_room_and_says_nothing_on_import() -> None:
    folders = {path.name for path in (ROOT / "eggroll_llm").iterdir() if (path / "__init__.py").is_file()}
    assert folders | {"errors", "bounds", "api", "rewards", "eval"} == set(FLOOR)
    for module, path in modules().items():
        if path.name == "__init__.py" and module not in ("eggroll_llm", "eggroll_llm.engine.vllm", "rewards"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not tree.body or (len(tree.body) == 1 and ast.get_docstring(tree)), module


def test_folders_are_at_most_sixteen_files_wide() -> None:
    for folder in {path.parent for path in modules().values()}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 16, folder


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("eggroll_llm.training.es", "import vllm", "known to eggroll_llm.engine.vllm alone"),
        ("eggroll_llm.engine.interface", "def f():\n    from vllm.engine import x", "known to"),
        ("eggroll_llm.cli.doctor", "importlib.import_module('vllm')", "known to eggroll_llm.engine.vllm alone"),
        ("eggroll_llm.engine.pool", "import ray", "known to eggroll_llm.engine.replicas alone"),
        ("eggroll_llm.training.grpo", "import trl", "known to eggroll_llm.training.grpo_trl alone"),
        ("rewards.trl", "import eggroll_llm.errors", "standard library and itself"),
        ("rewards.trl", "import numpy", "standard library and itself"),
        ("eggroll_llm.training.es", "from rewards import Score", "only tasks know the graders"),
        ("eggroll_llm.training.es", "from eval import stats", "eval stands above training"),
        ("eggroll_llm.system.files", "from eggroll_llm.records import journal", "records stands above system"),
        ("eggroll_llm.models.card", "from eggroll_llm.tasks.task import Task", "tasks stands above models"),
        ("eval.stats", "from eggroll_llm.cli.main import run", "cli stands above eval"),
        ("eggroll_llm.es.noise", "from pathlib import Path", "torch and mathematics"),
        ("eggroll_llm.es.noise", "import time", "torch and mathematics"),
        ("eggroll_llm.es.update", "from . import noise", "imports are absolute"),
    ],
)
def test_each_rule_can_fail(module: str, source: str, said: str) -> None:
    assert any(said in violation for violation in violations(module, imported(source)))


@pytest.mark.parametrize("module", ["es.noise", "es.fitness", "es.estimate", "es.masters", "es.optimizer"])
def test_the_method_opens_no_files(module: str) -> None:
    tree = ast.parse(modules()[f"eggroll_llm.{module}"].read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls & {"open", "torch.load", "torch.save"} == set()


@pytest.mark.parametrize("module", ["eval.compare", "eval.live", "eggroll_llm.cli.display"])
def test_reports_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "False\n"


@pytest.mark.parametrize(
    "module",
    ["eggroll_llm", "rewards", "eggroll_llm.cli.main", "eggroll_llm.config.recipe", "eggroll_llm.models.resolve"],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'vllm', 'datasets', 'huggingface_hub'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


def test_help_answers_at_once() -> None:
    """In seconds of a processor, the best of three: other work on the machine can only make it slower."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    seconds = []
    for _ in range(3):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "eggroll_llm", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        assert "train" in result.stdout
    assert min(seconds) < 0.5
