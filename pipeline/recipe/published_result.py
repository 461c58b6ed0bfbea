"""The published result that a recipe is compared with; it is no part of the experiment."""

from pipeline.recipe.settings_base import Percent, Settings


class PublishedResult(Settings):
    """A published result of this recipe in percent: ImageNet-1K with a single crop, a segmentation's mIoU, or
    the average precision of a detector on COCO."""

    top1: Percent | None = None
    miou: Percent | None = None
    """Of segmentation, at a single scale."""
    miou_multi_scale: Percent | None = None
    """Of segmentation, at several scales and with flips."""
    box_ap: Percent | None = None
    """Of detection, over intersections over unions of 0.5 to 0.95."""
    box_ap50: Percent | None = None
    mask_ap: Percent | None = None
    mask_ap50: Percent | None = None
    source: str
    """Where top1, miou or box_ap is printed."""
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
        """top1, miou or box_ap: what a run's own result can be compared with, which never has several scales."""
        return next((value for value in (self.top1, self.miou, self.box_ap) if value is not None), None)
