"""Whether an output belongs to the problem at hand; the weights that all its tiles are computed with."""

from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from pipeline.errors import FingerprintError, OutputError, UnfitError
from pipeline.planning.manifest import Fingerprint, Manifest
from pipeline.problem.batches import sample_count, weights_digest
from pipeline.problem.double_backward import Vector, evaluate, reference_samples
from pipeline.problem.problem import Problem
from pipeline.spec import Settings
from pipeline.storage.output import WEIGHTS, Output
from pipeline.storage.zarr_store import MatrixStore

RETRAINED = 1e-5  # of a tensor's largest entry: the last bits in which a factory that trains may differ from run to run
_NAMED = ("reduction", "separable", "l2", "checkpoint")  # of problem and fingerprint
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-6  # relative, of float64 evaluations on different machines
_WIDE, _PAIRS = torch.complex128, "\0pairs"  # which safetensors does not know: stored as pairs of float64
FIXED_BYTES, TENSOR_BYTES = 2**16, 2**10  # of a file of weights at most, beside entries; the second for each tensor
ROUNDINGS = 100  # times what the last bits of the weights change


def save_weights(problem: Problem, output: Output) -> None:
    """Put all parameters and buffers into the output."""
    tensors = {name: t.cpu().contiguous().clone() for name, t in problem.tensors().items()}
    wide = {name: t for name, t in tensors.items() if t.dtype == _WIDE}
    pairs = {f"{name}{_PAIRS}": torch.view_as_real(t.resolve_conj()) for name, t in wide.items()}
    output.put(WEIGHTS, safetensors.torch.save({n: t for n, t in tensors.items() if n not in wide} | pairs))


def require_same(problem: Problem, manifest: Manifest, output: Output, *, retrained: bool = False) -> Problem:
    """Refuse an output that is of another problem.

    Args:
        problem: the one at hand.
        manifest: the output's.
        output: where its weights and gradient lie.
        retrained: whether a factory made the problem anew, which may have trained it to other last bits.

    Returns:
        The problem at the stored weights, bit for bit those that the finished tiles were computed with.

    Raises:
        FingerprintError: parameters, weights, data, loss or gradient differ.
        OutputError: the stored weights are missing or damaged.
    """
    stored, differences = manifest.fingerprint, []
    if problem.layout.to_json() != manifest.parameters:
        differences.append("the selected parameters differ")
    if problem.data_digest() != stored.data:
        differences.append(f"the data differ ({problem.sample_count} samples, stored {stored.samples})")
    settings = ((name, getattr(problem, name), getattr(stored, name)) for name in _NAMED)
    differences += [f"{name} is {own!r}, stored {other!r}" for name, own, other in settings if own != other]
    try:
        tensors = _load_weights(output, stored.weights, _most_bytes(problem))
    except UnfitError:
        _refuse(output, differences)  # of another problem they may well be larger
        raise
    differences += _weight_differences(problem.tensors(), tensors, RETRAINED if retrained else 0.0)
    _refuse(output, differences)
    restored = problem.at(tensors)
    samples = reference_samples(manifest.microbatch)
    _refuse(output, _value_differences(restored, stored, MatrixStore.gradient(output, manifest), samples))
    return restored


def require_same_settings(settings: Settings, problem: Problem, manifest: Manifest, output: Output) -> None:
    """Refuse to go on with an output under settings that contradict it.

    Args:
        settings: the ones at hand; those left open follow the output.
        problem: the one at hand.
        manifest: the output's.
        output: named in the error.

    Raises:
        FingerprintError: a setting differs.
    """
    largest = max(map(sample_count, problem.batches))
    microbatch = settings.microbatch and (min(settings.microbatch, largest) if problem.is_cuttable else largest)
    dtype = settings.dtype or str(problem.dtype).removeprefix("torch.")
    asked: dict[str, Any] = {
        "blocks": settings.blocks,
        "dtype": dtype,
        "store_dtype": settings.store_dtype or dtype,
        "symmetry": settings.symmetry,
        "codec": settings.codec,
        "chunk": settings.chunk,
        "tile_shape": settings.tile,
    }
    found = {name: getattr(manifest, name) for name in asked}
    differences = [f"{n} is {v!r}, stored {found[n]!r}" for n, v in asked.items() if v is not None and v != found[n]]
    if settings.engine != "auto" and set(manifest.engines.values()) != {settings.engine}:
        differences.append(f"engine is {settings.engine!r}, stored {sorted(set(manifest.engines.values()))}")
    for name, value in (("microbatch", microbatch), ("row_group", settings.row_group)):
        stored = sorted({getattr(sizes, name) for sizes in manifest.sizes.values()})
        if value is not None and stored != [value]:
            differences.append(f"{name} is {value!r}, stored {stored}")
    if settings.formats != manifest.formats:
        differences.append(
            f"formats is {settings.formats!r}, stored {manifest.formats!r} (give these; Parquet: see `hessian export`)"
        )
    _refuse(output, differences)


