"""Geometry: every chunk of the selected upper triangle once, nothing below the diagonal, ragged ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import BlockError
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tiling import default_chunk, plan_tiles

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


def layout_of(sizes):
    return ParameterLayout.of([(f"p{k}", (size,)) for k, size in enumerate(sizes)])


@given(sizes, st.integers(1, 17), shapes)
def test_upper_triangle_once(sizes, chunk, shape):
    plan = plan_tiles(layout_of(sizes), "all", chunk, shape)
    chunks = [c for tile in plan.tiles() for c in plan.chunks(tile)]
    assert sorted(chunks) == [(i, j) for i in range(plan.side) for j in range(i, plan.side)]


@given(sizes, st.integers(1, 17), shapes, st.data())
def test_selected_blocks_are_covered(sizes, chunk, shape, data):
    layout = layout_of(sizes)
    names = st.sampled_from(layout.names)
    pairs = data.draw(st.lists(st.tuples(names, names), min_size=1, max_size=4))
    plan = plan_tiles(layout, tuple(pairs), chunk, shape)
    held = np.zeros((layout.size, layout.size), dtype=int)
    for tile in plan.tiles():
        assert len(tile.rows) <= shape[0]
        assert len(tile.cols) <= shape[1]
        for i, j in plan.chunks(tile):
            assert i <= j
            rows, cols = plan.span(range(i, i + 1)), plan.span(range(j, j + 1))
            held[rows.start : rows.stop, cols.start : cols.stop] += 1
    assert held.max(initial=0) <= 1
    assert held.sum() == plan.entries()
    for a, b in pairs:
        rows, cols = layout[a].span, layout[b].span
        assert plan.covers(rows, cols)
        assert plan.covers(cols, rows)
        assert (held | held.T)[rows.start : rows.stop, cols.start : cols.stop].all()


@given(sizes, st.integers(1, 17), shapes)
def test_tile_ids_differ(sizes, chunk, shape):
    tiles = plan_tiles(layout_of(sizes), "diagonal", chunk, shape).tiles()
    assert len({tile.id for tile in tiles}) == len(tiles)


@given(st.integers(1, 10**6))
def test_default_chunk(size):
    chunk = default_chunk(size)
    assert chunk & (chunk - 1) == 0
    assert 64 <= chunk <= 2048


@given(sizes, st.data())
def test_segments_partition_a_span(sizes, data):
    layout = layout_of(sizes)
    start = data.draw(st.integers(0, layout.size))
    span = range(start, data.draw(st.integers(start, layout.size)))
    found = [k for p, segment in layout.segments(span) for k in segment if k in p.span]
    assert found == list(span)


def test_layout_round_trip():
    layout = ParameterLayout.of({"w": (2, 3), "scalar": (), "none": (0, 4), "b": (5,)})
    assert ParameterLayout.from_json(layout.to_json()) == layout
    assert [(p.offset, p.size) for p in layout] == [(0, 6), (6, 1), (7, 0), (7, 5)]


def test_unknown_block_names_the_nearest():
    with pytest.raises(BlockError, match="did you mean `p1`"):
        plan_tiles(layout_of([3, 4]), (("p0", "p11"),), 2, (1, 1))


@pytest.mark.parametrize(("size", "unit"), [(101_770, 784), (50_890, 784), (9_000, 64), (3_466, 50), (500, 784)])
def test_chunks_are_of_whole_units(size, unit):
    chunk = default_chunk(size, unit)
    assert chunk % unit == 0 or unit > chunk == default_chunk(size)
    assert chunk <= 1.5 * default_chunk(size)
