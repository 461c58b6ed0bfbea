"""What heads share: convolution, norm and ReLU, and for segmentation the layer from features to classes.

Names of parameters are those of mmsegmentation and mmdetection, so that released weights fit.
"""

from torch import Tensor, nn

from pipeline.models.batchnorm import BatchNorm

HEAD_NORMS = ("batch", "group")
GROUP_NORM_GROUPS = 32  # of channels in a GroupNorm, torch's and mmsegmentation's custom


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size; BatchNorm, GroupNorm, or with the norm "none" a bias; ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
        if norm == "batch":
            self.bn = BatchNorm(outputs)
        elif norm == "group":
            if outputs % GROUP_NORM_GROUPS:
                raise ValueError(
                    f"a head has {outputs} channels, no multiple of GroupNorm's {GROUP_NORM_GROUPS} groups; change them"
                )
            self.gn = nn.GroupNorm(GROUP_NORM_GROUPS, outputs)
        self.activate = nn.ReLU()


class SegmentationHead(nn.Module):
    """Turns features into logits by `conv_seg`, with dropout of whole channels before it."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.channels = channels
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def classify(self, x: Tensor, dropout: Tensor | None) -> Tensor:
        """Map features (N, C, h, w) to logits; `dropout` (N, C) has a factor for each channel: 0, or 1 / keep share."""
        return self.conv_seg(x if dropout is None else x * dropout.to(x.dtype)[:, :, None, None])


class FCNHead(SegmentationHead):
    """The auxiliary head: one 3x3 convolution and `conv_seg` on one map (Long et al. 2015, as in mmsegmentation)."""

    def __init__(self, inputs: int, channels: int, classes: int, norm: str):
        super().__init__(channels, classes)
        self.convs = nn.Sequential(ConvNormReLU(inputs, channels, 3, norm))

    def forward(self, x: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Map features (N, C, h, w) to logits (N, classes, h, w)."""
        return self.classify(self.convs(x), dropout)
