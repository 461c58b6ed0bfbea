"""YOLO's text becomes the boxes and masks that the same objects have as COCO annotations."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from pipeline.data.beton import samples_of
from pipeline.data.objects import Objects
from pipeline.errors import DataError
from tests.archives import encoded, photograph
from tools.prepare.annotated_source import ObjectOptions, open_annotated_source
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.preparation import has_own_parts, prepare_targets

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


def placed(folder, *names, yaml=""):
    """Images of one object each at these places."""
    for number, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(number, 30)))
        label = (folder / "labels" / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.5 0.5")
    (folder / "data.yaml").write_text(f"names: [cat]\n{yaml}")
    return folder


def part_of_each(folder):
    """The part of each image that is packed, and the images that are not, each with the reason."""
    opened = open_annotated_source(str(folder), ObjectOptions(yolo=True))
    held_out = opened.held_out or [None] * len(opened.items)
    assert has_own_parts(str(folder), objects=ObjectOptions()) == (opened.held_out is not None)
    names = (item.name.removeprefix("images/") for item in opened.items)
    return dict(zip(names, held_out, strict=True)), {name: why for name, why in opened.ignored if "images" in name}


@pytest.mark.parametrize(
    "yaml",
    [
        "",
        "path: ../sets/y\ntrain: images/train2017\nval: images/val2017\ntest: # none",
        "train: ../images/train2017\nval: ../images/val2017\ntest: ../images/test2017",
        "train: /home/me/y/images/train2017/\nval: [/home/me/y/images/val2017]\ntest: elsewhere",
        "train: images\\train2017\nval: ./images/val2017",
        "train: images\nval: images/val2017",
    ],
)
def test_keys_of_data_yaml_and_years_divide_images(tmp_path, yaml):
    folder = placed(tmp_path / "y", "train2017/a.jpg", "val2017/a.jpg", yaml=yaml)
    assert part_of_each(folder) == ({"train2017/a.jpg": False, "val2017/a.jpg": True}, {})


def test_images_that_data_yaml_does_not_name_are_left_out(tmp_path):
    yaml = "train: [images/one, images/two]\nval: images/three\ntest: images/four"
    folder = placed(tmp_path / "y", "one/a.jpg", "two/a.jpg", "three/a.jpg", "four/a.jpg", "five/a.jpg", yaml=yaml)
    parts, left_out = part_of_each(folder)
    assert parts == {"one/a.jpg": False, "three/a.jpg": True, "two/a.jpg": False}
    why = "it is for neither training nor validation"
    assert left_out == {"images/five/a.jpg": why, "images/four/a.jpg": why}


def test_one_folder_for_both_is_not_divided(tmp_path):
    folder = placed(tmp_path / "y", "train2017/a.jpg", "train2017/b.jpg", yaml="train: images\nval: images/train2017")
    assert part_of_each(folder) == ({"train2017/a.jpg": None, "train2017/b.jpg": None}, {})


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("", "y: images/extra/a.jpg lies in no folder train, val or test, and other images do; move it, or name the"),
        ("train: images/train\nval: images/vall", "data.yaml: val is 'images/vall', which is no folder of images in"),
        ("train: train.txt\nval: images/val", "data.yaml: train is 'train.txt', which is no folder of .*/y; give one"),
        ("train: images/train\nval: ../other/images/val", "val is '../other/images/val', which is no folder of images"),
        ("train: {a: 1}\nval: images/val", "data.yaml: train is {'a': 1}, which is no folder of images in"),
    ],
)
def test_parts_that_leave_a_doubt_are_refused(tmp_path, yaml, says):
    folder = placed(tmp_path / "y", "train/a.jpg", "val/a.jpg", "extra/a.jpg", yaml=yaml)
    with pytest.raises(DataError, match=says):
        part_of_each(folder)


def test_labels_of_images_as_they_are_stored(tmp_path):
    folder = write(tmp_path / "a", "1 0.5 0.25 0.25 0.5")
    options = {"objects": ObjectOptions(yolo=True, upright=False), "reading": ReadingSettings(ground="black")}
    (summary,) = prepare_targets(folder, tmp_path / "a.beton", None, **options)
    image = samples_of(summary.beton)["f0"][0]
    assert (image["width"], image["height"]) == SIZE[::-1]
    assert Objects.open(summary.beton).rows(0)["box"].tolist() == [[15, 0, 10, 40]]


def test_images_over_the_limit_are_named_or_left_out(tmp_path):
    folder = placed(tmp_path / "y", "a.jpg", "b.jpg")
    (folder / "images" / "b.jpg").write_bytes(encoded(photograph(1, 96)))
    options = {"objects": ObjectOptions(yolo=True), "reading": ReadingSettings(max_pixels=1000)}
    with pytest.raises(DataError, match=r"1 bad image in .*: images/b.jpg \(96 x \d+ pixels may be a decompression"):
        prepare_targets(folder, tmp_path / "a.beton", None, **options)
    (summary,) = prepare_targets(folder, tmp_path / "a.beton", None, on_bad="skip", **options)
    assert summary.beton.samples == 1


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("0 0.5 0.5 1 1\n0 1.005 0.5 0.001 0.1", r"a.txt, line 2: annotation 2: bbox .* lies outside of image 1, 80"),
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
        ("nc: 2", "data.yaml has no key `names`; list the classes under it"),
        ("names: 7", "data.yaml: names is 7; give a list, or numbers from 0 on"),
        ("names: {a: 1, 2: b}", r"data.yaml: names is {'a': 1, 2: 'b'}; give a list, or numbers from 0 on"),
        ("names: [cat, [dog]]", r"data.yaml: names is \['cat', \['dog'\]\]; give a list, or numbers from 0 on"),
        ("names: [cat", r"data.yaml: .* on line \d; correct it"),
        ("[cat]", "data.yaml has no key `names`; list the classes under it"),
        ("names: {1: cat}", r"data.yaml: names is {1: 'cat'}; give a list, or numbers from 0 on"),
        ("names: [cat, no]", r"data.yaml: YAML reads a name as False; put yes, no, on and off in quotes"),
        ("names: [cat]\nkpt_shape: [17, 2]", r"data.yaml has kpt_shape: its labels are points of a pose; export boxes"),
    ],
)
def test_bad_classes_are_named(tmp_path, yaml, says):
    with pytest.raises(DataError, match=says):
        prepared(write(tmp_path / "a", "", yaml=yaml), tmp_path / "a.beton")


def test_an_empty_file_of_classes_is_named(tmp_path):
    folder = write(tmp_path / "a", "0 0.5 0.5 0.5 0.5")
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("\n")
    with pytest.raises(DataError, match=r"classes\.txt is empty; write the names of the classes, one a line"):
        prepared(folder, tmp_path / "a.beton")


def test_files_that_were_read_are_not_called_ignored(tmp_path):
    folder = placed(tmp_path / "y", "train/a.jpg", "val/b.jpg", "test/c.jpg")
    (folder / "labels/train/lost.txt").write_text("0 0.5 0.5 0.5 0.5")
    (folder / "readme.md").write_text("of a cat")
    opened = open_annotated_source(str(folder), ObjectOptions(yolo=True))
    assert dict(opened.ignored) == {
        "images/test/c.jpg": "it is for neither training nor validation",
        "labels/test/c.txt": "its name is not an image's",
        "labels/train/lost.txt": "it is a label file without an image",
        "readme.md": "its name is not an image's",
    }
    assert opened.notes == ("y: 1 label file has no image, such as labels/train/lost.txt",)
