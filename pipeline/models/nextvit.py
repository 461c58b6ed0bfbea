"""Next-ViT (Li et al. 2022, arXiv 2207.05501) with the official names, shapes and order of parameters.

Stages consist of convolution blocks (NCB) and transformer blocks (NTB). Features are (N, C, H, W). The official code is
bytedance/Next-ViT, classification/nextvit.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.backbone import Backbone, check_choices, drop_path, run_block
from pipeline.models.batchnorm import BatchNorm, affine, fold_after, fold_before, update_running_statistics
from pipeline.models.rival_blocks import RIVALS, RivalBlock

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
BLOCK_KINDS = ("ncb", *RIVALS)
LETTERS = "CHT"  # of a pattern: convolution blocks, hybrid, transformer blocks


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, ...): slightly more accurate than BatchNorm, but it cannot be folded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class BlockOptions:
    """Options that all blocks of a model share; see `NextViT`."""

    norm: str = "batch"
    activation: str = "relu"
    pooling: str = "1d"
    head_dim: int = 32
    shrink: float = 0.75

    def create_norm(self, dim: int) -> nn.Module:
        return BatchNorm(dim) if self.norm == "batch" else ChannelNorm(dim, eps=1e-6)

    def create_activation(self) -> nn.Module:
        return nn.ReLU() if self.activation == "relu" else nn.GELU()


class StemLayer(nn.Sequential):
    """3x3 convolution, norm, activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, options: BlockOptions):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = options.create_norm(outputs)
        self.act = options.create_activation()


class PatchEmbed(nn.Module):
    """With stride 2, average 2x2 sites; then change the number of channels by a 1x1 convolution and a norm.

    With stride 1 and as many outputs as inputs it is the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, options: BlockOptions):
        super().__init__()
        self.halves, self.conv, self.norm = stride == 2, nn.Identity(), nn.Identity()
        if self.halves or inputs != outputs:
            self.conv, self.norm = nn.Conv2d(inputs, outputs, 1, bias=False), options.create_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.halves:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return self.norm(self.conv(x))


class ConvAttention(nn.Module):
    """Multi-head convolutional attention (MHCA): 3x3 convolution in groups of `head_dim`, norm, activation, linear."""

    def __init__(self, dim: int, options: BlockOptions):
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // options.head_dim, bias=False)
        self.norm = options.create_norm(dim)
        self.act = options.create_activation()
        self.projection = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))


class Attention(nn.Module):
    """Efficient multi-head self-attention (E-MHSA): keys and values come from averages of `reduction` ** 2 tokens.

    Released weights need the pooling "1d": it averages tokens that are neighbours in memory, along the rows and over
    their ends, and drops the rest at the end of the map. The pooling "2d" averages squares.
    """

    def __init__(self, dim: int, reduction: int, options: BlockOptions):
        super().__init__()
        self.reduction, self.pooling, self.head_dim = reduction, options.pooling, options.head_dim
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if reduction > 1:
            self.norm = options.create_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, pooled = x.flatten(2).transpose(1, 2), self._pool(x).transpose(1, 2)
        qkv = (self._split_heads(layer(y)) for layer, y in ((self.q, tokens), (self.k, pooled), (self.v, pooled)))
        y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        return self.proj(y).transpose(1, 2).reshape(x.shape)

    def _pool(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, tokens)."""
        if self.reduction == 1:
            return x.flatten(2)
        if self.pooling == "1d":
            return self.norm(F.avg_pool1d(x.flatten(2), self.reduction**2))
        return self.norm(F.avg_pool2d(x, self.reduction, ceil_mode=True, count_include_pad=False).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def fold(self, before: nn.Module) -> nn.Module:
        """Fold the preceding BatchNorm and the own one into q, k and v; return the identity that replaces `before`.

        Averages of an affine map are the affine map of averages, so the preceding norm passes through the pooling.
        """
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
    """1x1 convolution to `ratio` * C, activation, 1x1 convolution to C."""

    def __init__(self, dim: int, ratio: int, options: BlockOptions):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, ratio * dim, 1)
        self.act = options.create_activation()
        self.conv2 = nn.Conv2d(ratio * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))

    def fold(self, before: nn.Module) -> nn.Module:
        """Fold the preceding BatchNorm into conv1; return the identity that replaces it."""
        if not isinstance(before, BatchNorm):
            return before
        self.conv1 = fold_before(self.conv1, *affine(before))
        return nn.Identity()


