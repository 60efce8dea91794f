"""The identity of a run, written once before its first tile; everything a resumed run or a reader must know."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_serializer

from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tiling import TilingPlan, plan_tiles
from pipeline.planning.verdict import EngineSizes, PreflightVerdict
from pipeline.spec import BlockSelection, FloatName, FormatName

FORMAT: Literal[3] = 3


class Fingerprint(BaseModel):
    """What a Hessian is of. Two runs with equal fingerprints compute the same matrix.

    `weights` and `data` are SHA-256 digests; loss and total weight are in float64, the gradient lies beside them in
    its own array. `checkpoint` is the SHA-256 of the file that the weights are from, where they are from one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    data: str
    samples: int
    loss: float
    weight: float
    reduction: Literal["mean", "sum"]
    separable: bool
    l2: float
    checkpoint: str | None = None

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out a checkpoint that there is not: manifests from before there were any keep their digest."""
        return {name: value for name, value in handler(self).items() if name != "checkpoint" or value is not None}


class Manifest(BaseModel):
    """The frozen plan of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = FORMAT
    parameters: list[dict[str, Any]]
    fingerprint: Fingerprint
    blocks: BlockSelection
    dtype: FloatName
    store_dtype: FloatName
    symmetry: Literal["mirrored", "upper"]
    codec: Literal["none", "lz4", "zstd"]
    formats: tuple[FormatName, ...] = ("zarr",)  # manifests from before there were others do not say
    chunk: int
    tile_shape: tuple[int, int]
    sizes: dict[str, EngineSizes]  # by engine
    preflight: PreflightVerdict
    problem: str | None = None
    versions: dict[str, str]
    deterministic: bool = False

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out what manifests from before it was there do not say: they keep their digest."""
        return {name: value for name, value in handler(self).items() if name != "deterministic" or value}

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
