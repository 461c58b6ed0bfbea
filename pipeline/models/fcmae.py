"""FCMAE: a masked autoencoder of a ConvNet that computes visible cells only (arXiv 2301.00808, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.convnextv2 import GRN, Block, ConvNeXtV2
from pipeline.models.initialise import initialise
from pipeline.sparse import DENSE, Masked, Packed, VisibleCells

LAYOUTS = {"packed": Packed, "masked": Masked}


@dataclass(frozen=True)
class FCMAEOutput:
    """`loss` is a scalar, the mean over hidden cells; `prediction` is (N, cell*cell*3, h, w)."""

    loss: Tensor
    prediction: Tensor


class FCMAE(nn.Module):
    """Encoder on the visible cells, a mask token in the hidden ones, a dense decoder, a linear prediction of pixels.

    Args:
        encoder: a ConvNeXtV2 without head (`num_classes=0`).
        encoder_backend: "packed" computes visible cells only; "masked" is its dense oracle.
        grn_statistics: "image", or "batch" as the official PyTorch code has it (its published weights do not).
        normalize_target: predict each cell's pixels after subtracting their mean and dividing by their deviation.
        decoder_dim, decoder_depth: width and number of decoder blocks.
        cell: pixels on a side of a cell; must be the encoder's stride.
        seed: of the initial weights.
    """

    def __init__(
        self,
        encoder: ConvNeXtV2,
        encoder_backend: str = "packed",
        grn_statistics: str = "image",
        normalize_target: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        cell: int = 32,
        seed: int = 0,
    ):
        super().__init__()
        if encoder.num_classes:
            raise ValueError(f"FCMAE needs an encoder without head; this one has {encoder.num_classes} classes")
        if cell != encoder.stride:
            raise ValueError(f"cell is {cell} pixels but the encoder's stride is {encoder.stride}; they must be equal")
        if encoder_backend not in LAYOUTS:
            raise ValueError(f"encoder_backend is {encoder_backend!r}; choose one of {', '.join(LAYOUTS)}")
        if grn_statistics not in ("image", "batch"):
            raise ValueError(f"grn_statistics is {grn_statistics!r}; choose image or batch")
        self.encoder_backend, self.normalize_target, self.cell = encoder_backend, normalize_target, cell
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.encoder = encoder
        self.proj = nn.Conv2d(encoder.dims[-1], decoder_dim, 1)
        self.decoder = nn.Sequential(*[Block(decoder_dim) for _ in range(decoder_depth)])
        self.pred = nn.Conv2d(decoder_dim, cell * cell * encoder.in_channels, 1)
        for module in encoder.modules():
            if isinstance(module, GRN):
                module.across_images = grn_statistics == "batch"
        initialise(self, seed)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) cells of images (N, 3, H, W)."""
        height, width = images.shape[-2:]
        if height % self.cell or width % self.cell:
            raise ValueError(f"images are {height}x{width} pixels; both must be multiples of the cell, {self.cell}")
        return height // self.cell, width // self.cell

    def forward(self, images: Tensor, mask: Tensor) -> FCMAEOutput:
        """Images (N, 3, H, W); mask (N, L) bool, True = hidden, cells row-major, best left on the CPU."""
        visible = VisibleCells(mask, self.grid(images), images.device)
        x = self.encoder.features(images, LAYOUTS[self.encoder_backend](visible))
        x = self.proj(x.permute(0, 3, 1, 2))
        hidden = visible.mask.view(-1, 1, *visible.grid)
        x = torch.where(hidden, self.mask_token.to(x.dtype), x).permute(0, 2, 3, 1)
        for block in self.decoder:
            x = block(x, DENSE)
        prediction = self.pred(x.permute(0, 3, 1, 2))
        return FCMAEOutput(self.loss(images, prediction, visible.mask), prediction)

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Squared error, averaged over the hidden cells' pixels."""
        target = patchify(images, self.cell)
        if self.normalize_target:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (prediction.flatten(2).transpose(1, 2).to(target.dtype) - target).square().mean(-1)
        return (error * mask).sum() / mask.sum()

    @torch.no_grad()
    def paint(self, images: Tensor, mask: Tensor, prediction: Tensor) -> Tensor:
        """Images (N, 3, H, W) with the hidden cells replaced by what was predicted for them."""
        cells = patchify(images, self.cell)
        painted = prediction.flatten(2).transpose(1, 2).to(cells.dtype)
        if self.normalize_target:
            mean, std = patch_statistics(cells)
            painted = painted * std + mean
        cells = torch.where(mask.to(cells.device).unsqueeze(-1), painted, cells)
        return unpatchify(cells, self.cell, self.grid(images))


def patchify(images: Tensor, cell: int) -> Tensor:
    """(N, C, H, W) to (N, L, cell*cell*C): cells row-major; in a cell channels run fastest, then columns, then rows."""
    n, c, height, width = images.shape
    x = images.reshape(n, c, height // cell, cell, width // cell, cell)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, cell * cell * c)


def unpatchify(cells: Tensor, cell: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`."""
    n, (h, w) = cells.shape[0], grid
    x = cells.reshape(n, h, w, cell, cell, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(n, -1, h * cell, w * cell)


def patch_statistics(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each cell's values, (N, L, 1): unbiased variance plus 1e-6, as in the official code."""
    return cells.mean(-1, keepdim=True), (cells.var(-1, keepdim=True) + 1e-6).sqrt()
