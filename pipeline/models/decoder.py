"""Decoders of FCMAE: they turn the last map of the encoder, mask tokens filled in, into features that predict pixels.

All are dense over all cells. The published decoder is ConvNeXt blocks; the paper (table 1) compares it with a
transformer and with U-Nets. The paper gives no details of these, so the classes here document their own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.backbone import check_choices, run_block
from pipeline.models.convnextv2 import ConvNeXtBlock, ConvNeXtV2
from pipeline.models.response_norm import EPS
from pipeline.sparse import Layout, VisibleCells

KINDS = ("convnext", "transformer", "unet", "unet_no_skips")
HEAD_DIM = 32


def create_decoder(kind: str, encoder: ConvNeXtV2, dim: int, depth: int) -> "FCMAEDecoder":
    """Create a decoder with `depth` blocks, `dim` wide at the encoder's last stride.

    Raises:
        ValueError: if the kind is unknown, or cannot have this width.
    """
    check_choices(decoder=(kind, KINDS))
    if kind == "convnext":
        return ConvNeXtDecoder(encoder, dim, depth)
    if kind == "transformer":
        return TransformerDecoder(encoder, dim, depth)
    return UNetDecoder(encoder, dim, depth, skips=kind == "unet")


class FCMAEDecoder(nn.Module):
    """The base of all decoders."""

    width: int
    """Channels of the output."""
    upscale: int = 1
    """Sites of the output along a side of one site of the last map."""

    def forward(self, x: Tensor, stages: Sequence[Tensor], layout: Layout, visible: VisibleCells) -> Tensor:
        """Map features to (N, h*upscale, w*upscale, width).

        Args:
            x: (N, h, w, dim), with mask tokens in the hidden cells.
            stages: the encoder's features after each stage, as they lie in `layout`.
            layout: the layout of the encoder.
            visible: the visible cells.
        """
        raise NotImplementedError


class ConvNeXtDecoder(FCMAEDecoder, nn.Sequential):
    """Blocks like those of the encoder, under the official names `decoder.N.*`."""

    def __init__(self, encoder: ConvNeXtV2, dim: int, depth: int):
        super().__init__(*[ConvNeXtBlock(dim, encoder.response, encoder.layer_scale) for _ in range(depth)])
        self.width, self.checkpointing = dim, encoder.checkpointing

    def forward(self, x: Tensor, stages: Sequence[Tensor], layout: Layout, visible: VisibleCells) -> Tensor:
        for block in self:
            x = run_block(block, x, checkpointing=self.checkpointing)
        return x


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and an MLP of width 4C on tokens (N, L, C), with one head for every 32 channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TransformerDecoder(FCMAEDecoder):
    """The decoder of MAE (He et al. 2022): fixed sine and cosine positions, `depth` pre-norm blocks, a LayerNorm.

    Heads have 32 channels, so 512 channels have 16 heads, as in MAE.
    """

    def __init__(self, encoder: ConvNeXtV2, dim: int, depth: int):
        if dim % HEAD_DIM:
            raise ValueError(f"decoder_dim is {dim}; a transformer decoder needs a multiple of {HEAD_DIM}")
        super().__init__()
        self.width, self.checkpointing = dim, encoder.checkpointing
        self.blocks = nn.ModuleList(TransformerBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, stages: Sequence[Tensor], layout: Layout, visible: VisibleCells) -> Tensor:
        grid = x.shape[1:3]
        x = (x + sine_positions(grid, x.shape[-1], x.device).to(x.dtype)).flatten(1, 2)
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        return self.norm(x).unflatten(1, grid)


def sine_positions(grid: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Return position encodings (h, w, dim), fp32: half the channels encode the row, half the column.

    Sines and cosines have periods of 2 pi to 20000 pi sites (Vaswani et al. 2017, on two axes).
    """
    rates = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows, columns = (torch.arange(n, device=device)[:, None] * rates for n in grid)
    row, column = (torch.cat((angle.sin(), angle.cos()), -1) for angle in (rows, columns))
    return torch.cat((row[:, None].expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)), -1)


class UNetDecoder(FCMAEDecoder):
    """A U-Net from the last stride back to the first, with half the channels at each finer stride.

    Every stride has `depth` blocks like those of the encoder, and a 2x2 transposed convolution leads to the next. With
    skips, the encoder's map of that stride goes through a 1x1 convolution, gets a mask token of its own in the hidden
    sites, and is added before the blocks. Pixels are predicted at the first stride, one stem patch per site.
    """

    def __init__(self, encoder: ConvNeXtV2, dim: int, depth: int, skips: bool):
        steps = len(encoder.dims) - 1
        if dim % 2**steps:
            raise ValueError(f"decoder_dim is {dim}; a U-Net over {steps + 1} strides needs a multiple of {2**steps}")
        super().__init__()
        self.width, self.upscale, self.checkpointing = dim // 2**steps, 2**steps, encoder.checkpointing
        widths = [dim // 2**step for step in range(steps + 1)]
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvNeXtBlock(width, encoder.response, encoder.layer_scale) for _ in range(depth)])
            for width in widths
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, 2) for width in widths[1:])
        finer = list(zip(reversed(encoder.dims[:-1]), widths[1:], strict=True)) if skips else []
        self.skips = nn.ModuleList(nn.Conv2d(below, width, 1) for below, width in finer)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, width, 1, 1) for _, width in finer)

    def forward(self, x: Tensor, stages: Sequence[Tensor], layout: Layout, visible: VisibleCells) -> Tensor:
        for step, blocks in enumerate(self.stages):
            if step:
                x = self.up[step - 1](x.permute(0, 3, 1, 2))
                if self.skips:
                    skip = self.skips[step - 1](layout.to_map(stages[-1 - step]).permute(0, 3, 1, 2))
                    shown = visible.visible_sites(2**step).permute(0, 3, 1, 2)
                    x = x + torch.where(shown, skip, self.mask_tokens[step - 1].to(skip.dtype))
                x = x.permute(0, 2, 3, 1)
            for block in blocks:
                x = run_block(block, x, checkpointing=self.checkpointing)
        return x
