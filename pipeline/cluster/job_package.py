"""What a job consists of when it is sent to a cluster: its spec, and the source files that its factory imports."""

import ast
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import SpecError, human_bytes
from pipeline.spec import JobSpec, job_values, parse
from pipeline.urls import VARIABLE, redacted_values

JOB = "job.yaml"
MOST_BYTES = 4 * 2**20  # of source: more is data, which belongs in a bucket
_INSTALLED = "pipeline"  # is on the cluster already


@dataclass(frozen=True)
class Parcel:
    """A job that needs nothing from the machine it was made on.

    Attributes:
        spec: what is asked for.
        files: by name.
    """

    spec: JobSpec
    files: dict[str, bytes]

    @cached_property
    def digest(self) -> str:
        """Name of all that is in it."""
        sha = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            sha.update(f"{name}\0{len(data)}\0".encode() + data)
        return sha.hexdigest()

    def unpack(self, folder: Path) -> None:
        """Write the files."""
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def pack(
    path: Path,
    overrides: Sequence[str] = (),
    output: str | None = None,
    *,
    here: Callable[[], bool] = lambda: False,
) -> Parcel:
    """Make a parcel of a job.

    Its source files are those that the factory's file imports, and those that they import, as far as they lie beside
    or below it; not data, not weights, nothing else.

    Args:
        path: of the job spec.
        overrides: see `load_job`.
        output: replaces the spec's output.
        here: says whether it is to run on this machine alone, which sees the same paths; asked where there are any.

    Returns:
        The parcel.

    Raises:
        SpecError: the spec is not valid, or names what a cluster cannot reach.
    """
    values = job_values(path, overrides, output)
    spec = parse(JobSpec, values, str(path))
    if spec.output is None:
        raise SpecError("missing key `output`: say where the Hessian goes, in the spec or with --output")
    _require_no_secret(spec)
    for key in ("output", "checkpoint"):
        if (url := getattr(spec, key)) is not None:
            values[key] = _reachable(key, url, here)
    place, _, name = spec.problem.rpartition(":")
    files = {}
    if place.endswith(".py"):
        file = (path.parent / place).resolve()
        files = _sources(file)
        values["problem"] = f"{file.name}:{name}"
    values.pop("address", None)  # Ray tells the job
    files[JOB] = yaml.safe_dump(values, sort_keys=True).encode()
    _require_small(files)
    return Parcel(parse(JobSpec, values, str(path)), files)


def _require_no_secret(spec: JobSpec) -> None:
    """Refuse what a cluster would keep and show with the job."""
    for key in ("output", "checkpoint", "endpoint_url"):
        url = getattr(spec, key)
        if url is not None and url.is_secret:
            raise SpecError(f"`{key}` got {url}, whose secrets the cluster would keep: give them in its environment")
    plain = _variables_left_out(spec.problem_args)
    if redacted_values(plain) != plain:
        raise SpecError(
            "`problem_args` got a secret, which the cluster would keep: give `${NAME}`, a variable of its environment"
        )


def _variables_left_out(value: Any) -> Any:
    """Return plain data without the places that name environment variables."""
    if isinstance(value, dict):
        return {key: _variables_left_out(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_variables_left_out(inner) for inner in value]
    return None if isinstance(value, str) and VARIABLE.fullmatch(value) else value


def _reachable(key: str, url: str, here: Callable[[], bool]) -> str:
    """Return a URL as the cluster is to see it."""
    if url.startswith("memory://"):
        raise SpecError(f"`{key}` got {url}, which no other process can reach: give the URL of a bucket")
    if "://" in url:
        return str(url)
    if not here():
        raise SpecError(
            f"`{key}` got {url}, a path of this machine, where the cluster cannot reach it: give the URL of a bucket, "
            "or file:///... for a path that all its nodes share"
        )
    return str(Path(url).absolute())


def _sources(file: Path) -> dict[str, bytes]:
    """Read a source file and all that it imports from its own folder and those below."""
    root, found, waiting = file.parent, dict[str, bytes](), [file]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name not in found:
            try:
                found[name] = path.read_bytes()
                waiting += [source for module in _imported(path, root) for source in _files(root, module)]
            except OSError as error:
                raise SpecError(f"problem: cannot read {path} ({error.strerror})") from None
            except (SyntaxError, ValueError) as error:
                raise SpecError(f"problem: {path} is not a Python file ({error})") from None
    return found


def _imported(path: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """Name the modules that a file may import, wherever in it."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            yield module
            yield from ((*module, alias.name) for alias in node.names)  # which may be modules themselves


def _files(root: Path, module: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of a module and of the packages it is in, as far as they are there."""
    if module[:1] == (_INSTALLED,):
        return
    for depth in range(1, len(module) + 1):
        place = root.joinpath(*module[:depth])
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())


def _require_small(files: dict[str, bytes]) -> None:
    total = sum(map(len, files.values()))
    if total > MOST_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise SpecError(
            f"problem: its source files have {human_bytes(total)}, at most {human_bytes(MOST_BYTES)} are sent "
            f"({largest} alone has {human_bytes(len(files[largest]))}): put data into a bucket"
        )