class NCB(nn.Module):
    """Next convolution block: MHCA, then a norm and an MLP of three times the width; both residual."""

    shares = (1.0, 1.0)
    """Of the block's drop-path rate, for each residual branch."""

    def __init__(self, inputs: int, dim: int, stride: int, reduction: int, options: BlockOptions):
        super().__init__()
        self.patch_embed = PatchEmbed(inputs, dim, stride, options)
        self.mhca = ConvAttention(dim, options)
        self.norm = options.create_norm(dim)
        self.mlp = Mlp(dim, 3, options)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, dim, H / stride, W / stride); `keep` (2, N) scales the branches, see `drop_path`."""
        x = self.patch_embed(x)
        x = x + _drop_path(self.mhca(x), keep, 0)
        return x + _drop_path(self.mlp(self.norm(x)), keep, 1)


class NTB(nn.Module):
    """Next transformer block: E-MHSA on a share of the channels, MHCA on the others, then a norm and an MLP of 2C.

    E-MHSA has `shrink` of the channels; MHCA works on a projection of its output. Both results side by side go into the
    MLP. With a shrink of 1 there is no MHCA.
    """

    def __init__(self, inputs: int, dim: int, stride: int, reduction: int, options: BlockOptions):
        super().__init__()
        width = _round_to_multiple(int(dim * options.shrink), options.head_dim)
        self.patch_embed = PatchEmbed(inputs, width, stride, options)
        self.norm1 = options.create_norm(width)
        self.e_mhsa = Attention(width, reduction, options)
        self.projection = self.mhca = None
        self.shares = (1.0, 1.0)
        if width < dim:
            self.projection = PatchEmbed(width, dim - width, 1, options)
            self.mhca = ConvAttention(dim - width, options)
            self.shares = (options.shrink, 1 - options.shrink, 1.0)
        self.norm2 = options.create_norm(dim)
        self.mlp = Mlp(dim, 2, options)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, dim, H / stride, W / stride).

        `keep`, (3, N) or without MHCA (2, N), scales the branches, see `drop_path`.
        """
        x = self.patch_embed(x)
        x = x + _drop_path(self.e_mhsa(self.norm1(x)), keep, 0)
        if self.mhca is not None:
            y = self.projection(x)
            x = torch.cat((x, y + _drop_path(self.mhca(y), keep, 1)), 1)
        return x + _drop_path(self.mlp(self.norm2(x)), keep, -1)


