"""Blocks of other networks in the place of Next-ViT's convolution blocks, for comparisons.

Each has the norm, activation, widths and initial values of its own paper, whatever the model's options say, and works
on as many channels as the convolution block that it replaces. Features are (N, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.backbone import drop_path
from pipeline.models.batchnorm import BatchNorm, fold_after

WINDOW = 7  # sites on a side
POOLED = 3


class RivalBlock(nn.Module):
    """The base: a patch embedding, then the branches of the block.

    Args:
        patch_embed: gives `dim` channels, with stride 2 at half the resolution.
        dim: channels.
        head_dim: channels of an attention head.
    """

    shares: tuple[float, ...] = (1.0, 1.0)
    """Factors on the block's drop-path rate, one for each residual branch."""

    def __init__(self, patch_embed: nn.Module, dim: int, head_dim: int):
        super().__init__()
        self.patch_embed = patch_embed

    def fold(self) -> None:
        """Fold every BatchNorm into the convolution before it, in place."""


class Bottleneck(RivalBlock):
    """ResNet (He et al. 2016): 1x1 to C/4, 3x3, 1x1 to C, each with BatchNorm, then ReLU; residual before the last."""

    shares = (1.0,)

    def __init__(self, patch_embed: nn.Module, dim: int, head_dim: int):
        super().__init__(patch_embed, dim, head_dim)
        inner = max(1, dim // 4)
        self.conv1, self.bn1 = nn.Conv2d(dim, inner, 1, bias=False), BatchNorm(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), BatchNorm(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, dim, 1, bias=False), BatchNorm(dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, dim, H / stride, W / stride); `keep` (1, N) scales the branch, see `drop_path`."""
        x = self.patch_embed(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + _dropped(self.bn3(self.conv3(y)), keep, 0))

    def fold(self) -> None:
        for number in (1, 2, 3):
            conv, norm = getattr(self, f"conv{number}"), getattr(self, f"bn{number}")
            setattr(self, f"conv{number}", fold_after(conv, norm))
            setattr(self, f"bn{number}", nn.Identity())


class ConvNeXtV1(RivalBlock):
    """ConvNeXt (Liu et al. 2022): 7x7 depthwise, LayerNorm, linear to 4C, GELU, linear to C, times 1e-6; residual."""

    shares = (1.0,)

    def __init__(self, patch_embed: nn.Module, dim: int, head_dim: int):
        super().__init__(patch_embed, dim, head_dim)
        self.scale = LayerScale(dim, 1e-6)
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, dim, H / stride, W / stride); `keep` (1, N) scales the branch, see `drop_path`."""
        x = self.patch_embed(x)
        y = self.norm(self.dwconv(x).movedim(1, -1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + _dropped(self.scale(y.movedim(-1, 1)), keep, 0)


class LocalAttention(RivalBlock):
    """Twins' LSA (Chu et al. 2021): LayerNorm, self-attention within windows of 7x7; LayerNorm, MLP of 4C with GELU.

    A map that is no multiple of 7 is filled up with zeros at its right and its bottom, which take part, as in Twins.
    """

    def __init__(self, patch_embed: nn.Module, dim: int, head_dim: int):
        super().__init__(patch_embed, dim, head_dim)
        self.head_dim = head_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, dim, H / stride, W / stride); `keep` (2, N) scales the branches, see `drop_path`."""
        x = self.patch_embed(x).movedim(1, -1)
        x = x + _dropped(self._attention(self.norm1(x)), keep, 0)
        x = x + _dropped(self.pwconv2(F.gelu(self.pwconv1(self.norm2(x)))), keep, 1)
        return x.movedim(-1, 1)

    def _attention(self, x: Tensor) -> Tensor:
        """Attention within each window of a map (N, H, W, C)."""
        height, width = x.shape[1:3]
        bottom, right = -height % WINDOW, -width % WINDOW
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        rows, columns = (height + bottom) // WINDOW, (width + right) // WINDOW
        x = x.unflatten(2, (columns, WINDOW)).unflatten(1, (rows, WINDOW)).transpose(2, 3)
        tokens = self.qkv(x.flatten(3, 4).flatten(0, 2))  # (windows, 49, 3C)
        q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in tokens.chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y.unflatten(1, (WINDOW, WINDOW)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
        return self.proj(y.flatten(3, 4).flatten(1, 2)[:, :height, :width])


class PoolingBlock(RivalBlock):
    """PoolFormer (Yu et al. 2022): GroupNorm, mean of 3x3 sites less the site; GroupNorm, MLP of 4C; both scaled."""

    def __init__(self, patch_embed: nn.Module, dim: int, head_dim: int):
        super().__init__(patch_embed, dim, head_dim)
        self.norm1, self.scale1 = nn.GroupNorm(1, dim), LayerScale(dim, 1e-5)
        self.norm2 = nn.GroupNorm(1, dim)
        self.pwconv1, self.pwconv2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)
        self.scale2 = LayerScale(dim, 1e-5)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, dim, H / stride, W / stride); `keep` (2, N) scales the branches, see `drop_path`."""
        x = self.patch_embed(x)
        y = self.norm1(x)
        mean = F.avg_pool2d(y, POOLED, stride=1, padding=POOLED // 2, count_include_pad=False)
        x = x + _dropped(self.scale1(mean - y), keep, 0)
        return x + _dropped(self.scale2(self.pwconv2(F.gelu(self.pwconv1(self.norm2(x))))), keep, 1)


class LayerScale(nn.Module):
    """A learned factor on each channel of maps (N, C, H, W), which starts at `value`."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.initial_constants = {"gamma": value}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype).view(-1, 1, 1)


RIVALS: dict[str, type[RivalBlock]] = {
    "bottleneck": Bottleneck,
    "convnext": ConvNeXtV1,
    "local_attention": LocalAttention,
    "pooling": PoolingBlock,
}


def _dropped(branch: Tensor, keep: Tensor | None, row: int) -> Tensor:
    return drop_path(branch, None if keep is None else keep[row])
