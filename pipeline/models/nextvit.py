"""Next-ViT (Li et al. 2022, arXiv 2207.05501) with the official parameter names, shapes and definition order.

Stages of convolution blocks (NCB), each group of which ends in one transformer block (NTB); features are (N, C, H, W).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.batchnorm import (
    BatchNorm,
    affine,
    counts_batches,
    fold_after,
    fold_before,
    update_running_statistics,
)
from pipeline.models.convnextv2 import drop_path_rates, run_block
from pipeline.models.initialise import initialise

DIMS = (96, 192, 384, 768)
# name: (depths, channels of the convolution blocks)
VARIANTS = {
    "nextvit_small": ((3, 4, 10, 3), DIMS),
    "nextvit_base": ((3, 4, 20, 3), DIMS),
    "nextvit_large": ((3, 4, 30, 3), DIMS),
}
NORMS = ("batch", "layer")
ACTIVATIONS = ("relu", "gelu")
POOLINGS = ("1d", "2d")
KINDS = {"C": "convolution blocks", "H": "hybrid", "T": "transformer blocks"}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, ...): slightly more accurate than BatchNorm, and not to be merged."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Layers:
    """What the blocks of one model share."""

    norm: str = "batch"
    activation: str = "relu"
    pooling: str = "1d"
    head_dim: int = 32
    shrink: float = 0.75

    def make_norm(self, dim: int) -> nn.Module:
        return BatchNorm(dim) if self.norm == "batch" else ChannelNorm(dim, eps=1e-6)

    def make_activation(self) -> nn.Module:
        return nn.ReLU() if self.activation == "relu" else nn.GELU()


class StemLayer(nn.Sequential):
    """3x3 convolution, norm, activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, layers: Layers):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = layers.make_norm(outputs)
        self.act = layers.make_activation()

    def merge(self) -> None:
        self.conv, self.norm = _merged(self.conv, self.norm)


class PatchEmbed(nn.Module):
    """Other channels by a 1x1 convolution, at half the resolution by averages before it; else nothing."""

    def __init__(self, inputs: int, outputs: int, stride: int, layers: Layers):
        super().__init__()
        self.halves, self.conv, self.norm = stride == 2, nn.Identity(), nn.Identity()
        if self.halves or inputs != outputs:
            self.conv, self.norm = nn.Conv2d(inputs, outputs, 1, bias=False), layers.make_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.halves:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return self.norm(self.conv(x))

    def merge(self) -> None:
        self.conv, self.norm = _merged(self.conv, self.norm)


class ConvAttention(nn.Module):
    """Multi-head convolutional attention (MHCA): a 3x3 convolution in groups of `head_dim` channels, norm, activation,
    a 1x1 projection."""

    def __init__(self, dim: int, layers: Layers):
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // layers.head_dim, bias=False)
        self.norm = layers.make_norm(dim)
        self.act = layers.make_activation()
        self.projection = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))

    def merge(self) -> None:
        self.group_conv3x3, self.norm = _merged(self.group_conv3x3, self.norm)


class Attention(nn.Module):
    """Efficient self-attention (E-MHSA): keys and values from tokens averaged over `reduction` ** 2 of them.

    Released weights need `pooling` "1d": the averages run along the rows, over tokens that are neighbours in memory,
    and leave out what is left at the end. "2d" averages squares.
    """

    def __init__(self, dim: int, reduction: int, layers: Layers):
        super().__init__()
        self.reduction, self.pooling, self.head_dim = reduction, layers.pooling, layers.head_dim
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if reduction > 1:
            self.norm = layers.make_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        shape, tokens = x.shape, x.flatten(2)
        fewer = tokens
        if self.reduction > 1:
            if self.pooling == "1d":
                fewer = F.avg_pool1d(tokens, self.reduction**2)
            else:
                fewer = F.avg_pool2d(x, self.reduction, ceil_mode=True, count_include_pad=False).flatten(2)
            fewer = self.norm(fewer)
        tokens, fewer = tokens.transpose(1, 2), fewer.transpose(1, 2)
        heads = (self._heads(layer(y)) for layer, y in ((self.q, tokens), (self.k, fewer), (self.v, fewer)))
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.proj(y).transpose(1, 2).reshape(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def merge(self, before: nn.Module) -> nn.Module:
        """Take in the norm before, and the own one; what is left of the former. Averages keep affine maps."""
        if not isinstance(before, BatchNorm):
            return before
        scale, shift = affine(before)
        self.q = fold_before(self.q, scale, shift)
        if self.reduction > 1:
            own_scale, own_shift = affine(self.norm)
            scale, shift, self.norm = scale * own_scale, shift * own_scale + own_shift, nn.Identity()
        self.k, self.v = fold_before(self.k, scale, shift), fold_before(self.v, scale, shift)
        return nn.Identity()


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: int, layers: Layers):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, ratio * dim, 1)
        self.act = layers.make_activation()
        self.conv2 = nn.Conv2d(ratio * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))

    def merge(self, before: nn.Module) -> nn.Module:
        """Take in the norm before; what is left of it."""
        if not isinstance(before, BatchNorm):
            return before
        self.conv1 = fold_before(self.conv1, *affine(before))
        return nn.Identity()


