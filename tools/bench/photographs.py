"""Sample photographs for benchmarks and tests: crops of those that scikit-image ships."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DataError

HEIGHT, WIDTH = 375, 500  # the usual size in ImageNet
NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"]


def photographs(count: int) -> list[Image.Image]:
    """Cut `count` RGB images of 500 x 375 pixels, each at another place and scale.

    Raises:
        DataError: if scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError("the sample photographs come with scikit-image; run `pip install scikit-image`")
    folder = Path(spec.origin).parent / "data"
    sources = [Image.open(folder / name).convert("RGB") for name in NAMES]
    numbers = np.random.default_rng(0)
    crops = []
    for i in range(count):
        source = sources[i % len(sources)]
        share = numbers.uniform(0.6, 1.0) * min(source.width / WIDTH, source.height / HEIGHT)
        width, height = int(WIDTH * share), int(HEIGHT * share)
        left, top = numbers.integers(source.width - width + 1), numbers.integers(source.height - height + 1)
        box = (left, top, left + width, top + height)
        crops.append(source.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box))
    return crops
