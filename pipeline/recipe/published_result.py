"""The published result that a recipe is compared with; it is no part of the experiment."""

from pipeline.recipe.settings_base import Percent, Settings


class PublishedResult(Settings):
    """A published result of this recipe in percent: ImageNet-1K with a single crop, or a segmentation's mIoU."""

    top1: Percent | None = None
    miou: Percent | None = None
    """Of segmentation, at a single scale."""
    miou_multi_scale: Percent | None = None
    """Of segmentation, at several scales and with flips."""
    source: str
    """Where top1 or miou is printed."""
    timm_top1: Percent | None = None
    """timm's own evaluation of the released weights, at the recipe's last image size."""
    timm_top5: Percent | None = None
    weights: str | None = None
    """URL of the released weights."""
    parameters: str | None = None
    multiply_adds: str | None = None
    """Per image; this and parameters are as printed."""
    remark: str | None = None

    @property
    def result(self) -> float | None:
        """top1 or miou: what a run's own result can be compared with, which never has several scales."""
        return self.miou if self.top1 is None else self.top1
