"""Fluorescence nuclei for the demo of segmentation: one image of 512 x 512 pixels with 125 outlined nuclei.

The image is of the Data Science Bowl 2018 (Caicedo et al., Nature Methods 16, 2019; BBBC038 of the Broad Bioimage
Benchmark Collection, in the public domain, CC0). It is read from the package stardist (BSD-3), where it is a sample.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from tools.prepare.coco_annotations import CocoAnnotations
from tools.prepare.package_archives import PackageArchive

_WHEEL_OF = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")  # one file for every machine
ARCHIVE = PackageArchive(
    "stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
    (sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *_WHEEL_OF, "stardist==0.9.2"),
)
SIDE = 128  # pixels of a crop
TRAIN_ROWS = 384  # the rows below are for validation
STEPS = {"train": 32, "validation": SIDE}  # pixels between crops


def write_nuclei(archive: Path, directory: Path) -> list[Path]:
    """Write crops as folders of PNG files, TRAIN and VALIDATION, and return the folders.

    Each has images, masks (0 background, 1 nucleus) and instances (16-bit numbers of nuclei). classes.txt lists the
    names of the masks' values, and annotations.json the nuclei as COCO does. No pixel of a
    validation crop is in a training crop.

    Raises:
        DataError: if the folder cannot be written.
    """
    with zipfile.ZipFile(archive) as package:
        image, nuclei = (
            np.asarray(Image.open(io.BytesIO(package.read(f"stardist/data/images/{name}.tif"))))
            for name in ("img2d", "mask2d")
        )
    bounds = {"train": (0, TRAIN_ROWS), "validation": (TRAIN_ROWS, len(image))}
    try:
        for split, step in STEPS.items():
            for name in ("images", "masks", "instances"):
                (directory / split / name).mkdir(parents=True, exist_ok=True)
            annotations = CocoAnnotations(["nucleus"])
            for y in range(bounds[split][0], bounds[split][1] - SIDE + 1, step):
                for x in range(0, image.shape[1] - SIDE + 1, step):
                    crop, shown = (whole[y : y + SIDE, x : x + SIDE] for whole in (image, nuclei))
                    pictures = {"images": crop.astype(np.uint8), "masks": (shown > 0).astype(np.uint8)}
                    for name, pixels in {**pictures, "instances": shown}.items():
                        Image.fromarray(pixels).save(directory / split / name / f"{y:03}-{x:03}.png")
                    annotations.add(f"{y:03}-{x:03}.png", shown)
            annotations.write(directory / split)
            (directory / split / "classes.txt").write_text("background\nnucleus\n")
    except OSError as error:
        raise DataError(f"{directory} cannot be written ({error.strerror}); name another folder") from None
    return [directory / split for split in STEPS]
