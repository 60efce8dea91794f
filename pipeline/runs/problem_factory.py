"""Problem factories: `digits.py:mlp` beside a job spec, or `package.module:mlp`."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import HessianError, ProblemError, SpecError, in_words, nearest
from pipeline.problem.problem import Problem
from pipeline.urls import VARIABLE, Url, is_secret_name, redacted_values, without


def build_problem(reference: str, arguments: dict[str, Any], folder: Path) -> Problem:
    """Call the factory that a job spec names.

    Args:
        reference: `file.py:function`, the file relative to the folder, or `package.module:function`.
        arguments: keyword arguments of the function.
        folder: where the job spec lies.

    Returns:
        The problem.

    Raises:
        SpecError: there is no such factory, or it does not return a `Problem`.
        ProblemError: the factory failed.
    """
    factory, secrets = _find(reference, folder), set[str]()
    given = _resolved(arguments, secrets)
    try:
        problem = factory(**given)
    except HessianError as error:
        if without(str(error), secrets) == str(error):
            raise
        raise type(error)(without(str(error), secrets)) from None
    except (Exception, SystemExit) as error:
        said = f"{reference}({_arguments(arguments)}) raised {without(in_words(error), secrets)}"
        # What it raised is shown behind the line, unless it has a secret in it.
        raise ProblemError(f"problem: {said}") from (None if without(str(error), secrets) != str(error) else error)
    if not isinstance(problem, Problem):
        raise SpecError(f"problem: {reference} returned {type(problem).__name__}, expected a pipeline.Problem")
    return problem


def _find(reference: str, folder: Path) -> Callable[..., Any]:
    """Import the module of a factory and look the function up."""
    place, colon, name = reference.rpartition(":")
    if not colon or not place:
        raise SpecError(f"problem: got `{reference}`, expected `file.py:factory` or `package.module:factory`")
    module = _load_file(folder / place) if place.endswith(".py") else _import(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise SpecError(f"problem: {place} has no function `{name}`{nearest(name, known)}")
    return factory  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    """Import a file under its own name, with its folder importable as for a script."""
    try:
        path = path.resolve()
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise SpecError(f"problem: no file {path}; the path is relative to the job spec")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    name = path.stem if loaded is None else f"{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"problem: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise SpecError(f"problem: importing {path} raised {in_words(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _import(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise SpecError(f"problem: got the module `{name}`, expected names with dots between: `package.module:factory`")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(f"problem: cannot import module `{name}` ({error})") from error
    except (Exception, SystemExit) as error:
        raise SpecError(f"problem: importing `{name}` raised {in_words(error)}") from error


def _arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in redacted_values(arguments).items())


def _resolved(value: Any, secrets: set[str], name: str = "") -> Any:
    """Put environment variables in where they are named, and note what is to be told to nobody."""
    if isinstance(value, dict):
        return {key: _resolved(inner, secrets, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, secrets, name) for inner in value]
    if isinstance(value, str) and (found := VARIABLE.fullmatch(value)):
        value = os.environ.get(found[1])
        if value is None:
            raise SpecError(f"`problem_args.{name}` names the environment variable {found[1]}, which is not set here")
        secrets.add(value)
    elif is_secret_name(name.rpartition(".")[2]):
        secrets.add(str(value))
    elif isinstance(value, str):
        secrets.update(Url(value).secrets())
    return value