class NextViT(Backbone):
    """The published family.

    Args:
        depths: blocks of each stage.
        dims: channels of a stage's convolution blocks; its transformer blocks have a third more.
        num_classes, in_channels, checkpointing: see `Backbone`.
        stem_stride: 4 for ImageNet; 2 or 1 for small images.
        stem_dim: channels of the stem.
        pattern: a letter for each stage: C, convolution blocks alone; H, hybrid; T, transformer blocks alone. The
            released models are "CHHH"; the paper's text, a transformer block at the end of each stage, is "HHHH".
        convolutions_per_transformer: N of the paper's (NCB x N + NTB) x L, for all hybrid stages or one for each stage:
            every (N+1)-th block is a transformer block, and so is the last. L follows from the depth.
        shrink: share r of a transformer block's channels that has self-attention, see `NTB`.
        norm, activation: "batch" and "relu", which are fast after folding; or "layer", "gelu".
        pooling: "1d" or "2d", see `Attention`.
        head_dim: channels of an attention head, and of a group of the 3x3 convolutions.
        block: the convolution block: "ncb", or another network's in its place, see `rival_blocks`.
        head_init_scale: factor on the head's initial weights.
        map_norms: whether a norm follows each map of `forward_features`, as in the official code for detection and
            segmentation: `extra_norm_list`, whose outputs the next stage reads, and `norm` at the end.
        seed: of the initial weights.
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
        block: str = "ncb",
        checkpointing: bool = False,
        head_init_scale: float = 1.0,
        map_norms: bool = False,
        seed: int = 0,
    ):
        check_choices(norm=(norm, NORMS), activation=(activation, ACTIVATIONS))
        check_choices(pooling=(pooling, POOLINGS), block=(block, BLOCK_KINDS))
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride is {stem_stride}; choose 1, 2 or 4")
        kinds, widths = _plan_blocks(depths, dims, pattern, convolutions_per_transformer)
        if wrong := [width for width in widths if width % head_dim]:
            raise ValueError(f"a block has {wrong[0]} channels, no multiple of head_dim {head_dim}; change dims")
        super().__init__(depths, dims, num_classes, in_channels, stem_stride, checkpointing)
        options = BlockOptions(norm, activation, pooling, head_dim, shrink)
        self.stem = nn.Sequential(
            StemLayer(in_channels, stem_dim, 1 + (stem_stride > 1), options),
            StemLayer(stem_dim, stem_dim // 2, 1, options),
            StemLayer(stem_dim // 2, stem_dim, 1, options),
            StemLayer(stem_dim, stem_dim, 1 + (stem_stride > 2), options),
        )
        self.features = nn.Sequential()
        for stage, depth in enumerate(depths):
            for number in range(depth):
                index = len(self.features)
                stride = 2 if stage > 0 and number == 0 else 1
                inputs = widths[index - 1] if index else stem_dim
                reduction = 2 ** (len(depths) - 1 - stage)
                kind = _rival(RIVALS[block]) if kinds[index] is NCB and block != "ncb" else kinds[index]
                self.features.append(kind(inputs, widths[index], stride, reduction, options))
        self._ends = [sum(depths[: stage + 1]) - 1 for stage in range(len(depths))]
        self.map_channels = tuple(widths[end] for end in self._ends)
        self.extra_norm_list = None
        if map_norms:
            self.extra_norm_list = nn.Sequential(*[options.create_norm(width) for width in self.map_channels[:-1]])
        self.norm = options.create_norm(widths[-1]) if num_classes or map_norms else nn.Identity()
        if num_classes:
            self.proj_head = nn.Sequential(nn.Linear(widths[-1], num_classes))
        self.finish(head_init_scale, seed)

    def first_stages(self, count: int) -> list[nn.Module]:
        return [self.stem, *self.features[: sum(self.depths[:count])]] if count else []

    def drop_path_rates(self, rate: float, frozen_stages: int = 0) -> list[float]:
        """The drop-path rate of each row of `keep`: one row for each residual branch, in order."""
        rates = zip(self.features, super().drop_path_rates(rate, frozen_stages), strict=True)
        return [share * rate for block, rate in rates for share in block.shares]

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Map images (N, 3, H, W) to the map (N, C, h, w) after each stage.

        `keep` (branches, N) has the drop-path factors, see `drop_path`.
        """
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        rows = None if keep is None else iter(keep.split([len(block.shares) for block in self.features]))
        outputs, norms = [], [] if self.extra_norm_list is None else [*self.extra_norm_list, self.norm]
        for index, block in enumerate(self.features):
            x = run_block(block, x, None if rows is None else next(rows), checkpointing=self.checkpointing)
            if norms and index in self._ends:
                x = norms[self._ends.index(index)](x)
            outputs.append(x)
        return [outputs[end] for end in self._ends]

    def pooled_features(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the mean of the last map (N, C), after the final norm if there is a head."""
        return self.norm(self.forward_features(images)[-1]).mean((2, 3))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes); without a head, to the last map (N, C, h, w)."""
        x = self.norm(self.forward_features(images, keep)[-1])
        if self.counts_batches:
            update_running_statistics(self)
        return self.proj_head(x.mean((2, 3))) if self.num_classes else x

    def fold_batchnorm(self) -> "NextViT":
        """Fold every BatchNorm into the layer before or after it, in place; LayerNorms stay as they are.

        The outputs in evaluation stay the same; layers get biases that they did not have, and training is over.
        """
        for part in list(self.modules()):
            if isinstance(part, StemLayer | PatchEmbed):
                part.conv, part.norm = _folded(part.conv, part.norm)
            elif isinstance(part, ConvAttention):
                part.group_conv3x3, part.norm = _folded(part.group_conv3x3, part.norm)
            elif isinstance(part, NCB):
                part.norm = part.mlp.fold(part.norm)
            elif isinstance(part, NTB):
                part.norm1, part.norm2 = part.e_mhsa.fold(part.norm1), part.mlp.fold(part.norm2)
            elif isinstance(part, RivalBlock):
                part.fold()
        if isinstance(self.norm, BatchNorm) and self.num_classes:
            self.proj_head[0] = fold_before(self.proj_head[0], *affine(self.norm))
            self.norm = nn.Identity()
        return self.eval()


def _plan_blocks(
    depths: Sequence[int], dims: Sequence[int], pattern: str, convolutions: int | Sequence[int]
) -> tuple[list[type], list[int]]:
    """Return the class and the channels of each block, in order.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    if not len(depths) == len(dims) == len(pattern) or set(pattern) - set(LETTERS):
        raise ValueError(
            f"depths {tuple(depths)}, dims {tuple(dims)} and pattern {pattern!r} must name the same number of"
            " stages, in the pattern by the letters C, H and T"
        )
    groups = [convolutions] * len(depths) if isinstance(convolutions, int) else convolutions
    if len(groups) != len(depths):
        raise ValueError(
            f"convolutions_per_transformer {tuple(groups)} and depths {tuple(depths)} must name the same number of"
            " stages"
        )
    kinds: list[type] = []
    widths: list[int] = []
    for depth, dim, letter, group in zip(depths, dims, pattern, groups, strict=True):
        if letter == "H" and depth > group + 1 and depth % (group + 1):
            raise ValueError(
                f"depths {tuple(depths)}: a hybrid stage of {depth} blocks is no whole number of groups of {group}"
                f" convolution blocks and a transformer block; take {depth // (group + 1) * (group + 1)} blocks"
            )
        ends = [letter == "H" and (n % (group + 1) == group or n == depth - 1) for n in range(depth)]
        transformers = [end or letter == "T" for end in ends]
        kinds += [NTB if transformer else NCB for transformer in transformers]
        widths += [dim * 4 // 3 if transformer else dim for transformer in transformers]
    return kinds, widths


def _rival(kind: type[RivalBlock]) -> Callable[..., RivalBlock]:
    """A constructor of another network's blocks, with the arguments of NCB's."""
    return lambda inputs, dim, stride, reduction, options: kind(
        PatchEmbed(inputs, dim, stride, options), dim, options.head_dim
    )


def _round_to_multiple(channels: int, divisor: int) -> int:
    """Return the nearest multiple that is at most 10 % too small, the usual rounding of channels."""
    nearest = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    return (fold_after(conv, norm), nn.Identity()) if isinstance(norm, BatchNorm) else (conv, norm)


def _drop_path(branch: Tensor, keep: Tensor | None, row: int) -> Tensor:
    return drop_path(branch, None if keep is None else keep[row])
