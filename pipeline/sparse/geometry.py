"""Which cells of a batch are visible, and the index tables of their sites that all blocks of a stage share.

A cell is a square of pixels that is hidden or visible as a whole (32 x 32 in the paper). At a stage of the network it
has side x side sites: 8 x 8 after the stem, then 4 x 4, 2 x 2 and 1 x 1. A token is a visible site.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class VisibleCells:
    """The visible cells of a batch of images, equally many in each.

    Tokens are in packed order: image by image, cell by cell, and row by row within a cell. The tables are computed on
    the CPU when they are first asked for, and kept.

    Args:
        mask: (N, L) bool, True = hidden, cells in row-major order. Best on the CPU: a GPU must be waited for.
        grid: cells of an image, (h, w) with h * w = L.
        device: where the tables go; the mask's device if None.

    Attributes:
        images: N.
        cells_per_image: visible cells of each image, K.
        mask: the mask on `device`.

    Raises:
        ValueError: if the mask does not fit the grid, or the images show no cell or different numbers of cells.
    """

    def __init__(self, mask: Tensor, grid: tuple[int, int], device: torch.device | None = None):
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool (images, {grid[0]}*{grid[1]} cells)"
            )
        visible = ~mask.cpu()
        counts = visible.sum(1)
        self.cells_per_image = int(counts[0])
        if self.cells_per_image == 0 or not torch.all(counts == self.cells_per_image):
            raise ValueError(
                f"images show {sorted(set(counts.tolist()))} cells; every image must show the same number, at least"
                " one: draw the mask with draw_mask"
            )
        self.images, self.grid, self.device = mask.shape[0], grid, device or mask.device
        cell = visible.nonzero()[:, 1].view(self.images, self.cells_per_image)
        self._row, self._column = cell // grid[1], cell % grid[1]
        self._tables: dict[tuple, Tensor] = {}
        self.mask = _to_device(mask, self.device)

    def tensors(self) -> list[Tensor]:
        """Return the mask and the tables made so far, as far as they are on the device."""
        return [tensor for tensor in (self.mask, *self._tables.values()) if tensor.device.type == self.device.type]

    def tokens(self, side: int) -> int:
        """Count the tokens of the batch: N * K * side * side."""
        return self.images * self.cells_per_image * side * side

    def token_rows(self, side: int) -> Tensor:
        """(tokens,) int64: each token's row in a dense map (N * h*side * w*side, C)."""
        return self._table(("rows", side), lambda: self.token_rows_on_cpu(side))

    def token_rows_on_cpu(self, side: int) -> Tensor:
        """Compute `token_rows` anew, on the CPU."""
        h, w = self.grid
        offset = torch.arange(side)
        y, x = (cell[..., None] * side + offset for cell in (self._row, self._column))
        image = torch.arange(self.images)[:, None, None, None]
        return ((image * (h * side) + y[..., None]) * (w * side) + x[:, :, None, :]).flatten()

    def halo(self, side: int, reach: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """(N*K, side + 2*reach, side + 2*reach) of `dtype`: the tokens of each cell and of the sites around it.

        Hidden sites and sites beyond the image have the number `tokens(side)`, one past the last token.
        """
        return self._table(("halo", side, reach, dtype), lambda: self._halo(side, reach).to(dtype))

    def pairs(self, side: int, reach: int) -> tuple[Tensor, Tensor]:
        """Pairs of neighbouring tokens, (2, P) int64 as (near, token), and on the CPU their number at each offset.

        Pairs are sorted by offset: row-major in the window of 2*reach + 1 sites a side, from the first offset to the
        one before the centre. The offsets after the centre are the mirror images: swap `near` and `token`. P is the
        largest number that any mask could give, so that compiled code fits every batch; the rest is zeros.
        """
        key = ("pairs", side, reach)
        if key not in self._tables:
            around = self._halo(side, reach).unfold(1, 2 * reach + 1, 1).unfold(2, 2 * reach + 1, 1)
            near = around.reshape(self.tokens(side), -1).t()[: 2 * reach * (reach + 1)]
            exists = near < self.tokens(side)
            pairs = torch.zeros(2, near.numel(), dtype=torch.int64)
            pairs[:, : int(exists.sum())] = torch.stack((near[exists], exists.nonzero()[:, 1]))
            self._tables[key] = _to_device(pairs, self.device)
            self._tables["counts", side, reach] = exists.sum(1)
        return self._tables[key], self._tables["counts", side, reach]

    def visible_sites(self, side: int) -> Tensor:
        """(N, h*side, w*side, 1) bool: True where a site is visible."""
        visible = (~self.mask).view(self.images, *self.grid)
        return visible.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(-1)

    def _table(self, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._tables:
            self._tables[key] = _to_device(compute(), self.device)
        return self._tables[key]

    def _halo(self, side: int, reach: int) -> Tensor:
        # Number the visible cells in a grid with a rim as wide as the reach, in cells; -1 is hidden or outside.
        h, w = self.grid
        rim = -(-reach // side)
        image = torch.arange(self.images)[:, None]
        number = torch.full((self.images, h + 2 * rim, w + 2 * rim), -1)
        number[image, self._row + rim, self._column + rim] = torch.arange(self._row.numel()).view(self.images, -1)
        offset = torch.arange(-reach, side + reach)
        cell, inside = offset.div(side, rounding_mode="floor") + rim, offset % side
        y, x = self._row[..., None] + cell, self._column[..., None] + cell
        owner = number[image[..., None, None], y[..., None], x[:, :, None, :]].flatten(0, 1)
        token = (owner * side + inside[:, None]) * side + inside
        return token.masked_fill(owner < 0, self.tokens(side))


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, because a large copy from other memory waits for all work that the GPU was given before.
    from_pinned = device.type == "cuda" and not x.is_cuda
    return (x.pin_memory() if from_pinned else x).to(device, non_blocking=True)
