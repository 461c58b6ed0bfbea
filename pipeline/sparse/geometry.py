"""Which cells an image shows, and where their sites are: the index tables that every block of a stage shares."""

from collections.abc import Callable

import torch
from torch import Tensor


class VisibleCells:
    """The visible cells of a batch, K per image.

    Tokens are the visible sites in packed order: image by image, cell by cell, row by row within a cell of side*side
    sites, N*K*side*side in all. The tables are computed on the CPU, once for each batch, and kept.

    Args:
        mask: (N, L) bool, True = hidden, cells row-major. On the CPU: a mask on a GPU costs a synchronisation.
        grid: (h, w) cells, h * w = L.
        device: where the indices are wanted.

    Raises:
        ValueError: if the mask does not fit the grid, or images show different numbers of cells (or none).
    """

    def __init__(self, mask: Tensor, grid: tuple[int, int], device: torch.device | None = None):
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool (images, {grid[0]}*{grid[1]} cells)"
            )
        host = mask.cpu()
        shown = (~host).sum(1)
        self.visible = int(shown[0])
        if self.visible == 0 or not torch.all(shown == self.visible):
            counts = sorted(set(shown.tolist()))
            raise ValueError(
                f"images show {counts} cells; every image must show the same number, at least one (see draw_mask)"
            )
        self.images, self.grid, self.device = mask.shape[0], grid, device or mask.device
        self._host_ids = (~host).nonzero()[:, 1].view(self.images, self.visible)
        self._tables: dict[tuple, Tensor] = {}
        self.mask = _sent(mask, self.device)

    def tokens(self, side: int) -> int:
        """How many visible sites the whole batch has: N*K*side*side."""
        return self.images * self.visible * side * side

    @property
    def ids(self) -> Tensor:
        """(N, K) int64: cell numbers of the visible cells, ascending."""
        return self._table(("ids",), lambda: self._host_ids)

    @property
    def cells(self) -> Tensor:
        """(N*K,) int64: row of each visible cell among all N*L cells."""
        return self.sites(1)

    def sites(self, side: int) -> Tensor:
        """(tokens,) int64: row of each token in a dense (N, h*side, w*side) map."""
        return self._table(("sites", side), lambda: self.host_sites(side))

    def host_sites(self, side: int) -> Tensor:
        """The same on the CPU, computed anew."""
        h, w = self.grid
        offset = torch.arange(side)
        row, column = (cell[..., None] * side + offset for cell in self._rows_and_columns())
        image = torch.arange(self.images)[:, None, None, None]
        return ((image * (h * side) + row[..., None]) * (w * side) + column[:, :, None, :]).flatten()

    def halo(self, side: int, reach: int) -> Tensor:
        """(N*K, side + 2*reach, side + 2*reach) int64: the tokens in and around each cell.

        Hidden sites and those beyond the image have the number `tokens(side)`, one past the last.
        """
        return self._table(("halo", side, reach), lambda: self._halo(side, reach))

    def pairs(self, side: int, reach: int) -> tuple[Tensor, Tensor]:
        """Tokens that are neighbours: (2, P) int64 pairs (near, token), and on the CPU how many each offset has.

        Sorted by offset, row-major in the window of 2*reach + 1 sites a side, from its first up to the one before its
        centre. The offsets after the centre are these, mirrored: with `near` and `token` in each other's place.
        P is the most there could be, the same for every batch, so that compiled code fits all; the rest is zeros.
        """
        key = ("pairs", side, reach)
        if key not in self._tables:
            around = self._halo(side, reach).unfold(1, 2 * reach + 1, 1).unfold(2, 2 * reach + 1, 1)
            near = around.reshape(self.tokens(side), -1).t()[: 2 * reach * (reach + 1)]
            found = near < self.tokens(side)
            pairs = torch.zeros(2, near.numel(), dtype=torch.int64)
            pairs[:, : int(found.sum())] = torch.stack((near[found], found.nonzero()[:, 1]))
            self._tables[key] = _sent(pairs, self.device)
            self._tables["counts", side, reach] = found.sum(1)
        return self._tables[key], self._tables["counts", side, reach]

    def keep(self, side: int) -> Tensor:
        """(N, h*side, w*side, 1) bool: True where a site is visible."""
        h, w = self.grid
        shown = (~self.mask).view(self.images, h, w)
        return shown.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(-1)

    def _table(self, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._tables:
            self._tables[key] = _sent(compute(), self.device)
        return self._tables[key]

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        return self._host_ids // self.grid[1], self._host_ids % self.grid[1]

    def _halo(self, side: int, reach: int) -> Tensor:
        # Number the visible cells in a grid with a rim as wide as the reach, in cells; -1 is hidden or outside.
        h, w = self.grid
        rim = -(-reach // side)
        row, column = self._rows_and_columns()
        image = torch.arange(self.images)[:, None]
        number = torch.full((self.images, h + 2 * rim, w + 2 * rim), -1)
        number[image, row + rim, column + rim] = torch.arange(self.images * self.visible).view(self.images, -1)
        offset = torch.arange(-reach, side + reach)
        cell, inside = offset.div(side, rounding_mode="floor") + rim, offset % side
        y, x = row[..., None] + cell, column[..., None] + cell
        owner = number[image[..., None, None], y[..., None], x[:, :, None, :]].flatten(0, 1)
        token = (owner * side + inside[:, None]) * side + inside
        return token.masked_fill(owner < 0, self.tokens(side))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """On the device. To a GPU by way of pinned memory, for else a large copy waits for the work before it."""
    from_pinned = device.type == "cuda" and not x.is_cuda
    return (x.pin_memory() if from_pinned else x).to(device, non_blocking=True)
