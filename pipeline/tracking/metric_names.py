"""Names of the results of evaluations: by which one a stage is judged, and which are percentages."""

from collections.abc import Container

TITLES = {"top1": "top-1", "miou": "mIoU", "box_ap": "box AP"}
"""The results that a stage is judged by, in words. A stage has one of them, or the loss alone."""
OTHER_PERCENTAGES = ("constant_miou", "mean_accuracy", "pixel_accuracy")
PERCENTAGES = ("top", "miou", "box_ap", "box_ar", "mask_ap", "mask_ar")  # how the others begin


def judging_metric(names: Container[str]) -> str | None:
    """The result that a stage is judged by, of those that it has."""
    return next((name for name in (*TITLES, "loss") if name in names), None)


def is_percentage(name: str) -> bool:
    """Whether a result is in percent."""
    return name in OTHER_PERCENTAGES or name.startswith(PERCENTAGES)
