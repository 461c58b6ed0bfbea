"""YOLO's text becomes the boxes and masks that the same objects have as COCO annotations."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from pipeline.data.beton import samples_of
from pipeline.data.objects import Objects
from pipeline.errors import DataError
from tests.archives import encoded, photograph
from tools.prepare.annotated_source import ObjectOptions
from tools.prepare.preparation import prepare_targets

SIZE = 80, 40  # width, height of the upright image


def write(folder, labels, part="", yaml="names: {0: cat, 1: dog}"):
    """One image, turned by EXIF, with these lines."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("images", "labels"):
        (folder / kind / part).mkdir(parents=True, exist_ok=True)
    picture = photograph(2, 96).resize(SIZE[::-1])
    (folder / "images" / part / "a.jpg").write_bytes(encoded(picture, exif=exif))
    (folder / "labels" / part / "a.txt").write_text(labels)
    (folder / "data.yaml").write_text(yaml)
    return folder


def prepared(folder, out):
    return [summary.beton for summary in prepare_targets(folder, out, None, objects=ObjectOptions(yolo=True))]


def test_boxes_are_those_of_the_upright_image(tmp_path):
    (beton,) = prepared(write(tmp_path / "a", "1 0.5 0.25 0.25 0.5\n\n0 0.125 0.5 0.25 1\n"), tmp_path / "a.beton")
    assert beton.classes == ("cat", "dog")
    image = samples_of(beton)["f0"][0]
    assert (image["width"], image["height"]) == SIZE
    rows = Objects.open(beton).rows(0)
    assert rows["box"].tolist() == [[30, 0, 20, 20], [0, 0, 20, 40]]
    assert (rows["class"].tolist(), rows["area"].tolist(), beton.objects.masks) == ([1, 0], [400, 800], False)


def test_polygons_become_masks(tmp_path):
    (beton,) = prepared(write(tmp_path / "a", "0 0.25 0.25 0.75 0.25 0.5 0.75"), tmp_path / "a.beton")
    objects = Objects.open(beton)
    (row,) = objects.rows(0)
    expected = coco_masks.merge(coco_masks.frPyObjects([[20, 10, 60, 10, 40, 30]], *SIZE[::-1]))
    assert objects.mask(row) == {"size": [40, 80], "counts": expected["counts"]}
    assert row["box"].tolist() == [20, 10, 40, 20]
    assert row["area"] == coco_masks.area(expected)


@pytest.mark.parametrize("layout", ["{kind}/{part}", "{part}/{kind}"])
def test_parts_of_folders_are_kept(tmp_path, layout):
    for part, count in (("train", 3), ("valid", 2), ("test", 1)):
        for number in range(count):
            for kind, name in (("images", f"{number}.jpg"), ("labels", f"{number}.txt")):
                path = tmp_path / "y" / layout.format(kind=kind, part=part) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = encoded(photograph(number, 30)) if kind == "images" else b"0 0.5 0.5 0.5 0.5" * (number > 0)
                path.write_bytes(content)
    (tmp_path / "y" / "classes.txt").write_text("cat\n")
    train, validation = prepared(tmp_path / "y", tmp_path / "a.beton")
    assert [(one.samples, one.objects.annotated) for one in (train, validation)] == [(3, 2), (2, 1)]
    assert np.array_equal(Objects.open(train).firsts, [0, 0, 1, 2])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("0 0.5 0.5 0.1", r"labels/a.txt, line 1: 4 numbers; give CLASS X Y WIDTH HEIGHT, or CLASS and three points"),
        ("0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1", r"a.txt, line 2: class 2 is none of 0 to 1; add its name, or correct"),
        ("0 50 50 10 10", r"line 1: '0 50 50 10 10' holds places outside of 0 to 1; give fractions of the image"),
        ("cat 0.5 0.5 0.1 0.1", r"line 1: 'cat 0.5 .*' holds a word that is no number; give CLASS X Y WIDTH HEIGHT"),
        ("0 0.5 nan 0.1 0.1", r"holds places outside of 0 to 1; give fractions of the image"),
        ("0 0.5 0.5 -0.005 0.1", r"line 1: a negative width or height; give CLASS X Y WIDTH HEIGHT"),
    ],
)
def test_bad_labels_name_their_line(tmp_path, labels, says):
    with pytest.raises(DataError, match=says):
        prepared(write(tmp_path / "a", labels), tmp_path / "a.beton")


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("nc: 2", "data.yaml has no readable key names; list the classes there"),
        ("names: 7", "data.yaml: names is 7; give a list, or numbers from 0 on"),
        ("names: {1: cat}", r"data.yaml: names is {1: 'cat'}; give a list, or numbers from 0 on"),
    ],
)
def test_bad_classes_are_named(tmp_path, yaml, says):
    with pytest.raises(DataError, match=says):
        prepared(write(tmp_path / "a", "", yaml=yaml), tmp_path / "a.beton")
