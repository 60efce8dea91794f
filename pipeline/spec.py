"""The job spec: what a YAML file under `jobs/` or the arguments of `compute_hessian` may say.

Two frozen, strict models. `Settings` is how to compute, `JobSpec` adds what to compute and where to put it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from pipeline.errors import SpecError, nearest
from pipeline.files.yaml_data import load_yaml, read_yaml
from pipeline.urls import Url

SHOWN = 100  # characters of a value in a message
_PRIVATE = frozenset({"problem_args", "checkpoint", "checkpoints", "output", "endpoint_url", "address"})  # or may be
_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # in Kubernetes' labels, whose syntax Ray has taken over


def _dtype_name(value: object) -> object:
    """Accept `torch.float64` for "float64" without importing torch."""
    return str(value).removeprefix("torch.") if value is not None else None


def _tuples(value: object) -> object:
    """Take YAML's lists as the tuples they stand for; everything else is strict."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _globs(value: object) -> object:
    """Take one glob for a list of one."""
    return (value,) if isinstance(value, str) else _tuples(value)


def _blocks(value: object) -> object:
    """Say of a word that is none of the two what was meant, instead of all that blocks may be."""
    words = ("all", "diagonal")
    if isinstance(value, str) and value not in words:
        raise PydanticCustomError(
            "blocks", "expected a word, or pairs of parameter names{hint}", {"hint": nearest(value, words)}
        )
    return _tuples(value)


def _url(value: object) -> object:
    """Take text for a URL."""
    if value is not None and not isinstance(value, str):
        raise PydanticCustomError("url", "expected text")
    return value if value is None else Url(value)


def _formats(value: tuple[str, ...]) -> tuple[str, ...]:
    """Ask for Zarr, which every read goes to, and for each format once; their order means nothing."""
    if "zarr" not in value:
        raise PydanticCustomError("formats", "zarr is always needed, what is read later is read from it")
    if len(set(value)) < len(value):
        raise PydanticCustomError("formats", "expected each format once")
    return tuple(sorted(value, reverse=True))


def _own_resources(value: dict[str, float]) -> dict[str, float]:
    """Leave CPUs and GPUs to their own settings, and ask for no nothing."""
    if taken := sorted({"CPU", "GPU"} & value.keys()):
        setting = f"{taken[0].lower()}s_per_worker"
        raise PydanticCustomError(
            "resources", "{name} is asked for by {setting}", {"name": taken[0], "setting": setting}
        )
    if any(amount <= 0 for amount in value.values()):
        raise PydanticCustomError("resources", "expected amounts above 0")
    return value


def _selectors(value: dict[str, str]) -> dict[str, str]:
    """Take what Ray takes for labels and for what selects them."""
    for label, wanted in value.items():
        if not re.fullmatch(rf"({_WORD}/)?{_WORD}", label):
            raise PydanticCustomError("label", "{label} is no name of a label", {"label": repr(label)})
        if not re.fullmatch(rf"!?({_WORD}|in\({_WORD}(, ?{_WORD})*\))", wanted):
            raise PydanticCustomError("label", "expected `a`, `!a`, `in(a, b)` or `!in(a, b)`")
    return value


ExecutorName = Literal["auto", "ray", "serial"]
Place = Annotated[Url, BeforeValidator(_url)]  # without its secrets, wherever it is shown or stored
Count = Annotated[int, Field(gt=0, lt=2**31)]
FloatName = Annotated[Literal["float32", "float64"], BeforeValidator(_dtype_name)]
FormatName = Literal["zarr", "parquet"]
EngineName = Literal["auto", "factored", "factored_tf32x3", "jacrev", "rows", "differences"]
BlockSelection = Annotated[Literal["all", "diagonal"] | tuple[tuple[str, str], ...], BeforeValidator(_blocks)]


