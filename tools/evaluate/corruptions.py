"""ImageNet-C: error under fifteen corruptions of five severities, and the mean corruption error (arXiv 1903.12261).

The folder is that of the published tars, unpacked: CORRUPTION/SEVERITY/CLASS/IMAGE, in groups or not. The corruption
error of a corruption is the sum of the errors over the severities divided by AlexNet's; their mean is the mCE.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError

# AlexNet's mean error over the severities, from the code of the paper: hendrycks/robustness, ImageNet-C/test.py.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class CorruptionErrors:
    """Errors, 0 to 1, of each corruption that is there, by severity."""

    errors: dict[str, dict[str, float]]

    @property
    def is_whole(self) -> bool:
        """Whether all severities of all corruptions were measured, as the mCE wants."""
        return all(self.errors.get(name, {}).keys() == set(SEVERITIES) for name in ALEXNET_ERRORS)

    def mean_of(self, corruption: str) -> float:
        """The mean error over the severities that were measured."""
        errors = self.errors[corruption]
        return sum(errors.values()) / len(errors)

    def summary(self) -> dict[str, float]:
        """In percent: the mean error over the corruptions, and the mean corruption error if all are there."""
        means = {name: self.mean_of(name) for name in self.errors}
        found = {"mean_error": 100 * sum(means.values()) / len(means)}
        if self.is_whole:
            relative = [means[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items()]
            found["mean_corruption_error"] = 100 * sum(relative) / len(relative)
        return found

    def rows(self) -> list[list[str]]:
        """For a table: corruption, error at each severity, mean, AlexNet's, and their ratio, in percent."""
        rows = []
        for name, errors in self.errors.items():
            mean, alexnet = self.mean_of(name), ALEXNET_ERRORS[name]
            cells = [f"{100 * errors[s]:.2f}" if s in errors else "" for s in SEVERITIES]
            ratio = f"{100 * mean / alexnet:.2f}" if len(errors) == len(SEVERITIES) else ""
            rows.append([name, *cells, f"{100 * mean:.2f}", f"{100 * alexnet:.2f}", ratio])
        return rows


def corrupted_folders(folder: Path) -> dict[str, dict[str, Path]]:
    """Find CORRUPTION/SEVERITY below a folder, at most one folder deeper; by the names of both.

    Raises:
        DataError: if there is none.
    """
    found: dict[str, dict[str, Path]] = {}
    for name in ALEXNET_ERRORS:
        for place in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            parts = {severity: place / severity for severity in SEVERITIES if (place / severity).is_dir()}
            if parts:
                found[name] = parts
                break
    if not found:
        raise DataError(
            f"--data {folder} holds no corruption of ImageNet-C; it must hold CORRUPTION/SEVERITY/CLASS/IMAGE, as in"
            " gaussian_noise/1/n01440764/ILSVRC2012_val_00000293.JPEG"
        )
    return found


def measure_corruptions(folder: str | os.PathLike[str], top1_of: Callable[[Path], float]) -> CorruptionErrors:
    """Measure each severity of each corruption in a folder.

    top1_of: gives the top-1 accuracy, in percent, on a folder of CLASS/IMAGE files.
    """
    return CorruptionErrors(
        {
            name: {severity: 1 - top1_of(place) / 100 for severity, place in parts.items()}
            for name, parts in corrupted_folders(Path(folder)).items()
        }
    )
