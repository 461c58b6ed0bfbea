"""Tiny scenes with exact label maps, and a segmentation stage that learns them in seconds."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.beton_writer import BetonWriter

CLASSES = ("ground", "disc", "square")


def tiny_scene(number: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (height, width, 3), and the class of each pixel: a disc and a square on noise. Sizes differ."""
    draw = np.random.default_rng(number)
    height, width = size + draw.integers(0, 16, 2)
    y, x = np.mgrid[:height, :width]
    label_map = np.zeros((height, width), np.uint8)
    cy, cx, radius = [*draw.uniform(0.2, 0.8, 2).tolist(), draw.uniform(5, 10)]
    label_map[(y - cy * height) ** 2 + (x - cx * width) ** 2 < radius**2] = 1
    top, left, side = [*draw.integers(0, size - 16, 2).tolist(), int(draw.integers(8, 16))]
    label_map[top : top + side, left : left + side] = 2
    colours = np.array([[90, 110, 90], [200, 60, 50], [50, 80, 210]])
    pixels = colours[label_map] + draw.normal(0, 15, (height, width, 1))
    label_map[:2] = 255  # nobody has labelled the upper edge
    return pixels.clip(0, 255).astype(np.uint8), label_map


def write_scenes(path: Path, numbers: range) -> Path:
    """Write a data file with label maps."""
    with BetonWriter(path, CLASSES, len(numbers)) as writer:
        for number in numbers:
            pixels, label_map = tiny_scene(number)
            writer.add(pixels, 0, label_map=label_map)
    return path


def tiny_segmentation(data: Path) -> dict[str, Any]:
    """A chain of FCMAE and segmentation on `train.beton` and `validation.beton`: every mechanism, a dozen steps."""
    return {
        "name": "scenes",
        "seed": 3,
        "defaults": {
            "model": {"name": "convnextv2", "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "stem_stride": 2},
            "data": {
                "train": str(data / "train.beton"), "validation": str(data / "validation.beton"), "image_size": 32,
            },
            "batch": {"global_batch": 16, "slot": 2, "micro_slots": 2},
            "evaluation": {"batch": 4},
            "checkpoint": {"every_steps": 5},
            "tracking": {"log_every_steps": 1, "mlflow": False, "pictures": 3},
        },
        "stages": {
            "pretrain": {
                "objective": {"kind": "fcmae", "decoder_dim": 16},
                "optimizer": {"base_lr": 0.008},
                "schedule": {"steps": 4},
            },
            "segment": {
                "objective": {
                    "kind": "segmentation", "classes": 3, "channels": 16, "auxiliary_channels": 8, "norm_group": 8,
                    "drop_path": 0.2,
                },
                "data": {"scenes": {"base_size": [96, 48], "window_step": 21}},
                "optimizer": {"lr": 4e-3, "layer_decay": 0.9, "layer_decay_groups": "stage_wise"},
                "schedule": {"steps": 12, "warmup_steps": 2, "decay": "poly"},
                "evaluation": {"every_steps": 6},
                "ema": 0.9,
            },
        },
    }  # fmt: skip
