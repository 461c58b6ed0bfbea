"""Which cells an image shows, and where their sites are in a dense map."""

from functools import cached_property

import torch
from torch import Tensor


class VisibleCells:
    """The visible cells of a batch, K per image.

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
                f"images show {counts} cells; every image must show the same number, at least one (see random_mask)"
            )
        self.images, self.grid, self.device = mask.shape[0], grid, device or mask.device
        self._host_ids = (~host).nonzero()[:, 1].view(self.images, self.visible)
        self.mask = mask.to(self.device, non_blocking=True)

    @cached_property
    def ids(self) -> Tensor:
        """(N, K) int64: cell numbers of the visible cells, ascending."""
        return self._host_ids.to(self.device, non_blocking=True)

    @cached_property
    def cells(self) -> Tensor:
        """(N*K,) int64: row of each visible cell among all N*L cells."""
        first = torch.arange(self.images)[:, None] * (self.grid[0] * self.grid[1])
        return (first + self._host_ids).flatten().to(self.device, non_blocking=True)

    def sites(self, side: int) -> Tensor:
        """(N*K*side*side,) int64: row of each visible site, cell by cell, in a dense (N, h*side, w*side) map."""
        if side not in self._sites:
            h, w = self.grid
            offset = torch.arange(side)
            row = (self._host_ids // w)[..., None] * side + offset
            column = (self._host_ids % w)[..., None] * side + offset
            image = torch.arange(self.images)[:, None, None, None]
            site = (image * (h * side) + row[..., None]) * (w * side) + column[:, :, None, :]
            self._sites[side] = site.flatten().to(self.device, non_blocking=True)
        return self._sites[side]

    @cached_property
    def _sites(self) -> dict[int, Tensor]:
        return {}

    def keep(self, side: int) -> Tensor:
        """(N, h*side, w*side, 1) bool: True where a site is visible."""
        h, w = self.grid
        shown = (~self.mask).view(self.images, h, w)
        return shown.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(-1)
