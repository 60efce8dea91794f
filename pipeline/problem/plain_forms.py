"""Operations of torch written out by others that can be differentiated twice, and pulled back many rows at once.

Each takes what torch's own takes, and gives what that gives up to rounding; or NotImplemented for options, shapes and
types that it does not know, which are torch's to treat or to refuse. `written_out.py` says which they are of, and why.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Written: TypeAlias = Any  # a tensor, or NotImplemented

LEFT_TO_PRODUCTS = 25  # rows of either side up to which torch takes Euclidean distances from differences
POOLS = ("max_pool2d", "max_pool3d", "adaptive_max_pool2d")  # see `rows_first`


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Written:
    """Weight norm, w = g v / |v|."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Written:
    """Distances of all rows of x1 from all of x2; 0, with all its derivatives, where two rows are equal."""
    if min(x1.dim(), x2.dim()) < 2 or x1.shape[-1] != x2.shape[-1] or not (x1.numel() and x2.numel()):
        return NotImplemented
    if p == 0 or x1.dtype != x2.dtype or not x1.is_floating_point():
        return NotImplemented
    many = compute_mode == "use_mm_for_euclid_dist" or (
        compute_mode == "use_mm_for_euclid_dist_if_necessary" and max(x1.shape[-2], x2.shape[-2]) > LEFT_TO_PRODUCTS
    )
    if many and p == 2:
        return _distances_by_products(x1, x2)
    return _norms(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(rows: Tensor, p: float = 2.0) -> Written:
    """Distances of each row from all later ones; 0, with all their derivatives, where two rows are equal."""
    if rows.dim() != 2 or len(rows) < 2 or not rows.numel() or p == 0:
        return NotImplemented
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return _norms(rows.index_select(0, first) - rows.index_select(0, second), p)


def _norms(differences: Tensor, p: float) -> Tensor:
    """Return the p-norm along the last dimension."""
    sizes = differences.abs()
    if p == 1:
        return sizes.sum(-1)
    if p == float("inf"):
        return sizes.amax(-1)
    if p == 2:
        return _root((differences * differences).sum(-1), 0.5)
    # Left as they are, zeros would have derivatives of 0 * infinity for p < 2.
    powers = torch.where(sizes == 0, 0.0, torch.where(sizes == 0, 1.0, sizes) ** p)
    return _root(powers.sum(-1), 1 / p)


def _root(powers: Tensor, exponent: float, zero: Tensor | None = None) -> Tensor:
    """Take a root that is constant where `zero` says so, or where it is 0, as torch's first derivative has it."""
    zero = powers <= 0 if zero is None else zero | (powers <= 0)
    return torch.where(zero, 0.0, torch.where(zero, 1.0, powers) ** exponent)


def _distances_by_products(x1: Tensor, x2: Tensor) -> Tensor:
    """Return Euclidean distances by |a|^2 - 2 a b + |b|^2, for which no differences need be kept."""
    # So does torch, and then takes the root of a rounding error between equal rows, of huge second derivatives.
    squares, others = (x * x for x in (x1, x2))
    left = torch.cat([-2 * x1, squares.sum(-1, keepdim=True), torch.ones_like(x1[..., :1])], -1)
    right = torch.cat([x2, torch.ones_like(x2[..., :1]), others.sum(-1, keepdim=True)], -1)
    equal = (x1.unsqueeze(-2) == x2.unsqueeze(-3)).all(-1)
    return _root(left @ right.mT, 0.5, equal)


def embedding_bag(
    indices: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    scale_grad_by_freq: bool = False,
    **_: Any,
) -> Written:
    """Sums, means or maxima of bags of rows; neither changes the table nor scales gradients."""
    if max_norm is not None or scale_grad_by_freq or indices.is_floating_point() or indices.is_nested:
        return NotImplemented
    if indices.dim() != (2 if offsets is None else 1) or (per_sample_weights is not None and mode != "sum"):
        return NotImplemented
    bag, count = _bags(indices, offsets, include_last_offset)
    flat = indices.reshape(-1)
    if padding_idx is not None:  # into one more bag, which is dropped
        bag = torch.where(flat == padding_idx % len(weight), count, bag)
    rows = F.embedding(flat, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    into = rows.new_zeros(count + 1, rows.shape[1])
    if mode == "max":
        return into.scatter_reduce(0, bag.unsqueeze(1).expand_as(rows), rows, "amax", include_self=False)[:count]
    sums = into.index_add(0, bag, rows)[:count]
    if mode == "sum":
        return sums
    sizes = rows.new_zeros(count + 1).index_add(0, bag, rows.new_ones(len(rows)))[:count]
    return sums / sizes.clamp_min(1).unsqueeze(1)


def _bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, int]:
    """Return which bag each index goes to, and how many bags there are."""
    if offsets is None:
        count = len(indices)
        return torch.arange(count, device=indices.device).unsqueeze(1).expand_as(indices).reshape(-1), count
    count = len(offsets) - include_last_offset
    place = torch.arange(len(indices), dtype=offsets.dtype, device=indices.device)
    return torch.searchsorted(offsets[:count].contiguous(), place, right=True) - 1, count


def hardsigmoid(x: Tensor, inplace: bool = False) -> Written:
    """Clip (x + 3) / 6 to [0, 1]."""
    found = F.hardtanh(x + 3, 0.0, 6.0) / 6
    return x.copy_(found) if inplace else found


def segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    indices: Tensor | None = None,
    axis: int = 0,
    initial: float | None = None,
    **_: Any,
) -> Written:
    """Sums, means, products or extrema of consecutive rows."""
    start = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -torch.inf, "min": torch.inf}.get(reduce)
    if axis or indices is not None or start is None or (lengths is None) == (offsets is None):
        return NotImplemented
    sizes = lengths if lengths is not None else torch.diff(offsets)  # type: ignore[arg-type]
    if sizes.dim() != 1 or int(sizes.sum()) != len(data):
        return NotImplemented
    segment = torch.arange(len(sizes), device=data.device).repeat_interleave(sizes, output_size=len(data))
    into = data.new_full((len(sizes), *data.shape[1:]), start if initial is None else initial)
    if reduce in ("sum", "mean"):
        sums = into.index_add(0, segment, data)
        if reduce == "sum":
            return sums
        least = 0 if initial is None else 1  # the mean of nothing is NaN, or what it starts from
        return sums / sizes.clamp_min(least).reshape(-1, *(1,) * (data.dim() - 1))
    place = segment.reshape(-1, *(1,) * (data.dim() - 1)).expand_as(data)
    return into.scatter_reduce(0, place, data, {"max": "amax", "min": "amin"}.get(reduce, reduce))