class NCB(nn.Module):
    """Next convolution block: MHCA, then a norm and an MLP of three times the width; both residual.

    `keep` (2, N) holds the drop-path factors of the two branches for each image, see `convnextv2.ConvNeXtBlock`.
    """

    shares = (1.0, 1.0)  # of the block's drop-path rate, for each branch

    def __init__(self, inputs: int, dim: int, stride: int, reduction: int, layers: Layers):
        super().__init__()
        self.patch_embed = PatchEmbed(inputs, dim, stride, layers)
        self.mhca = ConvAttention(dim, layers)
        self.norm = layers.make_norm(dim)
        self.mlp = Mlp(dim, 3, layers)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        x = x + _kept(self.mhca(x), keep, 0)
        return x + _kept(self.mlp(self.norm(x)), keep, 1)

    def merge(self) -> None:
        self.patch_embed.merge()
        self.mhca.merge()
        self.norm = self.mlp.merge(self.norm)


class NTB(nn.Module):
    """Next transformer block: E-MHSA on `shrink` of the channels, MHCA of what it gives on the others, then both side
    by side into a norm and an MLP of twice the width. `keep` is (3, N), or (2, N) without other channels."""

    def __init__(self, inputs: int, dim: int, stride: int, reduction: int, layers: Layers):
        super().__init__()
        width = _divisible(int(dim * layers.shrink), layers.head_dim)
        self.patch_embed = PatchEmbed(inputs, width, stride, layers)
        self.norm1 = layers.make_norm(width)
        self.e_mhsa = Attention(width, reduction, layers)
        self.projection = self.mhca = None
        self.shares = (1.0, 1.0)
        if width < dim:
            self.projection = PatchEmbed(width, dim - width, 1, layers)
            self.mhca = ConvAttention(dim - width, layers)
            self.shares = (layers.shrink, 1 - layers.shrink, 1.0)
        self.norm2 = layers.make_norm(dim)
        self.mlp = Mlp(dim, 2, layers)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        x = x + _kept(self.e_mhsa(self.norm1(x)), keep, 0)
        if self.mhca is not None:
            y = self.projection(x)
            x = torch.cat((x, y + _kept(self.mhca(y), keep, 1)), 1)
        return x + _kept(self.mlp(self.norm2(x)), keep, -1)

    def merge(self) -> None:
        for part in (self.patch_embed, self.projection, self.mhca):
            if part is not None:
                part.merge()
        self.norm1 = self.e_mhsa.merge(self.norm1)
        self.norm2 = self.mlp.merge(self.norm2)


