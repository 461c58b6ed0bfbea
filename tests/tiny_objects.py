"""Tiny scenes with boxes and masks, and a detection stage that learns them in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from pipeline.data.beton_writer import BetonWriter
from pipeline.data.objects_file import objects_of_image
from tests.tiny_scenes import CLASSES as SCENE_CLASSES
from tests.tiny_scenes import tiny_scene, tiny_segmentation
from tools.prepare.composed_scenes import SIDE, compose

CLASSES = SCENE_CLASSES[1:]


def tiny_objects(number: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Pixels uint8 (height, width, 3) of a scene, and its objects: what is seen of the disc, and the square.

    Every seventh scene has none, as if nobody had annotated it, and in every fifth the disc is a crowd.
    """
    pixels, label_map = tiny_scene(number)
    objects = []
    for label in (1, 2) if number % 7 else ():
        rle = coco_masks.encode(np.asfortranarray(label_map == label, np.uint8))
        if coco_masks.area(rle):
            crowd = label == 1 and number % 5 == 0
            objects.append({"box": coco_masks.toBbox(rle), "class": label - 1, "rle": rle["counts"], "crowd": crowd})
    return pixels, objects


def write_objects(path: Path, numbers: range) -> Path:
    """Write a data file with boxes and masks."""
    with BetonWriter(path, CLASSES, len(numbers)) as writer:
        for number in numbers:
            pixels, objects = tiny_objects(number)
            writer.add(pixels, 0, objects=objects_of_image(number, pixels.shape[:2], objects, (3, 7)))
    return path


def write_composed(path: Path, numbers: range) -> Path:
    """Write a data file of the demo's scenes, in which objects of ten classes hide parts of each other."""
    chance = np.random.default_rng(0)
    looks = chance.integers(0, 256, (10, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)  # instead of photographs
    textures = chance.integers(60, 140, (3, 200, 200), np.uint8)
    with BetonWriter(path, tuple("abcdefghij"), len(numbers)) as writer:
        for number in numbers:
            scene, objects = compose(looks, np.arange(10), textures, "train", number), []
            for place, label in enumerate(scene.labels, 1):
                rle = coco_masks.encode(np.asfortranarray(scene.instances == place, np.uint8))
                objects.append({"box": coco_masks.toBbox(rle), "class": label, "rle": rle["counts"]})
            writer.add(scene.image, 0, objects=objects_of_image(number, (SIDE, SIDE), objects, tuple(range(1, 11))))
    return path


def tiny_detection(data: Path) -> dict[str, Any]:
    """A chain of FCMAE and Mask R-CNN on `train.beton` and `validation.beton`: every mechanism, a dozen steps."""
    chain = tiny_segmentation(data)
    return {
        **chain,
        "name": "objects",
        "stages": {
            "pretrain": chain["stages"]["pretrain"],
            "detect": {
                "objective": {
                    "kind": "detection", "classes": 2, "head_channels": 16, "fc_channels": 32, "anchors_sampled": 32,
                    "proposals_before": 60, "proposals": 30, "test_proposals": 40, "regions": 16, "drop_path": 0.2,
                },
                "data": {"image_size": 64, "views": {"scale": [0.5, 1.5], "test_size": [80, 64]}},
                "optimizer": {"lr": 2e-3, "layer_decay": 0.9},
                "schedule": {"steps": 12, "warmup_steps": 2, "decay": "step", "milestones": [8, 10]},
                "evaluation": {"every_steps": 6},
                "ema": 0.9,
            },
        },
    }  # fmt: skip