class Settings(BaseModel):
    """How to compute a Hessian."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    params: Annotated[tuple[str, ...] | None, BeforeValidator(_globs)] = Field(
        None,
        description="Globs of parameter names, `!glob` excludes; all that require grad when not given.",
    )
    blocks: BlockSelection = Field(
        "all",
        description="Which blocks: `all`, `diagonal` (each parameter with itself) or pairs of parameter names.",
    )
    engine: EngineName = Field("auto", description="How tiles are computed; `auto` takes the fastest exact one.")
    dtype: FloatName | None = Field(None, description="Computes in this type; the model's own when not given.")
    store_dtype: FloatName | None = Field(None, description="Stores in this type; `dtype` when not given.")
    symmetry: Literal["mirrored", "upper"] = Field(
        "mirrored", description="Stores the whole matrix, or the upper triangle of chunks (half the bytes)."
    )
    codec: Literal["none", "lz4", "zstd"] = Field("lz4", description="Compression of chunks.")
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(_tuples), AfterValidator(_formats)] = Field(
        ("zarr",), description="Stores as Zarr, and as `parquet` too where that is given: `[zarr, parquet]`."
    )
    chunk: Count | None = Field(None, description="Side B of a stored chunk; from P when not given.")
    tile: Annotated[tuple[Count, Count] | None, BeforeValidator(_tuples)] = Field(
        None, description="Chunk rows and chunk columns of a tile; from engine and memory when not given."
    )
    microbatch: Count | None = Field(None, description="Samples at a time; from memory when not given.")
    row_group: Count | None = Field(None, description="Rows pulled back at a time; units of a layer, if factored.")
    executor: ExecutorName = Field(
        "auto",
        description="Ray workers, a plain loop in this process (`serial`), or by `auto` what is going to end sooner.",
    )
    workers: Count | None = Field(None, description="Ray workers; as many as there is room for if not given.")
    cpus_per_worker: Count = Field(1, description="CPUs, and torch threads, of a Ray worker.")
    gpus_per_worker: float = Field(
        0.0, ge=0, le=1, description="A GPU, or the fraction of one, of a Ray worker; 0 for CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What engines run on; `auto` is cuda where workers have GPUs."
    )
    resources: Annotated[dict[str, float], AfterValidator(_own_resources)] | None = Field(
        None, description="Further resources of a Ray worker, as nodes name theirs, by amount."
    )
    label_selector: Annotated[dict[str, str], AfterValidator(_selectors)] | None = Field(
        None,
        description="Labels of the nodes for workers, as Ray selects: `ray.io/accelerator-type: in(A100, H100)`.",
    )
    address: Place | None = Field(None, description="Ray cluster to join; RAY_ADDRESS or a local one when not given.")
    memory: ByteSize | None = Field(
        None, description="Memory allowed to a worker, as in `4GiB`; its share of 80 % of what is free if not given."
    )
    endpoint_url: Place | None = Field(
        None,
        description="Server of the output's bucket, S3 or Google; the cloud's own or the environment's if not given.",
    )
    concurrent_puts: Count = Field(4, description="Chunks that a worker encodes and puts at a time.")
    durable: bool = Field(
        True, description="Waits until all is on a local disk, and would survive a power cut, before it is finished."
    )
    tile_deadline: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a worker that does not answer is replaced; from the median tile if not given.",
    )
    verify: bool = Field(True, description="Check the finished matrix against plain double backward.")
    deterministic: bool = Field(
        False,
        description="Adds in a fixed order on GPUs too, where torch can; slower. Also on where torch is set so.",
    )


def device_of(settings: Settings) -> str:
    """Return the device that engines run on.

    Args:
        settings: how to compute.

    Returns:
        "cuda" or "cpu".

    Raises:
        SpecError: Ray workers are to compute on GPUs that they do not ask for.
    """
    if settings.device == "cuda" and settings.executor == "ray" and not settings.gpus_per_worker:
        raise SpecError("`device` got cuda, but workers have no GPU: give `gpus_per_worker`, 1 or a fraction")
    if settings.device == "auto":
        return "cuda" if settings.gpus_per_worker > 0 else "cpu"
    return settings.device


class JobSpec(Settings):
    """What to compute, how, and where to put it."""

    problem: str = Field(description="`file.py:factory` beside the spec, or `package.module:factory`.")
    problem_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of the factory; `${NAME}` takes an environment variable.",
    )
    checkpoint: Place | None = Field(
        None,
        description="Weights to take instead of the factory's: a safetensors or torch.save file, a path or fsspec URL.",
    )
    checkpoint_key: str | None = Field(
        None,
        description="Where in the checkpoint they are, as `model` or `state_dict.model`; the whole when not given.",
    )
    output: Place | None = Field(None, description="Where the Hessian goes: a path or an fsspec URL.")


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """Build settings from plain values.

    Args:
        model: `Settings`, `JobSpec` or another of their kind.
        values: what a YAML file or a caller says.
        source: named in errors.

    Returns:
        The frozen settings.

    Raises:
        SpecError: a key is unknown, missing or has a wrong value; the message has one clause per fault.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        faults = dict.fromkeys(_fault(model, dict(e)) for e in error.errors())
        raise SpecError(f"{source}: " + "; ".join(faults)) from None


