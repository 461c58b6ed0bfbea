"""How many images one core of the loader prepares per second, measured.

Seconds of CPU time per image, from two measurements in docs/benchmarks.md ("How many cores does a GPU need?"): the
loader's rates at 224 and 384 px with JPEGs of 51 kB, and the time to decode a JPEG of 51 and of 108 kB, ImageNet-1K's
mean.
"""

DECODING_SECONDS = 1.03e-3 + 0.47e-3
"""Of what does not depend on the size of the network's images, mostly decoding: at 51 kB, and what 108 kB take more."""
RESIZING_SECONDS = 5.0e-3
"""Per megapixel of the network's images."""
AUGMENTING_SECONDS = 13.8e-3
"""RandAugment, per megapixel."""


def images_per_core_second(pixels: int, rand_augment: bool) -> float:
    """How many training images of so many pixels one core prepares per second, from JPEGs of 108 kB."""
    each = RESIZING_SECONDS + (AUGMENTING_SECONDS if rand_augment else 0.0)
    return 1 / (DECODING_SECONDS + each * pixels / 1e6)