def masked_select(x: Tensor, mask: Tensor) -> Written:
    """Entries that a mask says, where one of them is broadcast to the other's shape."""
    if x.shape == mask.shape:
        return NotImplemented
    wide, wide_mask = torch.broadcast_tensors(x, mask)
    return wide[wide_mask]


def one_index(function: Callable[..., Tensor]) -> Callable[..., Written]:
    """Make an operation on rows named by an index take an index without a dimension as one of a single entry."""

    def form(x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Written:
        if not isinstance(index, Tensor) or index.dim() or not x.dim():
            return NotImplemented
        if "source" in kwargs:
            args = (kwargs.pop("source"), *args)
        if args and isinstance(args[0], Tensor) and not args[0].dim():
            args = (args[0].reshape(1), *args[1:])
        return function(x, dim, index.reshape(1), *args, **kwargs)

    return form


def rows_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pooling operation see images that lie channels-last in memory in the usual order."""

    def form(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        images = x.dim() >= 4 and not x.is_contiguous() and x.stride(1) == 1
        return function(x.contiguous(), *args, **kwargs) if images else NotImplemented

    return form


def matmul(a: Any, b: Any = None, *rest: Any, **named: Any) -> Written:
    """Product with a sparse matrix that is constant, on either side."""
    if rest or named:
        return NotImplemented
    if _is_constant_sparse(a) and _is_dense(b, (1, 2)) and a.shape[1] == len(b):
        wide = _product(lambda: a, b if b.dim() == 2 else b.unsqueeze(1))
        return wide if b.dim() == 2 else wide.squeeze(1)
    if _is_constant_sparse(b) and _is_dense(a, (2,)) and a.shape[1] == len(b):
        return _product(lambda: b.t(), a.t()).t()
    return NotImplemented


def addmm(
    x: Tensor, a: Any = None, b: Any = None, *rest: Any, beta: float = 1, alpha: float = 1, **named: Any
) -> Written:
    """Sum of a matrix and a product with a sparse matrix that is constant."""
    product = matmul(a, b, *rest, **named)
    return NotImplemented if product is NotImplemented else beta * x + alpha * product


def _is_constant_sparse(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout != torch.strided and x.dim() == 2 and not x.requires_grad


def _is_dense(x: Any, dimensions: tuple[int, ...]) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.dim() in dimensions


def _product(matrix: Callable[[], Tensor], dense: Tensor) -> Tensor:
    found: Tensor = _SparseProduct.apply(matrix, dense)
    return found


class _SparseProduct(torch.autograd.Function):
    """Product of a constant sparse matrix and a dense one; the former behind a call, torch.func cannot wrap it."""

    @staticmethod
    def forward(matrix: Callable[[], Tensor], dense: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # in a backward pass this may be called where it is written out again
            return matrix() @ dense

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.matrix = inputs[0]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        matrix = ctx.matrix
        return None, _product(lambda: matrix().t(), slope)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], matrix: Callable[[], Tensor], dense: Tensor) -> tuple[Tensor, int]:  # noqa: ARG004
        wide = dense.movedim(dims[1], -1)  # shape: (rows, columns, batch)
        found = _product(matrix, wide.flatten(1))
        return found.unflatten(1, wide.shape[1:]), 2
