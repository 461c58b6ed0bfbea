"""FCMAE, the fully convolutional masked autoencoder of ConvNeXt V2 (arXiv 2301.00808, section 3).

The encoder computes visible cells only. The official code is facebookresearch/ConvNeXt-V2, models/fcmae.py; names and
shapes of parameters are its own, those of the encoder are the dense ones of fine-tuning.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.backbone import check_choices
from pipeline.models.batchnorm import update_running_statistics
from pipeline.models.convnextv2 import ConvNeXtV2
from pipeline.models.decoder import create_decoder
from pipeline.models.initialise import initialise
from pipeline.models.response_norm import GRN
from pipeline.sparse import VisibleCells, find_layout


class FCMAEOutput(NamedTuple):
    """A tuple, because FSDP and ZeRO look for a module's output tensors in tuples, lists and dictionaries only."""

    loss: Tensor
    """Scalar: the mean over the hidden cells."""
    prediction: Tensor
    """(N, cell*cell*C, h, w) for images of C channels."""


class FCMAE(nn.Module):
    """Encode the visible cells, put a mask token into the hidden ones, decode densely, predict pixels linearly.

    The decoder takes activation checkpointing, response normalisation and initialisation scheme from the encoder.

    Args:
        encoder: a ConvNeXtV2 without head (`num_classes=0`).
        encoder_backend: "packed" or "spconv" compute visible cells only; "masked" computes the same densely, to check
            them. "dense" is the paper's comparison: hidden pixels are set to zero and nothing else is done.
        grn_statistics: "image"; or "batch" as in the official PyTorch code, though not in the published weights.
        normalize_target: predict each cell's pixels less their mean and divided by their deviation.
        decoder: "convnext", or for comparison "transformer", "unet", "unet_no_skips", see decoder.py.
        decoder_dim, decoder_depth: width and number of decoder blocks; a U-Net has this many blocks at each stride,
            and half the width at each finer one.
        seed: of the initial weights.
    """

    depths = ()  # no rates that decay by layer, whose rule does not know a decoder

    def __init__(
        self,
        encoder: ConvNeXtV2,
        encoder_backend: str = "packed",
        grn_statistics: str = "image",
        normalize_target: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        decoder: str = "convnext",
        seed: int = 0,
    ):
        super().__init__()
        if encoder.num_classes:
            raise ValueError(f"FCMAE needs an encoder without head; this one has {encoder.num_classes} classes")
        check_choices(grn_statistics=(grn_statistics, ("image", "batch")))
        if grn_statistics == "batch" and encoder.response.kind != "grn":
            raise ValueError(f"grn_statistics is batch but the blocks' response is {encoder.response.kind}; use image")
        self.normalize_target, self.cell = normalize_target, encoder.stride
        self._layout = find_layout(encoder_backend)
        self.init = encoder.init
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.encoder = encoder
        self.proj = nn.Conv2d(encoder.dims[-1], decoder_dim, 1)
        self.decoder = create_decoder(decoder, encoder, decoder_dim, decoder_depth)
        patch = self.cell // self.decoder.upscale
        self.pred = nn.Conv2d(self.decoder.width, patch * patch * encoder.in_channels, 1)
        for module in encoder.modules():
            if isinstance(module, GRN):
                module.across_images = grn_statistics == "batch"
        initialise(self, seed)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return the number of cells (h, w) of images (N, 3, H, W)."""
        height, width = images.shape[-2:]
        if height % self.cell or width % self.cell:
            raise ValueError(f"images are {height}x{width} pixels; both must be multiples of the cell, {self.cell}")
        return height // self.cell, width // self.cell

    def forward(self, images: Tensor, mask: Tensor | VisibleCells) -> FCMAEOutput:
        """Predict the hidden cells of images (N, 3, H, W).

        Args:
            images: normalised.
            mask: (N, L) bool, True = hidden, cells in row-major order, best on the CPU; or the visible cells.
        """
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
            prediction = group_patches(prediction, self.cell, self.decoder.upscale)
        if self.encoder.counts_batches:
            update_running_statistics(self)
        return FCMAEOutput(self.loss(images, prediction, visible.mask), prediction)

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error over the pixels of hidden cells; 0 if no cell is hidden."""
        target = patchify(images, self.cell)
        if self.normalize_target:
            mean, std = cell_statistics(target)
            target = (target - mean) / std
        error = (prediction.flatten(2).transpose(1, 2).to(target.dtype) - target).square().mean(-1)
        return (error * mask).sum() / mask.sum().clamp_min(1)

    @torch.no_grad()
    def paint(self, images: Tensor, mask: Tensor, prediction: Tensor, rescaled: bool = True) -> Tensor:
        """Return images (N, 3, H, W) with the hidden cells replaced by their prediction.

        rescaled: where the model predicts normalised cells, give each the mean and deviation of the pixels that it
            hides, as papers draw reconstructions. False uses nothing hidden: the mean is 0, which is grey, and the
            deviation is that of the image's visible cells on average.
        """
        cells = patchify(images, self.cell)
        painted = prediction.flatten(2).transpose(1, 2).to(cells.dtype)
        hidden = mask.to(cells.device).unsqueeze(-1)
        if self.normalize_target:
            mean, std = cell_statistics(cells)
            if not rescaled:
                mean = torch.zeros_like(mean)
                std = (std * ~hidden).sum(1, keepdim=True) / (~hidden).sum(1, keepdim=True).clamp_min(1)
            painted = painted * std + mean
        cells = torch.where(hidden, painted, cells)
        return unpatchify(cells, self.cell, self.grid(images))


def patchify(images: Tensor, cell: int) -> Tensor:
    """Cut images (N, C, H, W) into cells (N, L, cell*cell*C).

    Cells are in row-major order; inside a cell channels run fastest, then columns, then rows.
    """
    n, c, height, width = images.shape
    x = images.reshape(n, c, height // cell, cell, width // cell, cell)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, cell * cell * c)


def unpatchify(cells: Tensor, cell: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`."""
    n, (h, w) = cells.shape[0], grid
    x = cells.reshape(n, h, w, cell, cell, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(n, -1, h * cell, w * cell)


def group_patches(prediction: Tensor, cell: int, upscale: int) -> Tensor:
    """Group predictions of patches (N, p*p*C, h*upscale, w*upscale) into cells (N, cell*cell*C, h, w)."""
    patch, (height, width) = cell // upscale, prediction.shape[-2:]
    pixels = unpatchify(prediction.flatten(2).transpose(1, 2), patch, (height, width))
    cells = patchify(pixels, cell).transpose(1, 2)
    return cells.unflatten(2, (height // upscale, width // upscale))


def cell_statistics(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (N, L, 1) of each cell; the variance is unbiased plus 1e-6, as in the official code."""
    return cells.mean(-1, keepdim=True), (cells.var(-1, keepdim=True) + 1e-6).sqrt()
