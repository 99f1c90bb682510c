"""The modules of a user's task: its file and what it imports from beside it, loaded as they were when they were read.

Imports are looked for in the syntax tree, before anything runs, and followed from module to module: one inside `score`,
which runs in another process, counts as well. Both processes load what was read then, though the files may be edited
during a run, and the journal has a hash of it.

Names that exist already (`random`, `rewards`, an installed package) keep their meaning, and a file that nothing imports
(a script called wandb.py) is never loaded: the folder is not on `sys.path`.
"""

import ast
import hashlib
import importlib.machinery
import importlib.util
import linecache
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_IMPORTERS = ("import_module", "__import__")


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A module beside the task's file."""

    path: str
    """Its file; the folder of a package without `__init__.py`."""
    source: bytes | None
    """What the file held; None for a package without one."""


Modules = Mapping[str, Module]
"""By the name under which each is imported."""


def find_modules(path: Path, source: bytes) -> dict[str, Module]:
    """Return the modules beside the file that it imports when it holds `source`, and those that they import."""
    folder = path.resolve().parent
    found: dict[str, Module] = {}
    names = list(_imports(source, ""))
    while names:
        parts = names.pop().split(".")
        if not all(map(str.isidentifier, parts)):
            continue
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name in found:
                continue
            module = _read(folder.joinpath(*parts[:depth]))
            if module is None or (depth == 1 and _is_taken(name, module)):
                break
            found[name] = module
            is_package = module.source is None or Path(module.path).name == "__init__.py"
            names += _imports(module.source or b"", name if is_package else name.rpartition(".")[0])
    return found


def is_hidden(path: Path, name: str) -> bool:
    """Return whether a module beside the file cannot be imported under that name, which means another."""
    module = _read(path.resolve().parent / name)
    return module is not None and _is_taken(name, module)


def load_module(path: Path, source: bytes, modules: Modules) -> ModuleType:
    """Return the module of a file that held `source`; it can import `modules`. What it raises is not caught."""
    _FINDER.install(modules)
    name = f"eggroll_llm_user_task_{path.stem}"
    loader = _Loader(name, str(path.absolute()), source)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source_hash(source: bytes, modules: Modules) -> str:
    """Return SHA-256 of a file's source; with modules beside it, of the names and hashes of these as well."""
    own = hashlib.sha256(source).hexdigest()
    if not modules:
        return own
    lines = [f"{name} {hashlib.sha256(module.source or b'').hexdigest()}" for name, module in sorted(modules.items())]
    return hashlib.sha256("\n".join([own, *lines]).encode()).hexdigest()


def packed(source: bytes, modules: Modules) -> dict[str, Any]:
    """Return a file's source and its modules as JSON, for another process; bytes as text, a character each."""

    def text(data: bytes | None) -> str | None:
        return None if data is None else data.decode("latin-1")

    return {"source": text(source), "modules": {name: [m.path, text(m.source)] for name, m in modules.items()}}


def unpacked(sent: Mapping[str, Any]) -> tuple[bytes, dict[str, Module]]:
    """Return the source and the modules that were `packed`."""
    modules = {
        name: Module(path=path, source=None if text is None else text.encode("latin-1"))
        for name, (path, text) in sent["modules"].items()
    }
    return sent["source"].encode("latin-1"), modules


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a file as it was when it was read, whatever is in it, and in Python's cache of it, by now."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        # Tracebacks show these lines; an entry without a time is not compared with the file.
        text = importlib.util.decode_source(self._source)
        linecache.cache[self.path] = len(text), None, [f"{line}\n" for line in text.split("\n")], self.path
        return self.source_to_code(self._source, self.path)

    def get_data(self, path: str) -> bytes:
        return self._source if path == self.path else super().get_data(path)


class _Finder(MetaPathFinder):
    """Finds the modules beside the task that was loaded last."""

    def __init__(self) -> None:
        self.modules: Modules = {}

    def install(self, modules: Modules) -> None:
        """Find these from now on, and forget those of the task before."""
        for name in self.modules:
            sys.modules.pop(name, None)
        self.modules = modules
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if (module := self.modules.get(fullname)) is None:
            return None
        if module.source is None:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [module.path]
            return spec
        loader = _Loader(fullname, module.path, module.source)
        return importlib.util.spec_from_file_location(fullname, module.path, loader=loader)


_FINDER = _Finder()


def _read(place: Path) -> Module | None:
    """Return the module or package at a place, which is its path without an ending."""
    for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if file.is_file():
            return Module(path=str(file), source=file.read_bytes())
    return Module(path=str(place), source=None) if place.is_dir() else None


def _is_taken(name: str, module: Module) -> bool:
    """Return whether a name means another module than this one, installed or loaded."""
    if name in sys.modules and name not in _FINDER.modules:
        return not _is_file(getattr(sys.modules[name], "__file__", None), module)
    specs = (finder.find_spec(name, None) for finder in sys.meta_path if finder is not _FINDER)
    # Of folders without __init__.py, any on the path is found: such a one has no origin.
    spec = next((spec for spec in specs if spec and spec.origin), None)
    return spec is not None and not _is_file(spec.origin, module)


def _is_file(path: str | None, module: Module) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(module.path)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yield every dotted name that a module of `package` imports, or that may be an attribute of what it imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # importing it will say so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(f"{'.' * node.level}{node.module or ''}", package)
            yield from (base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names if base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in _IMPORTERS and isinstance(name := node.args[0].value, str):
                yield _resolve(name, package)


def _resolve(name: str, package: str) -> str:
    """Return a name with leading dots as seen from a package; an empty one where that leads nowhere."""
    if not name.startswith("."):
        return name
    if not package:
        return ""
    rest = name.lstrip(".")
    above = package.split(".")[: len(package.split(".")) - (len(name) - len(rest) - 1)]
    return ".".join([*above, *([rest] if rest else [])]) if above else ""