class NextViT(nn.Module):
    """The classifier, or without `num_classes` the encoder, which has neither the final norm nor the head.

    Args:
        depths: blocks of each stage.
        dims: channels of a stage's convolution blocks; its transformer blocks have a third more.
        num_classes: outputs of the head.
        stem_stride: 4 for ImageNet; 2 or 1 for small images.
        stem_dim: channels of the stem.
        pattern: a letter for each stage: C, convolution blocks alone; H, hybrid; T, transformer blocks alone. The
            released models are "CHHH"; the paper's text, a transformer block at the end of each stage, is "HHHH".
        convolutions_per_transformer: N of the paper's (NCB x N + NTB) x L, of all hybrid stages or one for each stage:
            every (N+1)-th block is a transformer block, and so is the last. L follows from the depth.
        shrink: share r of a transformer block's channels that has self-attention; with 1 there is no convolution in it.
        norm, activation: "batch" and "relu", fast when deployed; or "layer", "gelu".
        pooling: see `Attention`.
        head_dim: channels of a head, and of a convolution's group.
        checkpointing, head_init_scale, seed: see `convnextv2.ConvNeXt`.
    """

    head_prefix = "proj_head."

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_stride: int = 4,
        stem_dim: int = 64,
        pattern: str = "CHHH",
        convolutions_per_transformer: int | Sequence[int] = 4,
        shrink: float = 0.75,
        norm: str = "batch",
        activation: str = "relu",
        pooling: str = "1d",
        head_dim: int = 32,
        checkpointing: bool = False,
        head_init_scale: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        choices = (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS), ("pooling", pooling, POOLINGS))
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
        if not len(depths) == len(dims) == len(pattern) or set(pattern) - KINDS.keys():
            raise ValueError(
                f"depths {tuple(depths)}, dims {tuple(dims)} and pattern {pattern!r} must name the same number of"
                " stages, in the pattern by the letters C, H and T"
            )
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride is {stem_stride}; choose 1, 2 or 4")
        groups = convolutions_per_transformer
        groups = [groups] * len(depths) if isinstance(groups, int) else groups
        if len(groups) != len(depths):
            raise ValueError(f"convolutions_per_transformer {tuple(groups)} and depths {tuple(depths)} must be as many")
        kinds, widths = _blocks(depths, dims, pattern, groups)
        if wrong := [width for width in widths if width % head_dim]:
            raise ValueError(f"a block has {wrong[0]} channels, no multiple of head_dim {head_dim}; change dims")
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.num_classes, self.in_channels, self.stem_stride = num_classes, in_channels, stem_stride
        self.checkpointing = checkpointing
        layers = Layers(norm, activation, pooling, head_dim, shrink)
        stem = [(in_channels, stem_dim, 1 + (stem_stride > 1)), (stem_dim, stem_dim // 2, 1)]
        stem += [(stem_dim // 2, stem_dim, 1), (stem_dim, stem_dim, 1 + (stem_stride > 2))]
        self.stem = nn.Sequential(*[StemLayer(*layer, layers) for layer in stem])
        self.features = nn.Sequential()
        for stage, depth in enumerate(depths):
            for number in range(depth):
                index = len(self.features)
                stride = 2 if stage > 0 and number == 0 else 1
                inputs = widths[index - 1] if index else stem_dim
                reduction = 2 ** (len(depths) - 1 - stage)
                self.features.append(kinds[index](inputs, widths[index], stride, reduction, layers))
        self.norm = layers.make_norm(widths[-1]) if num_classes else nn.Identity()
        if num_classes:
            self.proj_head = nn.Sequential(nn.Linear(widths[-1], num_classes))
        self.init_scales = {"proj_head.0.weight": head_init_scale}
        self.counts_batches = counts_batches(self)
        initialise(self, seed)

    @property
    def stride(self) -> int:
        """Pixels on a side of one site of the last map."""
        return self.stem_stride * 2 ** (len(self.depths) - 1)

    def drop_path_rates(self, rate: float) -> list[float]:
        """Of each row of `keep`: one for each residual branch, in order."""
        rates = zip(self.features, drop_path_rates(self.depths, rate), strict=True)
        return [share * rate for block, rate in rates for share in block.shares]

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Images (N, 3, H, W) to the map (N, C, h, w) after each stage.

        `keep` (branches, N) holds drop-path factors.
        """
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        rows = None if keep is None else iter(keep.split([len(block.shares) for block in self.features]))
        outputs = []
        for block in self.features:
            x = run_block(block, x, None if rows is None else next(rows), checkpointing=self.checkpointing)
            outputs.append(x)
        return [outputs[sum(self.depths[: stage + 1]) - 1] for stage in range(len(self.depths))]

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes); to the last map (N, C, h, w) when there is no head."""
        x = self.norm(self.forward_features(images, keep)[-1])
        if self.counts_batches:
            update_running_statistics(self)
        return self.proj_head(x.mean((2, 3))) if self.num_classes else x

    def merge_batchnorm(self) -> "NextViT":
        """Fold every BatchNorm into the layer before or behind it, in place; exact. The model is for evaluation from
        then on, with biases that it had not before. LayerNorms stay as they are."""
        for part in (*self.stem, *self.features):
            part.merge()
        if isinstance(self.norm, BatchNorm):
            self.proj_head[0] = fold_before(self.proj_head[0], *affine(self.norm))
            self.norm = nn.Identity()
        return self.eval()


def _blocks(
    depths: Sequence[int], dims: Sequence[int], pattern: str, groups: Sequence[int]
) -> tuple[list[type], list[int]]:
    """Class and channels of each block, in order."""
    kinds: list[type] = []
    for depth, letter, group in zip(depths, pattern, groups, strict=True):
        if letter == "H" and depth > group + 1 and depth % (group + 1):
            raise ValueError(
                f"depths {tuple(depths)}: a hybrid stage of {depth} blocks is no whole number of groups of {group}"
                f" convolution blocks and a transformer block; take {depth // (group + 1) * (group + 1)} blocks"
            )
        ends = [letter == "H" and (n % (group + 1) == group or n == depth - 1) for n in range(depth)]
        kinds += [NTB if end or letter == "T" else NCB for end in ends]
    of_stage = [dim for depth, dim in zip(depths, dims, strict=True) for dim in [dim] * depth]
    return kinds, [dim * 4 // 3 if kind is NTB else dim for kind, dim in zip(kinds, of_stage, strict=True)]


def _divisible(channels: int, divisor: int) -> int:
    """The nearest multiple that is not 10 % too small, as all such networks round."""
    nearest = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def _merged(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    return (fold_after(conv, norm), nn.Identity()) if isinstance(norm, BatchNorm) else (conv, norm)


def _kept(x: Tensor, keep: Tensor | None, branch: int) -> Tensor:
    return x if keep is None else x * keep[branch].to(x.dtype).view(-1, 1, 1, 1)
