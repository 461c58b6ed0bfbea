"""The index tables of visible cells, checked by a walk over every site of the map."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sparse import VisibleCells


@st.composite
def visible_cells(draw):
    h, w, images = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shown = draw(st.integers(1, h * w))
    order = torch.rand(images, h * w, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).argsort(1)
    return VisibleCells(order >= shown, (h, w))


def walk(visible: VisibleCells, side: int) -> dict[tuple[int, int, int], int]:
    """Map (image, y, x) of every visible site to its token."""
    places = {}
    for image, hidden in enumerate(visible.mask.tolist()):
        for cell in (cell for cell, is_hidden in enumerate(hidden) if not is_hidden):
            top, left = cell // visible.grid[1] * side, cell % visible.grid[1] * side
            for y, x in itertools.product(range(side), repeat=2):
                places[image, top + y, left + x] = len(places)
    return places


@given(visible_cells(), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_sites_and_keep(visible, side):
    h, w = visible.grid[0] * side, visible.grid[1] * side
    places = walk(visible, side)
    assert visible.tokens(side) == len(places)
    assert visible.token_rows(side).tolist() == [(image * h + y) * w + x for image, y, x in places]
    rows = visible.visible_sites(side).flatten().nonzero().flatten()
    assert rows.tolist() == sorted(visible.token_rows(side).tolist())


@given(visible_cells(), st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_halo_and_pairs(visible, side, reach):
    places = walk(visible, side)
    missing, window = len(places), 2 * reach + 1
    halo = visible.halo(side, reach)
    pairs, counts = visible.pairs(side, reach)
    assert halo.shape == (visible.images * visible.cells_per_image, side + 2 * reach, side + 2 * reach)
    expected = set()
    for (image, y, x), token in places.items():
        cell, (row, column) = token // side**2, divmod(token % side**2, side)
        for offset, (dy, dx) in enumerate(itertools.product(range(window), repeat=2)):
            near = places.get((image, y + dy - reach, x + dx - reach), missing)
            assert halo[cell, row + dy, column + dx] == near
            if near != missing and offset < window * window // 2:
                expected.add((offset, near, token))
    offsets = torch.arange(len(counts)).repeat_interleave(counts)
    used = pairs[:, : len(offsets)]
    assert sorted(expected) == sorted(zip(offsets.tolist(), *used.tolist(), strict=True))
    assert offsets.tolist() == sorted(offsets.tolist())


def test_a_table_is_made_once():
    visible = VisibleCells(torch.tensor([[True, False, False, True]]), (2, 2))
    assert visible.halo(2, 3) is visible.halo(2, 3)
    assert visible.token_rows(2) is visible.token_rows(2)
    assert visible.pairs(2, 3)[0] is visible.pairs(2, 3)[0]


def test_a_wide_grid_and_a_high_one():
    for grid in ((1, 64), (64, 1), (64, 64)):
        mask = torch.rand(1, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.6
        visible = VisibleCells(mask, grid)
        assert visible.halo(1, 3).max() == visible.tokens(1)
        assert visible.halo(1, 3)[:, 3, 3].tolist() == list(range(visible.tokens(1)))
