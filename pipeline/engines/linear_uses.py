"""Applications of weights as linear maps, seen while a loss is evaluated: dense layers, convolutions, embeddings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipeline.problem.batches import dense

_LINEAR_ARGUMENTS = ("input", "weight", "bias")
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_EMBEDDING_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


@dataclass(frozen=True)
class Use:
    """An application z = a W' + b of a weight and a bias, at every position of every sample.

    Attributes:
        weight: its name; None where it is no parameter.
        bias: likewise.
        given: what the layer was given.
        shape: of z, samples first.
        dtype: of z.
        channel: the dimension of z that counts the layer's outputs.
        patches: gives from `given` the input a with samples first, positions, and inputs last; None for an embedding,
            whose input is the one-hot vector of each token given.
    """

    weight: str | None
    bias: str | None
    given: Tensor
    shape: torch.Size
    dtype: torch.dtype
    channel: int
    patches: Callable[[Tensor], Tensor] | None

    @property
    def input(self) -> Tensor:
        """The input a, or tokens.  # shape: (samples, positions, inputs) or (samples, positions)."""
        if self.patches is None:
            return self.given.reshape(len(self.given), -1)
        return _one_dimension(self.patches(dense(self.given)), 1)

    def by_position(self, z: Tensor) -> Tensor:
        """Rearrange what has the shape of z, and dimensions before it.  # shape: (..., samples, positions, outputs)."""
        before = z.ndim - len(self.shape)
        return _one_dimension(z.movedim(before + self.channel, -1), before + 1)

    def of_position(self, z: Tensor) -> Tensor:
        """Undo `by_position`.  # shape: (..., *shape)."""
        moved = list(self.shape)
        moved.append(moved.pop(self.channel))
        before = z.ndim - 3
        return z.reshape(*z.shape[:before], *moved).movedim(-1, before + self.channel)


class Uses(TorchFunctionMode):
    """Notes every application of known parameters and what else they are used for, and perturbs z.

    Args:
        names: of parameters, by identity.
        shifts: added to each z in turn, by place; none where a place is missing.
    """

    def __init__(self, names: Mapping[int, str], shifts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._names, self._shifts = names, shifts
        self.uses: list[Use] = []
        self.otherwise: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        # What gives no tensor has no gradient (shapes, types), but for a write into another.
        is_tensor = isinstance(z, Tensor) or any(isinstance(leaf, Tensor) for leaf in tree_leaves(z))
        if not is_tensor and func is not Tensor.__setitem__:
            return z
        used = {self._names[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._names}
        use = self._use(func, args, kwargs or {}, z) if used else None
        if use is None:
            self.otherwise |= used
            return z
        if name := self._names.get(id(use.given)):
            self.otherwise.add(name)
        place = len(self.uses)
        self.uses.append(use)
        return z + self._shifts[place] if place in self._shifts else z

    def _use(self, func: Any, args: Any, kwargs: Any, z: Tensor) -> Use | None:
        """Describe an application; None where it is not one that is known."""
        known = _KNOWN.get(func)
        if known is None:
            return None
        names, describe = known
        given = dict(zip(names, args, strict=False)) | kwargs
        described = describe(given)
        if described is None:
            return None
        weight, bias = (self._names.get(id(given.get(kind))) for kind in ("weight", "bias"))
        if weight is None and bias is None:
            return None
        channel, patches = described
        return Use(weight, bias, given["input"], z.shape, z.dtype, z.ndim - 1 if channel is None else channel, patches)


_Described = tuple[int | None, Callable[[Tensor], Tensor] | None] | None


def _dense(given: dict[str, Any]) -> _Described:
    weight, bias = given["weight"], given.get("bias")
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return None, lambda a: a


def _embedding(given: dict[str, Any]) -> _Described:
    # Those options change the gradient: `jacrev` follows autograd, and preflight judges it.
    others = (
        given.get("padding_idx") is not None or given.get("max_norm") is not None or given.get("scale_grad_by_freq")
    )
    return None if others else (None, None)


def _convolution(given: dict[str, Any]) -> _Described:
    weight, padding = given["weight"], given.get("padding", 0)
    # Samples first, one group, and padding by numbers: the convolutions that `unfold` knows.
    if weight.ndim not in {3, 4} or given["input"].ndim != weight.ndim or given.get("groups", 1) != 1:
        return None
    if isinstance(padding, str):
        return None
    pairs = [
        _pair(option, weight.ndim - 2, fill)
        for option, fill in ((given.get("dilation", 1), 1), (padding, 0), (given.get("stride", 1), 1))
    ]

    def patches(x: Tensor) -> Tensor:
        image = x if weight.ndim == 4 else x.unsqueeze(2)
        return F.unfold(image, _pair(tuple(weight.shape[2:]), weight.ndim - 2, 1), *pairs).transpose(1, 2)

    return 1, patches


def _pair(option: Any, dimensions: int, fill: int) -> tuple[int, int]:
    """Return an option of a convolution for height and width; in one dimension the height is one."""
    values = tuple(option) if isinstance(option, (tuple, list)) else (option,)
    values = values * dimensions if len(values) == 1 else values
    return (fill, values[0]) if dimensions == 1 else (values[0], values[1])


_KNOWN: dict[Any, tuple[tuple[str, ...], Callable[[dict[str, Any]], _Described]]] = {
    F.linear: (_LINEAR_ARGUMENTS, _dense),
    F.embedding: (_EMBEDDING_ARGUMENTS, _embedding),
    torch.conv1d: (_CONVOLUTION_ARGUMENTS, _convolution),
    torch.conv2d: (_CONVOLUTION_ARGUMENTS, _convolution),
}


def _one_dimension(tensor: Tensor, dim: int) -> Tensor:
    """Return the dimensions from `dim` to the last but one as one, of positions; one position where there are none."""
    return tensor.unsqueeze(dim) if tensor.ndim == dim + 1 else tensor.flatten(dim, -2)
