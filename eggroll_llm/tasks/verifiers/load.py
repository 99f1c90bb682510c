"""Loads task "verifiers": the environment in a process of its own, from which its problems come."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.config.toml import write_toml
from eggroll_llm.errors import InstallError, TaskError
from eggroll_llm.system import installed
from eggroll_llm.tasks.modules import packed, source_hash
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.task import Answer, Place, no_place
from eggroll_llm.tasks.user import read_file
from eggroll_llm.tasks.verifiers.options import VerifiersOptions
from eggroll_llm.tasks.verifiers.task import VerifiersTask


def load_verifiers(options: VerifiersOptions, base_dir: Path, place: Place, limits: RewardConfig) -> VerifiersTask:
    """Return the task with its problems loaded, after the rubric has graded an answer to two of them.

    Raises:
        TaskError: no such environment, one that fails, or one that cannot be trained on here.
        InstallError: the package verifiers is missing, or has no such environments.
    """
    check_package()
    spec, file_hash = describe(options, base_dir, place)
    label = f"{place('environment')}: environment {options.environment!a}"
    task = VerifiersTask(label=label, spec=spec, file_hash=file_hash, hashes={})
    with UserProcess(task, limits) as process:
        train, test = process.problems("train"), process.problems("test")
        tried = [Answer(text=str(problem.get("answer", "1")), problem=problem) for problem in train[:2]]
        for answer, verdict in zip(tried, process.judge(tried, voted=False), strict=True):
            if verdict.score is None:
                raise TaskError(
                    f"{label}: its rubric fails on the completion {answer.text!a:.60} of problem "
                    f"{answer.problem['id']}:\n{verdict.failure}"
                )
        hashes = process.hashes
    name = options.environment.rpartition("/")[2]
    told = f"environment {name}: {len(train):,} training and {len(test):,} test problems"
    return dataclasses.replace(task, hashes=hashes, train=train, test=test, notes=(told,))


def describe(options: VerifiersOptions, base_dir: Path, place: Place = no_place) -> tuple[dict[str, Any], str]:
    """Return, as JSON, what `Environment` loads, and the SHA-256 of its code; a file as it is now. Raises TaskError."""
    name = options.environment
    args = write_toml(dict(options.args))  # which may hold dates, unlike JSON
    spec = {"args": args, "test_share": options.test_share, "seed": options.seed}
    if name.endswith(".py"):
        path = base_dir / name
        source, modules = read_file(path)
        return spec | {"environment": str(path.absolute()), **packed(source, modules)}, source_hash(source, modules)
    if not name:
        raise TaskError(
            f"{place('environment')}: environment is missing. Name an installed one, or a file with load_environment."
        )
    module = name.rpartition("/")[2].replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or found.origin is None:
        raise TaskError(
            f"{place('environment')}: environment {name!a:.80} is not installed: there is no module {module!a:.80}. "
            "Install it with `prime env install OWNER/NAME`, or with pip from its folder, or name its file.py."
        )
    return spec | {"environment": name}, _code_hash(Path(found.origin))


def _code_hash(origin: Path) -> str:
    """Return the SHA-256 of a module's file, or of all Python files of a package."""
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    sums: Mapping[str, str] = {
        str(file.relative_to(origin.parent)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    return hashlib.sha256("\n".join(f"{name} {sum_}" for name, sum_ in sums.items()).encode()).hexdigest()


def check_package() -> None:
    """Raise InstallError where the package is missing, or in a version without what is used here."""
    installed.check('task "verifiers"', "verifiers")
    try:
        version = importlib.metadata.version("verifiers")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return
    if not (0, 1, 14) <= tuple(map(int, re.findall(r"\d+", version)[:3])) < (0, 4):
        raise InstallError(
            f'task "verifiers" is for environments with a rubric, which verifiers has from 0.1.14 to 0.3, but '
            f"{version} is installed; its tasksets are not supported. {installed.remedy('verifiers')}"
        )
