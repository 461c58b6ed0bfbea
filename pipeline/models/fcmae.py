"""FCMAE: a masked autoencoder of a ConvNet that computes visible cells only (arXiv 2301.00808, section 3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.batchnorm import update_running_statistics
from pipeline.models.convnextv2 import ConvNeXtV2
from pipeline.models.decoder import create_decoder
from pipeline.models.initialise import initialise
from pipeline.models.response_norm import GRN
from pipeline.sparse import VisibleCells, find_layout


class FCMAEOutput(NamedTuple):
    """`loss` is a scalar, the mean over hidden cells; `prediction` is (N, cell*cell*3, h, w).

    A tuple, because FSDP and ZeRO look for a module's output tensors in tuples, lists and dictionaries only.
    """

    loss: Tensor
    prediction: Tensor


class FCMAE(nn.Module):
    """Encoder on the visible cells, a mask token in the hidden ones, a dense decoder, a linear prediction of pixels.

    Activation checkpointing, the blocks' response normalisation and the scheme of the initial weights are those of the
    encoder.

    Args:
        encoder: a ConvNeXtV2 without head (`num_classes=0`).
        encoder_backend: "packed" computes visible cells only, as does "spconv" with that package's tensors; "masked" is
            their dense oracle. "dense" is the paper's comparison: hidden pixels are zero and nothing else is done.
        grn_statistics: "image", or "batch" as the official PyTorch code has it (its published weights do not).
        normalize_target: predict each cell's pixels after subtracting their mean and dividing by their deviation.
        decoder: "convnext", or for comparison "transformer", "unet" and "unet_no_skips" (see `decoder.py`).
        decoder_dim, decoder_depth: width and number of decoder blocks; a U-Net has as many at each stride, and half
            the width at each finer one.
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
        decoder: str = "convnext",
        seed: int = 0,
    ):
        super().__init__()
        if encoder.num_classes:
            raise ValueError(f"FCMAE needs an encoder without head; this one has {encoder.num_classes} classes")
        if cell != encoder.stride:
            raise ValueError(f"cell is {cell} pixels but the encoder's stride is {encoder.stride}; they must be equal")
        if grn_statistics not in ("image", "batch"):
            raise ValueError(f"grn_statistics is {grn_statistics!r}; choose image or batch")
        if grn_statistics == "batch" and encoder.response.kind != "grn":
            raise ValueError(f"grn_statistics is batch but the blocks' response is {encoder.response.kind}; use image")
        self.normalize_target, self.cell = normalize_target, cell
        self._layout = find_layout(encoder_backend)
        self.init = encoder.init
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.encoder = encoder
        self.proj = nn.Conv2d(encoder.dims[-1], decoder_dim, 1)
        self.decoder = create_decoder(decoder, encoder, decoder_dim, decoder_depth)
        patch = cell // self.decoder.upscale
        self.pred = nn.Conv2d(self.decoder.width, patch * patch * encoder.in_channels, 1)
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

    def forward(self, images: Tensor, mask: Tensor | VisibleCells) -> FCMAEOutput:
        """Images (N, 3, H, W); mask (N, L) bool, True = hidden, cells row-major, best left on the CPU, or its cells."""
        grid = self.grid(images)
        visible = mask if isinstance(mask, VisibleCells) else VisibleCells(mask, grid, images.device)
        if visible.grid != grid:
            raise ValueError(f"the mask has {visible.grid} cells but the images have {grid}; both must be equal")
        layout = self._layout(visible)
        stages = self.encoder.stage_outputs(images, layout)
        x = self.proj(layout.to_map(stages[-1]).permute(0, 3, 1, 2))
        x = torch.where(visible.mask.view(-1, 1, *visible.grid), self.mask_token.to(x.dtype), x)
        x = self.decoder(x.permute(0, 2, 3, 1), stages, layout, visible)
        prediction = self.pred(x.permute(0, 3, 1, 2))
        if self.decoder.upscale > 1:
            prediction = regroup(prediction, self.cell, self.decoder.upscale)
        if self.encoder.response.kind == "bn":
            update_running_statistics(self)
        return FCMAEOutput(self.loss(images, prediction, visible.mask), prediction)

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Squared error, averaged over the hidden cells' pixels; 0 if none is hidden."""
        target = patchify(images, self.cell)
        if self.normalize_target:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (prediction.flatten(2).transpose(1, 2).to(target.dtype) - target).square().mean(-1)
        return (error * mask).sum() / mask.sum().clamp_min(1)

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


def regroup(prediction: Tensor, cell: int, upscale: int) -> Tensor:
    """Predictions of small patches, (N, p*p*C, h*upscale, w*upscale), as those of the cells they make up:
    (N, cell*cell*C, h, w)."""
    patch, (height, width) = cell // upscale, prediction.shape[-2:]
    pixels = unpatchify(prediction.flatten(2).transpose(1, 2), patch, (height, width))
    cells = patchify(pixels, cell).transpose(1, 2)
    return cells.unflatten(2, (height // upscale, width // upscale))


def patch_statistics(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each cell's values, (N, L, 1): unbiased variance plus 1e-6, as in the official code."""
    return cells.mean(-1, keepdim=True), (cells.var(-1, keepdim=True) + 1e-6).sqrt()
