"""The jobs that come with the package, for whoever has no clone of its repository: listed, and copied out."""

from importlib.resources import files
from pathlib import Path

from pipeline.errors import OutputError, SpecError, nearest
from pipeline.spec import load_job

_FOLDER = files("pipeline") / "examples"


def list_examples() -> dict[str, str]:
    """Return the names of the jobs, each with the first line of its spec, which says what it is."""
    specs = sorted(path.name for path in _FOLDER.iterdir() if path.name.endswith(".yaml"))
    return {
        name.removesuffix(".yaml"): (_FOLDER / name).read_text().splitlines()[0].removeprefix("#").strip()
        for name in specs
    }


def copy_example(name: str, folder: Path) -> list[Path]:
    """Copy a job's spec and the module of its problem; a file of the same content stays.

    Args:
        name: of the job.
        folder: where to.

    Returns:
        The files, the spec first.

    Raises:
        SpecError: there is no such job.
        OutputError: another file of that name is there, or none can be written.
    """
    examples = list_examples()
    if name not in examples:
        raise SpecError(f"init: there is no job `{name}`{nearest(name, examples)}")
    spec = f"{name}.yaml"
    module = load_job(str(_FOLDER / spec)).problem.partition(":")[0]
    copies = {folder / file: (_FOLDER / file).read_bytes() for file in (spec, module)}
    try:
        other = [path for path, content in copies.items() if path.exists() and path.read_bytes() != content]
        for path in () if other else copies:
            path.write_bytes(copies[path])
    except OSError as error:
        raise OutputError(f"init: {error.filename} cannot be written ({error.strerror})") from None
    if other:
        raise OutputError(f"init: {other[0]} is there already, with another content: go to another folder")
    return list(copies)
