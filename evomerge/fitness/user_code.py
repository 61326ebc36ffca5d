"""Finds the user's own functions without running anything, and loads them once that is allowed.

A module is looked for in the experiment's folder, then on Python's import path. What is hashed is the module's file
and every file beside it, or in its package, that it imports, found by reading the code; other libraries are not. A
worker loads a function only from files that still have those hashes.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigurationError, FitnessError, nearest

_loaded: set[str] = set()
"""Modules that this process has loaded as code of the user's; another experiment may have others of these names."""


@dataclass(frozen=True, kw_only=True)
class UserCode:
    """The user's functions and what they are made of.

    Attributes:
        folder: Where modules are looked for first.
        hashes: File, relative to where its module or package lies -> SHA-256, the first 16 digits.
    """

    folder: Path
    hashes: Mapping[str, str]


def survey(functions: Iterable[str], folder: Path) -> UserCode:
    """Hash what functions are made of.

    Args:
        functions: `package.module:function` each.
        folder: Where modules are looked for first.

    Raises:
        ConfigurationError: A module or a function is not there, or is not Python.
    """
    hashes: dict[str, str] = {}
    for name in functions:
        for label, file in sources(name, folder).items():
            hashes[label] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return UserCode(folder=folder, hashes=dict(sorted(hashes.items())))


def sources(function: str, folder: Path) -> dict[str, Path]:
    """The files that a function is made of, by their labels, its module first.

    Raises:
        ConfigurationError: The module or the function is not there, or a file is not Python.
    """
    module, _, name = function.partition(":")
    if _find(module, [str(folder)]) is None and _find(module) is None:
        reason = f"there is no module {module} in {folder} or on Python's import path"
        raise ConfigurationError(reason + nearest(module, [file.stem for file in folder.glob("*.py")]))
    files = _closure(module, folder)
    if module not in files:
        raise ConfigurationError(f"{module} is not a file of Python code that could be read")
    trees = {each: _parse(file) for each, file in files.items()}
    defined = _defined(trees[module])
    if defined is not None and name not in defined:
        reason = f"{files[module]} has no function {name!r}{nearest(name, defined)}"
        raise ConfigurationError(reason)
    return {_label(each, file): file for each, file in files.items()}


def module_file(function: str, folder: Path) -> Path | None:
    """The file of a function's module, or None if there is none."""
    module = function.partition(":")[0]
    spec = _find(module, [str(folder)]) or _find(module)
    return _python_file(spec)


def load_function(function: str, code: UserCode) -> Callable[..., Any]:
    """Import a function of the user's.

    Raises:
        FitnessError: Its files changed, it cannot be imported, or it is none.
    """
    module, _, name = function.partition(":")
    try:
        found = survey([function], code.folder).hashes
        files = _closure(module, code.folder)
    except ConfigurationError as error:
        raise FitnessError(f"{function}: {error}") from error
    changed = sorted(label for label in found if found[label] != code.hashes.get(label))
    if changed:
        raise FitnessError(
            f"{function}: {', '.join(changed)} changed since the run started; restore what changed, or start a new "
            "run"
        )
    _make_way(files)
    try:
        with importable(code.folder, first=True):
            value = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a module of the user's raises whatever comes
        where = line_of(error, code.folder)
        raise FitnessError(
            f"{function}: cannot be imported: {type(error).__name__}: {error} ({where})"
        ) from error
    finally:
        _loaded.update(files)
    if not callable(value):
        raise FitnessError(f"{function}: expected a function, got {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def check_arguments(function: str, value: Callable[..., Any], expected: Sequence[str]) -> None:
    """Make sure that a function can be called with as many arguments as it will be.

    Raises:
        FitnessError: It cannot.
    """
    try:
        inspect.signature(value).bind(*expected)
    except TypeError as error:
        name = function.partition(":")[2]
        raise FitnessError(f"{function}: expected {name}({', '.join(expected)}), but {error}") from None
    except ValueError:  # of some built-in functions nothing is known
        return


@contextlib.contextmanager
def importable(folder: Path, *, first: bool = False) -> Iterator[None]:
    """Let imports find modules in a folder, before or after all others, and leave no compiled files there."""
    entry, wrote = str(folder), sys.dont_write_bytecode
    sys.path.insert(0 if first else len(sys.path), entry)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        place = next((place for place, item in enumerate(sys.path) if item is entry), None)
        if place is not None:
            del sys.path[place]
        sys.dont_write_bytecode = wrote


def line_of(error: BaseException, folder: Path) -> str:
    """File and line of the user's code where an error arose; else where it was raised."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((Path(trace.tb_frame.f_code.co_filename), trace.tb_lineno))
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((Path(error.filename), error.lineno or 0))
    own = [frame for frame in frames if frame[0].is_relative_to(folder)]
    file, line = (own or frames)[-1]
    return f"{file.name}:{line}"


def _closure(module: str, folder: Path) -> dict[str, Path]:
    """A module and what it imports from where it lies: module -> file."""
    beside = _find(module, [str(folder)]) is not None
    top = module.partition(".")[0]

    def find(name: str) -> ModuleSpec | None:
        if beside:
            return _find(name, [str(folder)])
        return _find(name) if name.partition(".")[0] == top else None

    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        spec = find(name)
        file = _python_file(spec)
        if spec is None or name in found:
            continue
        pending += [name.rpartition(".")[0]] if "." in name else []
        if file is not None:
            found[name] = file
            pending += _imported(_parse(file), name, is_package=spec.submodule_search_locations is not None)
    return {module: found[module], **found} if module in found else found


def _find(name: str, path: Sequence[str] | None = None) -> ModuleSpec | None:
    """Find a module without importing anything, in the given folders or wherever Python looks."""
    importlib.invalidate_caches()
    top, *rest = name.split(".")
    spec: ModuleSpec | None = None
    if path is not None:
        spec = PathFinder.find_spec(top, list(path))
    else:
        for finder in sys.meta_path:
            spec = finder.find_spec(top, None)
            if spec is not None:
                break
    for depth, _ in enumerate(rest, 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        inner = ".".join([top, *rest[:depth]])
        spec = PathFinder.find_spec(inner, list(spec.submodule_search_locations))
    return spec


def _python_file(spec: ModuleSpec | None) -> Path | None:
    is_file = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return Path(spec.origin) if is_file and spec is not None and spec.origin is not None else None


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigurationError(f"{file}{line} is not valid Python: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from None


def _imported(tree: ast.Module, name: str, *, is_package: bool) -> Iterator[str]:
    """Names of the modules that a module may import, wherever in its code."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with contextlib.suppress(ImportError):
                    base = importlib.util.resolve_name("." * node.level + base, package)
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _defined(tree: ast.Module) -> set[str] | None:
    """Names that a module has, or None where only running it would tell."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif not isinstance(node, ast.Expr):
            return None
    return None if "*" in found or "__getattr__" in found else found


def _label(module: str, file: Path) -> str:
    """The file from where its top-level module or package lies."""
    depth = module.count(".") + (file.name == "__init__.py")
    return str(Path(*file.parts[-depth - 1 :]))


def _make_way(files: Mapping[str, Path]) -> None:
    """Forget modules of these names that are the user's own.

    Raises:
        FitnessError: One of them is another library's.
    """
    for name, file in files.items():
        present = sys.modules.get(name)
        if present is None:
            continue
        if name in _loaded:
            del sys.modules[name]
        elif Path(getattr(present, "__file__", None) or "").resolve() != file.resolve():
            raise FitnessError(f"{file}: its name, {name}, is that of a loaded library; rename the file")
