"""The identity of a run, written once before its first tile; everything a resumed run or a reader must know."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from pipeline.errors import BlockError, SpecError
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tiling import Tile, TilingPlan, plan_tiles
from pipeline.planning.verdict import EngineSizes, PreflightVerdict
from pipeline.spec import BlockSelection, Count, FloatName, FormatName

FORMAT: Literal[3] = 3
MOST_ROWS = 2**40  # of a matrix; more than anybody can store

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take a table of parameters for nothing but what `ParameterLayout.to_json` writes."""
    if not rows or not all(map(_is_row, rows)) or ParameterLayout.from_json(rows).to_json() != rows:
        raise PydanticCustomError("table", "expected names, shapes, and the offsets and sizes that follow from them")
    layout = ParameterLayout.from_json(rows)
    if len(set(layout.names)) < len(rows) or layout.size > MOST_ROWS:
        raise PydanticCustomError("table", "expected each name once, and at most {most} rows", {"most": MOST_ROWS})
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    shape = row.get("shape")
    numbers = [*shape, row.get("offset"), row.get("size")] if isinstance(shape, list) else [None]
    return isinstance(row.get("name"), str) and all(type(n) is int and 0 <= n <= MOST_ROWS for n in numbers)


class Fingerprint(BaseModel):
    """What a Hessian is of. Two runs with equal fingerprints compute the same matrix.

    `weights` and `data` are SHA-256 digests; loss and total weight are in float64, the gradient lies beside them in
    its own array. `checkpoint` is the SHA-256 of the file that the weights are from, where they are from one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weights: Digest
    data: Digest
    samples: int
    loss: FiniteFloat
    weight: FiniteFloat
    reduction: Literal["mean", "sum"]
    separable: bool
    l2: FiniteFloat
    checkpoint: Digest | None = None

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out a checkpoint that there is not: manifests from before there were any keep their digest."""
        return {name: value for name, value in handler(self).items() if name != "checkpoint" or value is not None}


class Manifest(BaseModel):
    """The frozen plan of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[3] = FORMAT
    parameters: Annotated[list[dict[str, Any]], AfterValidator(_table)]
    fingerprint: Fingerprint
    blocks: BlockSelection
    dtype: FloatName
    store_dtype: FloatName
    symmetry: Literal["mirrored", "upper"]
    codec: Literal["none", "lz4", "zstd"]
    formats: tuple[FormatName, ...] = ("zarr",)  # manifests from before there were others do not say
    chunk: Count
    tile_shape: tuple[Count, Count]
    sizes: dict[str, EngineSizes]  # by engine
    preflight: PreflightVerdict
    problem: str | None = None
    versions: dict[str, str]
    deterministic: bool = False

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what manifests from before it was there do not say: they keep their digest."""
        return {name: value for name, value in handler(self).items() if name != "deterministic" or value}

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        """Hold what it says in several places against each other."""
        if self.engines.keys() != set(self.layout.names):
            raise PydanticCustomError("engines", "expected an engine for each parameter")
        try:
            self.plan.require_few_tiles()
        except (BlockError, SpecError) as error:
            raise PydanticCustomError("plan", "{error}", {"error": str(error)}) from None
        if self.layout.size and not self.plan.selected.any():
            raise PydanticCustomError("plan", "expected a block at least")
        if not set(self.engines.values()) <= self.sizes.keys() and not self._engines_of_tiles() <= self.sizes.keys():
            raise PydanticCustomError("sizes", "expected the sizes of each engine that computes rows")
        return self

    def _engines_of_tiles(self) -> set[str]:
        """Return the engines of the rows that are computed: of some parameters, where only some blocks are wanted."""
        spans = (self.plan.span(range(i, i + 1)) for i in map(int, np.flatnonzero(self.plan.selected.any(1))))
        return {self.engines[p.name] for span in spans for p, _ in self.layout.segments(span)}

    @property
    def engines(self) -> dict[str, str]:
        """The engine of each row parameter."""
        return self.preflight.engines

    @cached_property
    def layout(self) -> ParameterLayout:
        """The parameters' places."""
        return ParameterLayout.from_json(self.parameters)

    @cached_property
    def plan(self) -> TilingPlan:
        """The tiles."""
        return plan_tiles(self.layout, self.blocks, self.chunk, self.tile_shape)

    def images(self, i: int, j: int) -> list[tuple[int, int]]:
        """Return where a chunk of the upper triangle is stored: there, and mirrored if the matrix is stored whole."""
        return [(i, j), (j, i)] if self.symmetry == "mirrored" and i != j else [(i, j)]

    def places(self, tile: Tile) -> list[tuple[int, int]]:
        """Return all chunks that a finished tile leaves, mirrors included."""
        return [place for i, j in self.plan.chunks(tile) for place in self.images(i, j)]

    @property
    def matrix_bytes(self) -> int:
        """Bytes of all chunks in one format, before compression; ragged Zarr chunks are stored whole."""
        selected = self.plan.selected
        chunks = int(selected.sum())
        if self.symmetry == "mirrored":
            chunks = 2 * chunks - int(selected.diagonal().sum())
        return chunks * self.chunk**2 * np.dtype(self.store_dtype).itemsize

    @cached_property
    def digest(self) -> str:
        """Name of this run in its receipts: no other plan, of the same problem or not, has the same."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]

    @property
    def microbatch(self) -> int:
        """The largest of its engines."""
        return max(sizes.microbatch for sizes in self.sizes.values())

    def to_bytes(self) -> bytes:
        """Write it out."""
        return json.dumps(self.model_dump(mode="json"), indent=1).encode()
