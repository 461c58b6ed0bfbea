"""Mixup (Zhang et al., arXiv 1710.09412) and cutmix (Yun et al., arXiv 1905.04899) of the images of a slot.

As timm's Mixup in its mode `batch`: all images of a slot share one draw, and each is mixed with the image at the same
place from the end of the slot.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline import randomness


@dataclass(frozen=True)
class Mix:
    """How the images of a slot are mixed with the same images in reverse order."""

    share: float
    """Of an image's own label; the rest is its partner's."""
    box: tuple[int, int, int, int] | None = None
    """Top, bottom, left and right of the box that cutmix pastes; None for mixup, which blends whole images."""

    def apply(self, images: Tensor) -> Tensor:
        """Mix the images (n, C, H, W) of a slot."""
        if self.share == 1.0:
            return images
        if self.box is None:
            return images * self.share + images.flip(0) * (1 - self.share)
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        return mixed


def draw_mix(seed: int, step: int, slot: int, size: tuple[int, int], mixup: float, cutmix: float) -> Mix:
    """Draw the mix of a slot by hash of (seed, step, slot): mixup or cutmix, each as often.

    Args:
        size: height and width of the images in pixels.
        mixup, cutmix: alpha of the Beta(alpha, alpha) distribution that the share is drawn from; 0 for never.
    """
    alphas = {"mixup": mixup, "cutmix": cutmix}
    kinds = [kind for kind, alpha in alphas.items() if alpha > 0]
    if not kinds:
        return Mix(1.0)
    key = int(randomness.key(seed, step, slot, randomness.Purpose.MIX))
    draw = np.random.Generator(np.random.Philox(key=key))
    kind = kinds[int(draw.integers(len(kinds)))]
    share = float(draw.beta(alphas[kind], alphas[kind]))
    if kind == "mixup":
        return Mix(share)
    (top, bottom), (left, right) = (_draw_span(draw, side, share) for side in size)
    return Mix(1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right))


def _draw_span(draw: np.random.Generator, side: int, share: float) -> tuple[int, int]:
    """Draw the first pixel of a box along a side, and the pixel after its last."""
    half, middle = int(side * (1 - share) ** 0.5) // 2, int(draw.integers(side))
    return max(middle - half, 0), min(middle + half, side)
