"""Scenes of the demo: exact masks, one scene for one place, and no training photograph among the test scenes."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from tests.unit.tools.prepare.test_cifar10 import small_archive
from tools.prepare import composed_scenes
from tools.prepare.composed_scenes import MOST_COVERED, MOST_OBJECTS, SIDE, compose, write_scenes


def scene(number: int, split: str = "train"):
    """A scene of ten photographs, each in a colour of its own, on textures that are darker than all."""
    photographs = np.empty((10, 32, 32, 3), np.uint8)
    photographs[:] = 100 + 15 * np.arange(10)[:, None, None, None]
    return compose(photographs, np.arange(10), np.full((2, 200, 300), 80, np.uint8), split, number)


@pytest.mark.parametrize("number", range(40))
def test_masks_are_exact(number: int) -> None:
    made = scene(number)
    expected = np.where(made.classes > 0, 100 + 15 * (made.classes.astype(int) - 1), 0)
    objects = made.classes > 0
    np.testing.assert_array_equal(made.image[objects], np.repeat(expected[objects][:, None], 3, axis=1))
    assert made.image[~objects].max() <= 80
    assert 1 <= len(made.labels) <= MOST_OBJECTS
    for n, label in enumerate(made.labels, 1):
        pixels = made.instances == n
        assert set(made.classes[pixels]) == {label + 1}
        ys, xs = np.nonzero(pixels)
        assert pixels.sum() >= (1 - MOST_COVERED) * 0.4 * 32**2
        assert max(np.ptp(ys), np.ptp(xs)) < 2.5 * 32


def test_a_scene_depends_on_its_place_alone() -> None:
    first, again = scene(3), scene(3)
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, scene(4).image)
    assert not np.array_equal(first.image, scene(3, "test").image)
    counts = np.array([len(scene(n).labels) for n in range(60)])
    assert set(counts) == set(range(1, MOST_OBJECTS + 1))


def test_folders_hold_pairs_of_images_and_masks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(composed_scenes, "SCENES", {"train": 3, "test": 2})
    archive = small_archive(tmp_path / "a.tgz")
    folders = write_scenes(archive, tmp_path / "scenes")
    for folder, count in zip(folders, (3, 2), strict=True):
        names = (folder / "classes.txt").read_text().split()
        assert (names[0], len(names)) == ("background", 11)
        annotated = json.loads((folder / "annotations.json").read_text())
        assert [one["file_name"] for one in annotated["images"]] == [f"{n:04}.png" for n in range(count)]
        assert [category["name"] for category in annotated["categories"]] == names[1:]
        for n in range(count):
            image, mask, instances = (
                np.asarray(Image.open(folder / kind / f"{n:04}.png")) for kind in ("images", "masks", "instances")
            )
            assert image.shape == (SIDE, SIDE, 3)
            np.testing.assert_array_equal(mask > 0, instances > 0)
            assert mask.max() < 11
            objects = [one for one in annotated["annotations"] if one["image_id"] == n + 1]
            assert len(objects) == instances.max()
            for number, one in enumerate(objects, 1):
                shown = coco_masks.decode(one["segmentation"])
                np.testing.assert_array_equal(shown, instances == number)
                assert set(mask[shown > 0]) == {one["category_id"]}
                ys, xs = np.nonzero(shown)
                assert one["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert one["area"] == shown.sum()
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.png"))]
    write_scenes(archive, tmp_path / "scenes")
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.png"))] == before
