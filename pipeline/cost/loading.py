"""How many images one core of the loader prepares per second, measured.

Seconds of CPU time per image, from two measurements in docs/benchmarks.md ("How many cores does a GPU need?"): the
loader's rates at 224 and 384 px with JPEGs of 51 kB, and the time to decode a JPEG of 51 and of 108 kB, ImageNet-1K's
mean. What scenes and objects cost is the rest of their rates ("How fast is the image loader?").
"""

from pipeline.recipe.image_size import height_and_width
from pipeline.recipe.sections import DataSettings

DECODING_SECONDS = 1.03e-3 + 0.47e-3
"""Of what does not depend on the size of the network's images, mostly decoding: at 51 kB, and what 108 kB take more."""
RESIZING_SECONDS = 5.0e-3
"""Per megapixel of the network's images."""
AUGMENTING_SECONDS = 13.8e-3
"""RandAugment, per megapixel."""
SCENE_SECONDS = 4.7e-3
"""Label maps and the class limit of segmentation, per megapixel."""
DISTORTING_SECONDS = 12.0e-3
"""Photometric distortion of scenes, per megapixel."""

OBJECT_SECONDS = 5.4e-3
"""Masks and padding in detection, per megapixel: the mean of the three kinds of views."""


def images_per_core_second(data: DataSettings) -> float:
    """How many training images one core prepares per second, from JPEGs of 108 kB."""
    each, (height, width) = RESIZING_SECONDS, height_and_width(data.image_size)
    pixels = height * width
    if data.rand_augment:
        each += AUGMENTING_SECONDS
    if data.scenes is not None:
        each += SCENE_SECONDS + (DISTORTING_SECONDS if data.scenes.photometric else 0.0)
    if data.views is not None:
        each += OBJECT_SECONDS
    return 1 / (DECODING_SECONDS + each * pixels / 1e6)
