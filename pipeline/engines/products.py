"""Sums over samples of products of three factors, as matrix products: where the time of the factored engine goes.

Blocks of two layers are made of sums_n a[n, j] b[n, k] X[i, n, p]. As a matrix product of pairs (i, p) with pairs
(j, k) such a sum meets the lower bound of arithmetic. Its operands are formed strip by strip, small enough for the
cache, and the result is added to the matrix, whose order of indices is (i, j, p, k).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Of a strip of the result, and of the operand it is made from: what stays in a CPU's cache, or fills a GPU.
STRIP_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
OPERAND_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
FEWEST_SAMPLES = 512  # of an operand: the inner dimension of the product
ALIGNED = 8  # inputs of a strip: others lose up to a quarter of the speed
TF32_HALF = 2**12  # of the last bit that TF32 keeps, in those of float32
SYMMETRIC_STRIP = 32  # inputs at most, of a strip whose square on the diagonal is computed in full


class Workspace:
    """Memory for operands and results, taken again and again: on a CPU fresh pages cost more than what fills them.

    Args:
        splits: whether products in float32 are three in TF32 each, which a GPU's tensor cores take: see `split`.
    """

    def __init__(self, *, splits: bool = False) -> None:
        self._kept: dict[str, Tensor] = {}
        self._splits = splits

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return a tensor of any content; what was taken under that name before is given up.

        Args:
            name: of the use.
            like: its type and device.
            shape: its own.

        Returns:
            The tensor.
        """
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept.pop(name, None)  # first, so that both are not held at once
            self._kept[name] = like.new_empty(size)
        return self._kept[name][:size].view(shape)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, adds: bool, keeps: bool = True) -> None:
        """Take a matrix product, where most of the time goes.

        Args:
            a: one factor.  # shape: (m, n)
            b: the other.  # shape: (n, k)
            out: changed in place.  # shape: (m, k)
            adds: whether the product is added to what is there.
            keeps: whether the other factor may not be written over.
        """
        if not self._splits or a.dtype != torch.float32:
            torch.addmm(out, a, b, beta=int(adds), out=out)
            return
        high_a, low_a = split(a, *(self.take(f"{part} left", a, *a.shape) for part in ("high", "low")))
        low_b = self.take("low right", b, *b.shape) if keeps else b
        high_b, low_b = split(b, self.take("high right", b, *b.shape), low_b)
        with _tensor_cores():  # the smallest first, and without what both low parts give: 2**-22
            torch.addmm(out, low_a, high_b, beta=int(adds), out=out)
            torch.addmm(out, high_a, low_b, out=out)
            torch.addmm(out, high_a, high_b, out=out)