def load_job(
    path: str | Path, overrides: Sequence[str] = (), output: str | None = None, endpoint_url: str | None = None
) -> JobSpec:
    """Read a job spec from a YAML file.

    Args:
        path: the file.
        overrides: `key=value` strings; the value is read as YAML, `problem_args.key=value` reaches into a mapping.
        output: replaces the spec's output.
        endpoint_url: replaces the spec's.

    Returns:
        The frozen spec.

    Raises:
        SpecError: the file cannot be read, is not a YAML mapping, or is not a valid spec.
    """
    values = job_values(path, overrides, output)
    if endpoint_url is not None:
        values["endpoint_url"] = endpoint_url
    return parse(JobSpec, values, str(path))


def job_values(path: str | Path, overrides: Sequence[str] = (), output: str | None = None) -> dict[str, Any]:
    """Read what a job spec says, as `load_job`, without checking its keys."""
    values = read_mapping(path, "job spec", "problem")
    for text in overrides:
        _override(values, text)
    if output is not None:
        values["output"] = output
    return values


def read_mapping(path: str | Path, what: str, example: str) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: the file.
        what: it is, in errors.
        example: a key it may have.

    Returns:
        Its values.

    Raises:
        SpecError: the file cannot be read, or is not a YAML mapping of names.
    """
    values = read_yaml(path, what)
    if not isinstance(values, dict):
        raise SpecError(f"{path}: got a {type(values).__name__}, expected a mapping of keys such as `{example}:`")
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise SpecError(f"{path}: unknown key `{brief(str(wrong[0]))}`; expected names such as `{example}:`")
    return values


def one_fault(error: ValidationError) -> str:
    """Return the first fault that pydantic finds in data, in a clause.

    Args:
        error: what it raised.

    Returns:
        Where, what was got and what was expected; without the data where they are the whole.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"`{brief(place)}` got {brief(repr(first['input']))}: {first['msg']}" if place else first["msg"]


def brief(text: str) -> str:
    """Shorten what may be of any length, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def _override(values: dict[str, Any], text: str) -> None:
    """Apply one `key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {brief(text)}: expected key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SpecError(f"--set {key}: `{parent}` is not a mapping")
    values[leaf] = load_yaml(value, f"--set {key}")


def _fault(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Return one fault found by pydantic in our words."""
    place = error["loc"]
    key = str(place[0]) if place else ""
    if error["type"] == "extra_forbidden" and len(place) == 1:
        return f"unknown key `{brief(key)}`{nearest(key, model.model_fields)}"
    if error["type"] == "missing" and len(place) == 1:
        return f"missing key `{key}`: {model.model_fields[key].description}"
    if key not in model.model_fields:
        return str(error["msg"])
    got = f"a {type(error['input']).__name__}" if key in _PRIVATE else brief(repr(error["input"]))
    return f"`{key}` got {got}: {error['msg']} ({model.model_fields[key].description})"