def _most_bytes(problem: Problem) -> int:
    """Return the bytes that stored weights of a model can have, whatever their type."""
    return FIXED_BYTES + sum(_WIDE.itemsize * t.numel() + TENSOR_BYTES for t in problem.tensors().values())


def _load_weights(output: Output, expected: str, most_bytes: int) -> dict[str, torch.Tensor]:
    """Read the stored weights and check their hash."""
    data = output.get(WEIGHTS, most_bytes)
    try:
        found = safetensors.torch.load(data) if data is not None else None
        tensors = None if found is None else dict(map(_complex, found.items()))
    except SafetensorError as error:
        raise OutputError(f"output {output.url}: {WEIGHTS} cannot be read ({error})") from None
    if tensors is None or weights_digest(tensors) != expected:
        raise OutputError(f"output {output.url}: {WEIGHTS} is missing or not what its manifest says")
    return tensors


def _complex(entry: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    name, tensor = entry
    return (name.removesuffix(_PAIRS), torch.view_as_complex(tensor)) if name.endswith(_PAIRS) else entry


def _weight_differences(own: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], tolerance: float) -> list[str]:
    """Name the tensors that differ by more than a tolerance, relative to their largest entry."""
    if own.keys() != stored.keys():
        return [f"the model's tensors differ: {sorted(own.keys() ^ stored.keys())[:3]}"]
    differences = []
    for name, tensor in stored.items():
        mine = own[name].cpu()
        if mine.shape != tensor.shape or mine.dtype != tensor.dtype:
            differences.append(
                f"`{name}` is {mine.dtype} {tuple(mine.shape)}, stored {tensor.dtype} {tuple(tensor.shape)}"
            )
        elif tensor.numel() and not torch.equal(mine, tensor):
            gap = float((mine.to(_WIDE) - tensor.to(_WIDE)).abs().max())
            if gap > tolerance * float(tensor.to(_WIDE).abs().max()):
                differences.append(f"weights `{name}` differ by up to {gap:.3g}")
    return differences


def _value_differences(problem: Problem, stored: Fingerprint, gradient: Vector, samples: int) -> list[str]:
    """Compare loss, total weight and gradient with those that are stored."""
    at = evaluate(problem, samples)
    for name in ("loss", "weight"):
        own, other = getattr(at, name), getattr(stored, name)
        if abs(own - other) > LOSS_TOLERANCE * abs(other):
            return [f"the {name} is {own!r}, stored {other!r}"]
    gap, allowed = _largest(at.gradient - gradient), GRADIENT_TOLERANCE * _largest(gradient)
    if gap > allowed:  # at a minimum, it is what rounding leaves of it
        moved = evaluate(problem.at(_moved(problem.tensors())), samples)
        allowed = max(allowed, ROUNDINGS * _largest(moved.gradient - at.gradient))
    return [] if gap <= allowed else [f"the gradient differs by up to {gap:.3g}"]


def _largest(vector: Vector) -> float:
    return float(np.abs(vector).max())


def _moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Change values by the last bits of float64."""
    random = torch.Generator().manual_seed(0)
    bits = torch.finfo(torch.float64).eps

    def move(t: torch.Tensor) -> torch.Tensor:
        return t * (1 + bits * torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.device))

    return {name: move(t.double()) if t.is_floating_point() else t for name, t in tensors.items()}


def _refuse(output: Output, differences: list[str]) -> None:
    if differences:
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise FingerprintError(
            f"output {output.url} holds the Hessian of another problem: {shown}; take another output, "
            "or remove this one"
        )