def split(values: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Write numbers as sums of one of TF32, which has float32's exponents and 10 of its 23 bits, and of what is left.

    Three products of such parts are that of float32 to its last bits but two, at the speed of tensor cores, which take
    TF32, cut the low parts to it, and add up in float32 (Ootomo and Yokota, 2022). As the low parts have both signs,
    what is cut off cancels. Without tensor cores the same numbers are multiplied in float32.

    Args:
        values: in float32.
        high: changed in place.  # shape: as of values
        low: likewise; it may be `values`.

    Returns:
        Both.
    """
    # To the nearest, half away from zero; what is not finite may become another that is not.
    torch.add(values.view(torch.int32), TF32_HALF, out=high.view(torch.int32)).bitwise_and_(~(2 * TF32_HALF - 1))
    return high, torch.sub(values, high, out=low)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let products in float32 go by TF32, on a GPU that has it."""
    matmul = torch.backends.cuda.matmul
    saved, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = saved


def add_product(out: Tensor, a: Tensor, b: Tensor, X: Tensor, space: Workspace) -> None:
    """Add out[i, j, p, k] += sum_n a[n, j] b[n, k] X[i, n, p].

    Args:
        out: changed in place, any strides.  # shape: (I, J, P, K)
        a: one factor.  # shape: (N, J)
        b: another.  # shape: (N, K)
        X: the third.  # shape: (I, N, P)
        space: to work in.
    """
    units, J, P, K = out.shape
    strips = _Strips(X.transpose(1, 2).reshape(units * P, -1), a, b, space)
    for strip in strips.cut(J, J):
        G = strips.product(strip, slice(0, K))
        out[:, strip] += G.view(units, P, -1, K).transpose(1, 2)


def add_symmetric(out: Tensor, a: Tensor, X: Tensor, units: range, rows: range, cols: range, space: Workspace) -> None:
    """Add out[i, j, p, k] += sum_n a[n, j] a[n, k] X[i, n, p] where X is symmetric in its units i and p.

    The sum is symmetric under j <-> k and under i <-> p separately: a quarter of it is computed. Entries of out are
    added to in all of its rows that hold mirror images, so that calls for all of `rows` together give the whole.

    Args:
        out: changed in place, any strides.  # shape: (rows, J, cols, J)
        a: the layer's input.  # shape: (N, J)
        X: d delta_p / dz_i.  # shape: (units, N, cols)
        units: of `rows`, those computed.
        rows: units of out's rows.
        cols: units of out's columns.
        space: to work in.
    """
    square = range(max(rows.start, cols.start), min(rows.stop, cols.stop))
    spans = [(k, unit, span) for k, unit in enumerate(units) for span in _computed(unit, square, cols)]
    pairs = torch.cat([X[k, :, _within(span, cols)].T for k, _, span in spans])
    strips, J = _Strips(pairs, a, a, space), a.shape[1]
    for strip in strips.cut(J, SYMMETRIC_STRIP):
        G = strips.product(strip, slice(strip.start, J)).view(len(pairs), -1, J - strip.start)
        done = 0
        for _, unit, span in spans:
            part = G[done : done + len(span)]  # shape: (span, strip, inputs from the strip's first)
            done += len(span)
            _add_twice(out[unit - rows.start, :, _within(span, cols)].transpose(0, 1), part, strip)
            mirrored = range(max(span.start, unit + 1), min(span.stop, square.stop)) if unit in square else range(0)
            if mirrored:
                later = part[_within(mirrored, span)]
                _add_twice(out[_within(mirrored, rows), :, unit - cols.start], later, strip)


def tangents(b: Tensor, dz: Tensor, delta: Tensor, db: Tensor | None, space: Workspace) -> Tensor:
    """Differentiate each sample's gradient of a weight in some directions.

        sum_t' b[n, t', k] dz[t, n, t', p] + delta[n, t', p] db[t, n, t', k]

    Args:
        b: the layer's input.  # shape: (N, T', K)
        dz: derivatives of delta in directions t.  # shape: (T, N, T', P)
        delta: dL / dz of the layer.  # shape: (N, T', P)
        db: derivatives of the input, None where they are zero.  # shape: (T, N, T', K)
        space: to work in.

    Returns:
        The derivatives, in that space.  # shape: (N * T, P * K)
    """
    T, N, positions, P = dz.shape
    K = b.shape[2]
    Y = space.take("tangents", b, N, T * P, K)
    torch.bmm(dz.permute(1, 0, 3, 2).reshape(N, T * P, positions), b, out=Y)
    if db is not None:
        second = space.take("second", b, N, P, T * K)
        torch.bmm(delta.transpose(1, 2), db.permute(1, 2, 0, 3).reshape(N, positions, T * K), out=second)
        Y.view(N, T, P, K).add_(second.view(N, P, T, K).transpose(1, 2))
    return Y.view(N * T, P * K)


def tangents_at(tokens: Tensor, known: range, dz: Tensor) -> Tensor:
    """Differentiate each sample's gradient of an embedding in some directions: sum_t' [token] dz[t, n, t', p].

    Args:
        tokens: at each position.  # shape: (N, T')
        known: those that are wanted.
        dz: derivatives of delta in directions t.  # shape: (T, N, T', P)

    Returns:
        The derivatives.  # shape: (N * T, len(known) * P)
    """
    T, N, _, P = dz.shape
    Y = dz.new_zeros(N * len(known), T, P)
    place, is_known = places_among(tokens, known)
    samples = torch.arange(N, device=tokens.device)[:, None] * len(known)
    added = dz.permute(1, 2, 0, 3).masked_fill(~is_known[:, :, None, None], 0)
    Y.index_add_(0, (samples + place).flatten(), added.flatten(0, 1))
    return Y.view(N, len(known), T, P).transpose(1, 2).reshape(N * T, len(known) * P)


def places_among(tokens: Tensor, known: range) -> tuple[Tensor, Tensor]:
    """Place tokens among some: 0 for others, whose number no host has to wait for.

    Args:
        tokens: of any shape.
        known: those that are wanted.

    Returns:
        Places within these, and whether they are of these.
    """
    is_known = (tokens >= known.start) & (tokens < known.stop)
    return torch.where(is_known, tokens - known.start, 0), is_known


class _Strips:
    """Products of pairs (i, p) with pairs (j, k), a strip of j at a time.

    Args:
        pairs: X of pairs (i, p).  # shape: (pairs, N)
        a: one factor.  # shape: (N, J)
        b: the other.  # shape: (N, K)
        space: to work in.
    """

    def __init__(self, pairs: Tensor, a: Tensor, b: Tensor, space: Workspace) -> None:
        self._pairs, self._a, self._b, self._space = pairs, a, b, space

    def cut(self, inputs: int, most: int) -> Iterator[slice]:
        """Cut inputs j into strips."""
        device, row = self._b.device.type, self._b.shape[1] * self._b.element_size()
        size = min(
            most, STRIP_BYTES[device] // (len(self._pairs) * row), OPERAND_BYTES[device] // (FEWEST_SAMPLES * row)
        )
        size = max(1, size // ALIGNED * ALIGNED if size > ALIGNED else size)
        for start in range(0, inputs, size):
            yield slice(start, min(start + size, inputs))

    def product(self, j: slice, k: slice) -> Tensor:
        """Sum over samples, until the next call.  # shape: (pairs, len(j) * len(k))."""
        a, b = self._a[:, j, None], self._b[:, None, k]
        J, K = a.shape[1], b.shape[2]
        G = self._space.take("result", a, len(self._pairs), J * K)
        for number, panel in enumerate(_panels(len(a), J * K, a)):
            pairs = self._pairs[:, panel]
            Z = torch.mul(a[panel], b[panel], out=self._space.take("operand", a, pairs.shape[1], J, K))
            self._space.multiply(pairs, Z.view(-1, J * K), G, adds=number > 0, keeps=False)
        return G


def _computed(unit: int, square: range, cols: range) -> list[range]:
    """Return the columns' units that a row's unit is computed with; the others are mirror images."""
    if unit not in square:
        return [cols]
    return [span for span in (range(cols.start, square.start), range(unit, cols.stop)) if span]


def _add_twice(out: Tensor, part: Tensor, strip: slice) -> None:
    """Add a strip of a symmetric matrix from its diagonal on, and its mirror image.

    Args:
        out: changed in place.  # shape: (pairs, J, J)
        part: of it.  # shape: (pairs, strip, J from the strip's first on)
        strip: of J.
    """
    out[:, strip, strip.start :] += part
    out[:, strip.stop :, strip] += part[:, :, strip.stop - strip.start :].transpose(1, 2)


def _within(inner: range, outer: range) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


def _panels(samples: int, width: int, like: Tensor) -> Iterator[slice]:
    """Cut samples into panels of an operand that stay in the cache."""
    size = max(FEWEST_SAMPLES, OPERAND_BYTES[like.device.type] // (width * like.element_size()))
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
