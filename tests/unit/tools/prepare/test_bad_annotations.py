"""Annotations that cannot be used are refused in one sentence, which names file, entry, value and remedy."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_masks

from pipeline.data.objects_file import MOST_CLASSES
from pipeline.errors import DataError
from tests.coco_archives import annotations_of, images_of
from tools.prepare.annotated_source import ObjectOptions, open_annotated_source
from tools.prepare.coco_json import read_annotations
from tools.prepare.coco_objects import ObjectTable, runs_of

FILES = images_of("train2017", 2)
WHOLE = annotations_of(FILES)


def changed(section, number=1, **values):
    """The annotations with other values in one entry; a value of None removes the key."""

    def change(content):
        entry = content[section][number]
        entry |= values
        for key in [key for key, value in entry.items() if value is None]:
            del entry[key]
        return content

    return change


def masked(**values):
    """The first annotation's mask as runs, with other values."""

    def change(content):
        one = content["annotations"][1]
        (size,) = [[i["height"], i["width"]] for i in content["images"] if i["id"] == one["image_id"]]
        one["segmentation"] = {"size": size, "counts": [size[0] * size[1]]} | values
        return content

    return change


def twice(section):
    return lambda content: content | {section: [*content[section], content[section][0]]}


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


ONE = re.escape(str(WHOLE["annotations"][1]["id"]))
BAD = {
    "not JSON": (lambda content: "{not JSON", r"is no JSON \(Expecting a key in quotes in line 1, column 2\)"),
    "cut off": (lambda content: json.dumps(content)[:-40], r"is no JSON \(.* in line 1, column \d+\); copy or export"),
    "no text": (lambda content: b"\xff\xfe\x00{", "is no UTF-8 text; name a JSON file"),
    "empty": (lambda content: "", r"is no JSON \(Expecting '{' in line 1, column 1\)"),
    "a list": (lambda content: [1], "holds no object of images, annotations and categories; name another file"),
    "nested": (lambda content: '{"images": ' + 100_000 * "[", r"nested too deeply|is no JSON"),
    "long number": (lambda _: '{"info": ' + 5000 * "9" + "}", r"no JSON \(A number has thousands of.* column 10\)"),
    "captions": (without("categories"), "key 'categories' is missing; name a file of COCO annotations of objects"),
    "no images": (lambda content: content | {"images": {}}, "'images' is no list; give a list of images"),
    "no objects": (lambda content: content | {"annotations": []}, "holds no annotations; detection needs some"),
    "entry": (lambda content: content | {"images": [7]}, "image number 0: it is 7; give an object with keys"),
    "image without size": (changed("images", height=None), "image 25: height is None; give whole pixels from 1"),
    "image size": (changed("images", width=1e9), "image 25: width is 1000000000.0; give whole pixels from 1 to 65535"),
    "file name": (changed("images", file_name=7), "image 25: file_name is 7; name the image's file"),
    "half a character": (changed("images", file_name="\ud800.jpg"), r"image 25: file_name is '\\ud800.jpg'; name the"),
    "image twice": (twice("images"), "image 9: its id is that of two images; give each image an id of its own"),
    "file twice": (
        changed("images", file_name="000000000009.jpg"),
        "image 25: file_name '000000000009.jpg' is also that of image 9; put all annotations of a file under one image",
    ),
    "image id": (changed("images", id="25"), "image number 1: id is '25'; give a whole number"),
    "category twice": (twice("categories"), "category 1: its id is that of two categories; give each"),
    "category name": (changed("categories", name=" "), "category 3: name is ' '; give the category a name"),
    "category names": (changed("categories", name="person"), "category 3: its name 'person' is that of two"),
    "annotation twice": (twice("annotations"), r"annotation \d+: its id is that of two annotations; give each its own"),
    "no image": (changed("annotations", image_id=7), f"annotation {ONE}: image_id is 7, and no image has it; correct"),
    "no category": (changed("annotations", category_id=2), f"annotation {ONE}: category_id is 2, and no category has"),
    "no id": (changed("annotations", id=None), "annotation number 1: id is missing; give a whole number"),
    "no box": (changed("annotations", bbox=None), f"annotation {ONE}: bbox is None; give x, y, width and height"),
    "short box": (changed("annotations", bbox=[1, 2, 3]), rf"annotation {ONE}: bbox is \[1, 2, 3\]; give x, y"),
    "NaN": (changed("annotations", bbox=[1, float("nan"), 3, 4]), rf"{ONE}: bbox is \[1, nan, 3, 4\]; give x, y"),
    "400 digits": (changed("annotations", bbox=[1, 10**400, 3, 4]), rf"{ONE}: bbox is \[1, 1000.*\.\.\.; give x, y"),
    "digits of an area": (changed("annotations", area=10**400), f"{ONE}: area is 1000.*; give square pixels, or"),
    "corners": (changed("annotations", bbox=[9, 9, -3, 4]), r"bbox \[9, 9, -3, 4\] has a negative width or height"),
    "outside": (changed("annotations", bbox=[900, 9, 3, 4]), r"bbox \[900, 9, 3, 4\] lies outside of image \d+, "),
    "far box": (changed("annotations", bbox=[0, 0, 1e9, 9]), r"bbox \[0, 0, .*\] reaches far outside of image \d+, "),
    "70 bits": (changed("annotations", category_id=2**70), r"category_id is 118059.*; give a whole number below 2\^63"),
    "crowd": (changed("annotations", iscrowd="yes"), f"annotation {ONE}: iscrowd is 'yes'; give 0 or 1"),
    "area": (changed("annotations", area=-1), f"annotation {ONE}: area is -1; give square pixels, or leave it out"),
    "three numbers": (changed("annotations", segmentation=[[1, 2, 3]]), f"{ONE}: a polygon has 3 numbers; give x and"),
    "flat polygon": (changed("annotations", segmentation=[1, 2, 3, 4, 5, 6]), "segmentation begins with 1; give a"),
    "a line": (changed("annotations", segmentation=[[1, 2, 3, 4]]), "has no polygon of three points; remove it"),
    "words": (changed("annotations", segmentation=[["a"] * 6]), "polygon .* holds no numbers; give x and y in turn"),
    "far away": (changed("annotations", segmentation=[[0, 0, 1e9, 0, 9, 9]]), r"a polygon reaches to 1e\+09 in an"),
    "mask": (changed("annotations", segmentation="AB"), "segmentation is 'AB'; give polygons, or an RLE"),
    "RLE size": (masked(size=[5, 5]), rf"annotation {ONE}: its RLE has size \[5, 5\], and its image \[\d+, \d+\]"),
    "RLE too long": (masked(counts=[90_000]), r"its RLE counts 90,000 pixels of [\d,]+; make the mask again"),
    "RLE runs": (masked(counts=[-1, 2]), r"the counts of its RLE are \[-1, 2\]; make the mask again"),
    "RLE of words": (masked(counts="o0"), "its RLE counts|the counts of its RLE are 'o0'; make the mask again"),
    "RLE cut off": (masked(counts="Po"), "the counts of its RLE are 'Po'; make the mask again"),
    "RLE of half a character": (masked(counts="\ud800"), f"annotation {ONE}: the counts of its RLE are '.ud800'; make"),
    "RLE characters": (masked(counts="\x00\u20ac"), "the counts of its RLE are .*; make the mask again"),
    "fractions": (
        lambda all_: all_ | {"annotations": [one | {"bbox": [0.1, 0.2, 0.5, 0.5]} for one in all_["annotations"]]},
        r"every box lies within one pixel, such as \[0.1, 0.2, 0.5, 0.5\] of annotation \d+; give boxes in pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_named(name):
    change, says = BAD[name]
    content = change(json.loads(json.dumps(WHOLE)))
    content = json.dumps(content) if isinstance(content, dict | list) else content
    content = content.encode() if isinstance(content, str) else content
    with pytest.raises(DataError, match=says) as refused:
        read_annotations("boxes/a.json", content).finish()
    said = str(refused.value)
    assert said.startswith("boxes/a.json")
    assert "\n" not in said
    assert len(said) < 320


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "holds no images; name another folder or archive"),
        (
            ("other.jpg",),
            r"none of the images of .*annotations.json is there \(000000000009.jpg, and files such as other.jpg",
        ),
    ],
)
def test_images_of_other_annotations_are_named(tmp_path, names, says):
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).write_bytes(FILES["000000000009.jpg"])
    (tmp_path / "annotations.json").write_text(json.dumps(WHOLE))
    with pytest.raises(DataError, match=says):
        open_annotated_source(str(tmp_path), ObjectOptions())


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ("nowhere.json", r"annotations .*nowhere.json do not exist; name a JSON file"),
        ("others", r"others holds a.json, b.json, and none is instances_images.json, for the images"),
        ("damaged.zip", r"archive .*damaged.zip cannot be read \(File is not a zip file\); copy it again"),
    ],
)
def test_files_of_annotations_are_named(tmp_path, annotations, says):
    for folder in ("images", "others"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images/000000000009.jpg").write_bytes(FILES["000000000009.jpg"])
    for name in ("others/a.json", "others/b.json", "damaged.zip"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=says):
        open_annotated_source(str(tmp_path / "images"), ObjectOptions(str(tmp_path / annotations)))


def test_too_many_classes_are_refused_at_once():
    """Whatever their number, no name is compared with all others."""

    class Name(str):
        compared = 0

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    table = ObjectTable("many.json")
    for number in range(MOST_CLASSES):
        table.add_category({"id": number, "name": Name(number)})
    assert Name.compared == 0
    with pytest.raises(DataError, match=r"^many.json names more than 65,536 classes; leave some out$"):
        table.add_category({"id": MOST_CLASSES, "name": "one more"})


@given(st.binary(min_size=1, max_size=400), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_runs_are_those_of_pycocotools(noise, width):
    bits = np.unpackbits(np.frombuffer(noise, np.uint8))
    mask = np.asfortranarray(np.resize(bits, (-(-bits.size // width), width)))
    rle = coco_masks.encode(mask)
    runs = runs_of(rle["counts"].decode())
    back = np.repeat(np.arange(len(runs)) % 2, runs)
    np.testing.assert_array_equal(back, mask.ravel("F"))
