"""COCO's archives and one's own COCO JSON become data files whose boxes and masks are those annotated, bit by bit."""

import copy
import json
import shutil
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from pipeline.data.beton import JPEG, contents_of, open_beton, samples_of
from pipeline.data.objects import Objects
from pipeline.data.objects_file import objects_path
from pipeline.errors import DataError
from tests.archives import encoded, photograph
from tests.coco_archives import CATEGORIES, EMPTY, TURNED, annotations_of, images_of, spread, write_coco
from tools.prepare.annotated_source import ObjectOptions, _matched, annotated_parts, open_annotated_source
from tools.prepare.coco_objects import ObjectTable
from tools.prepare.image_source import ImageSource, Item, locate
from tools.prepare.preparation import prepare_beton, prepare_targets
from tools.prepare.preparation_report import missing_classes, summary_lines
from tools.prepare.zip_archives import ZipMembers, list_zip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


def own(folder, files=None, annotations=None):
    """A folder of one's own images and COCO JSON."""
    files = files or images_of("train2017", 4)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)
    content = annotations if annotations is not None else annotations_of(files)
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def prepared(folder, out, **options):
    (summary,) = prepare_targets(folder, out, None, objects=ObjectOptions(), **options)
    return summary


def expected_masks(path):
    """The RLE of each annotation by pycocotools itself, by image id, in the order of the file."""
    reference = COCO(path)
    return {i: [(a, reference.annToRLE(a)) for a in reference.imgToAnns[i]] for i in reference.imgs}


def assert_equal_to_the_annotations(beton, expected):
    objects, images = Objects.open(beton), samples_of(beton)["f0"]
    assert [objects.image_id(n) for n in range(len(objects))] == list(expected)
    for number, annotations in enumerate(expected.values()):
        rows = objects.rows(number)
        assert len(rows) == len(annotations)
        for row, (annotation, rle) in zip(rows, annotations, strict=True):
            assert row["box"].tobytes() == np.array(annotation["bbox"], np.float64).tobytes()
            assert (row["area"], row["crowd"]) == (annotation["area"], annotation["iscrowd"])
            assert objects.category_ids[row["class"]] == annotation["category_id"]
            counts = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
            assert objects.mask(row) == {"size": [*rle["size"]], "counts": counts}
            assert objects.mask(row)["size"] == [images["height"][number], images["width"][number]]


def test_cocos_archives_are_read_where_they_lie(coco, tmp_path):
    train, val = prepare_targets(coco, tmp_path / "coco.beton", None, objects=ObjectOptions(), workers=1)
    assert (train.beton.path.name, val.beton.path.name) == ("coco.beton", "coco-val.beton")
    for part, beton, count in (("train2017", train.beton, 6), ("val2017", val.beton, 4)):
        (tmp_path / f"{part}.json").write_bytes(
            zipfile.ZipFile(coco / "annotations_trainval2017.zip").read(f"annotations/instances_{part}.json")
        )
        assert_equal_to_the_annotations(beton, expected_masks(tmp_path / f"{part}.json"))
        assert beton.classes == tuple(CATEGORIES.values())
        assert beton.objects.category_ids == tuple(CATEGORIES)
        assert beton.objects.crowds == count - 1
        assert beton.objects.annotated == count - 1
        files = images_of(part, count)
        assert [bytes(content) for _, content in contents_of(beton, JPEG)] == [*files.values()]  # turned ones too
        assert not Objects.open(beton).rows(EMPTY).size
    said = [*summary_lines(train)]
    assert any("boxes without width or height: 1 (first: annotation 900)" in line for line in said)
    assert any("objects: 15 with masks, 5 of them crowds, in all but 1 image:" in line for line in said)
    outcomes = [json.loads(line)["outcome"] for line in train.report.read_text().splitlines()]
    assert outcomes.count("class") == 4


def test_all_forms_of_a_source_give_equal_files(coco, tmp_path):
    """The zips, one zip with its annotations, the unpacked folder, and one JSON file."""
    options = {"objects": ObjectOptions(str(coco / "annotations_trainval2017.zip"))}
    first = prepare_beton(coco / "train2017.zip", tmp_path / "a.beton", **options).beton
    for archive in ("train2017", "val2017", "annotations_trainval2017"):
        zipfile.ZipFile(coco / f"{archive}.zip").extractall(tmp_path / "coco")
    both, _ = prepare_targets(tmp_path / "coco", tmp_path / "b.beton", None, objects=ObjectOptions())
    options = {"objects": ObjectOptions(str(tmp_path / "coco/annotations/instances_train2017.json"))}
    third = prepare_beton(tmp_path / "coco/train2017", tmp_path / "c.beton", **options).beton
    assert both.beton.identity == third.identity == first.identity
    assert both.beton.objects == first.objects
    parallel = prepare_targets(coco, tmp_path / "d.beton", None, objects=ObjectOptions(), part_samples=2)[0].beton
    assert parallel.objects == first.objects


def test_own_images_are_turned_where_only_then_their_size_fits(tmp_path):
    files = images_of("train2017", 4)
    annotations = annotations_of(files)
    turned = annotations["images"][TURNED]
    objects = [one for one in annotations["annotations"] if one["image_id"] != turned["id"]]
    turned["height"], turned["width"] = turned["width"], turned["height"]
    folder = own(tmp_path / "own", files, {**annotations, "annotations": objects})
    images = samples_of(prepared(folder, tmp_path / "a.beton").beton)["f0"]
    assert (images["height"][TURNED], images["width"][TURNED]) == (turned["height"], turned["width"])
    turned["height"] += 1
    folder = own(tmp_path / "own", files, {**annotations, "annotations": objects})
    with pytest.raises(DataError, match=r"1 bad image in .*000000000025.jpg \(64 x 46 pixels, and its annotations say"):
        prepared(folder, tmp_path / "b.beton")
    assert prepared(folder, tmp_path / "b.beton", on_bad="skip").beton.samples == 3


def test_missing_images_and_others_are_named(tmp_path):
    folder = own(tmp_path / "own")
    (folder / "images" / "000000000009.jpg").unlink()
    (folder / "images" / "stranger.jpg").write_bytes(encoded(photograph(1, 20)))
    with pytest.raises(DataError, match=r"000000000009.jpg \(it is annotated, and missing\)"):
        prepared(folder, tmp_path / "a.beton")
    summary = prepared(folder, tmp_path / "a.beton", on_bad="skip")
    assert summary.beton.samples == 3
    assert Objects.open(summary.beton).image_id(0) == 25
    assert ("ignored", "annotations.json does not name it") in summary.counts


@pytest.mark.parametrize(
    ("names", "stored", "why"),
    [
        (["cam2/b.jpg", "x/a.jpg"], ["cam1/b.jpg", "a.jpg"], "cam2/b.jpg (it is annotated, and missing)"),
        (["cam1/b.jpg", "x/a.jpg"], ["data/cam1/b.jpg", "a.jpg"], ""),
        (["train/b.jpg", "val/b.jpg", "a.jpg"], ["val/b.jpg", "a.jpg"], "train/b.jpg (it is annotated, and missing)"),
        (["b.jpg", "val/b.jpg", "a.jpg"], ["val/b.jpg", "a.jpg"], "b.jpg (val/b.jpg would be several of the annotated"),
        (["s/b.jpg", "t/b.jpg", "a.jpg"], ["b.jpg", "a.jpg"], "t/b.jpg (b.jpg would be several of the annotated"),
    ],
)
def test_a_file_is_never_taken_for_another_one_of_its_name(tmp_path, names, stored, why):
    files = images_of("train2017", len(names))
    annotations = annotations_of(files)
    for image, name in zip(annotations["images"], names, strict=True):
        image["file_name"] = name
    for name, content in zip(stored, files.values(), strict=False):
        path = tmp_path / "own" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "own" / "annotations.json").write_text(json.dumps(annotations))
    opened = open_annotated_source(str(tmp_path / "own"), ObjectOptions())
    refused = [f"{item.name} ({item.place})" for item in opened.items if isinstance(item.place, str)]
    assert why in " ".join(refused)
    assert len(refused) == (2 if "s/b.jpg" in names else bool(why))


@pytest.mark.parametrize("above", ["", "train/"])
def test_equal_names_in_many_folders_are_no_search_among_all(above):
    table, numbers = ObjectTable("a.json"), range(5000)
    table.add_category({"id": 1, "name": "cat"})
    for n in numbers:
        table.add_image({"id": n, "file_name": f"{above}{n}/rgb.png", "height": 9, "width": 9})
    table.add_object({"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]})
    images = ImageSource("folder", ("all",), [Item(f"{n}/rgb.png", 0, (n,)) for n in numbers], None, "")
    began = time.process_time()
    items = _matched("own", images, table, table.finish(), "a.json").items
    assert time.process_time() - began < 2  # all pairs took 7 s
    assert [item.place for item in items] == [(n,) for n in numbers]


def two_parts(folder, change):
    """Folders called train and valid; `change` changes the annotations of valid."""
    for part in ("train", "valid"):
        files = images_of("train2017", 3)
        annotations = annotations_of(files)
        if part == "valid":
            change(annotations)
        (folder / part).mkdir(parents=True)
        for name, content in files.items():
            (folder / part / name).write_bytes(content)
        (folder / part / "_annotations.coco.json").write_text(json.dumps(annotations))
    return folder


def drop_masks(annotations):
    for one in annotations["annotations"]:
        del one["segmentation"]


def rename_category(annotations):
    annotations["categories"][0]["name"] = "other"


def renumber_categories(annotations):
    for one in annotations["categories"]:
        one["id"] += 1000
    for one in annotations["annotations"]:
        one["category_id"] += 1000


def test_masks_of_one_part_are_not_dropped_without_a_word(tmp_path):
    source = two_parts(tmp_path / "own", drop_masks)
    training, _ = prepare_targets(source, tmp_path / "a.beton", None, objects=ObjectOptions())
    assert not training.beton.objects.masks
    said = "train: its masks are left out, because valid has objects without one"
    assert any(said in line for line in summary_lines(training))


@pytest.mark.parametrize("change", [rename_category, renumber_categories])
def test_parts_with_different_categories_are_refused(tmp_path, change):
    with pytest.raises(DataError, match="its two parts have different categories; prepare them one by one"):
        open_annotated_source(str(two_parts(tmp_path / "own", change)), ObjectOptions())


def test_a_crowd_may_be_a_float(tmp_path):
    annotations = annotations_of(images_of("train2017", 3))
    expected = prepared(own(tmp_path / "own", None, annotations), tmp_path / "a.beton").beton.objects
    for one in annotations["annotations"]:
        one["iscrowd"] = float(one["iscrowd"])
    assert prepared(own(tmp_path / "own", None, annotations), tmp_path / "b.beton").beton.objects == expected


def test_masks_as_compressed_runs_stay_as_they_are(tmp_path):
    files = images_of("train2017", 3)
    annotations = annotations_of(files)
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    noise = np.random.default_rng(5)
    for one in annotations["annotations"]:
        rle = coco_masks.encode(np.asfortranarray(noise.integers(0, 2, sizes[one["image_id"]], np.uint8)))
        one["segmentation"] = {"size": [*rle["size"]], "counts": rle["counts"].decode()}
    folder = own(tmp_path / "own", files, annotations)
    assert_equal_to_the_annotations(
        prepared(folder, tmp_path / "a.beton").beton, expected_masks(folder / "annotations.json")
    )


def test_annotations_before_images_and_paths_of_files(tmp_path):
    files = images_of("train2017", 3)
    annotations = annotations_of(files)
    expected = prepared(own(tmp_path / "own", files, annotations), tmp_path / "a.beton").beton
    moved = copy.deepcopy(annotations)
    for image in moved["images"]:
        image["file_name"] = f"C/my/images/{image['file_name']}"
    moved = {key: moved[key] for key in ("annotations", "categories", "images")}
    assert prepared(own(tmp_path / "own", files, moved), tmp_path / "b.beton").beton.objects == expected.objects


def test_boxes_without_masks_and_files_of_both(tmp_path):
    files = images_of("train2017", 3)
    annotations = annotations_of(files)
    del annotations["annotations"][1]["segmentation"], annotations["annotations"][1]["area"]
    summary = prepared(own(tmp_path / "own", files, annotations), tmp_path / "a.beton")
    assert not summary.beton.objects.masks
    assert any("objects without a mask: 1 (first: annotation" in line for line in summary_lines(summary))
    for one in annotations["annotations"]:
        one["segmentation"] = []
    summary = prepared(own(tmp_path / "own", files, annotations), tmp_path / "b.beton")
    assert not any("without a mask" in line for line in summary_lines(summary))
    box = annotations["annotations"][1]["bbox"]
    assert box[2] * box[3] in Objects.open(summary.beton).table["area"]


def test_parts_keep_all_categories_and_missing_ones_are_named(tmp_path):
    folder = own(tmp_path / "own", images_of("train2017", 12), None)
    training, validation = prepare_targets(folder, tmp_path / "a.beton", 0.3, objects=ObjectOptions())
    assert training.beton.classes == validation.beton.classes
    ids = [Objects.open(one.beton).image_id(n) for one in (training, validation) for n in range(one.beton.samples)]
    assert sorted(ids) == [9 + 16 * n for n in range(12)]
    annotations = annotations_of(images_of("train2017", 12))
    annotations["categories"].append({"id": 91, "name": "unicorn"})
    own(folder, annotations=annotations)
    parts = prepare_targets(folder, tmp_path / "b.beton", 0.3, objects=ObjectOptions())
    sentences = [*missing_classes([part.beton for part in parts])]
    assert len(sentences) == 2
    assert all("has no images of " in said and "unicorn" in said for said in sentences)


def test_an_interrupted_preparation_continues_to_the_same_bytes(tmp_path):
    folder = own(tmp_path / "own", images_of("train2017", 8))
    whole = prepared(folder, tmp_path / "a.beton", part_samples=2)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(folder, tmp_path / "b.beton", part_samples=2, progress=stop)
    assert (tmp_path / "b.beton.parts").exists()
    again = prepared(folder, tmp_path / "b.beton", part_samples=2)
    assert again.beton.identity == whole.beton.identity
    for name in ("", ".objects", ".json", ".report.jsonl"):
        assert (tmp_path / f"b.beton{name}").read_bytes() == (tmp_path / f"a.beton{name}").read_bytes()
    annotations = annotations_of(images_of("train2017", 8))
    annotations["annotations"][0]["area"] += 1
    own(folder, annotations=annotations)
    assert prepared(folder, tmp_path / "b.beton", overwrite=True).beton.identity != whole.beton.identity


def test_damage_in_an_archive_names_the_image(coco, tmp_path):
    shutil.copy(coco / "val2017.zip", tmp_path)
    content = bytearray((tmp_path / "val2017.zip").read_bytes())
    content[400] ^= 255
    (tmp_path / "val2017.zip").write_bytes(content)
    options = {"objects": ObjectOptions(str(coco / "annotations_trainval2017.zip"))}
    with pytest.raises(DataError, match=r"val2017/000000000009.jpg \(it is damaged in its archive"):
        prepare_beton(tmp_path / "val2017.zip", tmp_path / "a.beton", **options)
    (tmp_path / "val2017.zip").write_bytes(content[:-30])
    with pytest.raises(
        DataError, match=r"archive .*val2017.zip cannot be read \(File is not a zip file\); copy it again"
    ):
        prepare_beton(tmp_path / "val2017.zip", tmp_path / "a.beton", **options)


@pytest.mark.slow
def test_an_archive_of_18_gb_is_read_where_it_lies(coco, tmp_path):
    """Sparse, and as long as COCO's train2017.zip."""
    options = {"objects": ObjectOptions(str(coco / "annotations_trainval2017.zip"))}
    large = spread(coco / "train2017.zip", tmp_path / "train2017.zip", 18 << 30)
    facts = large.stat()
    assert facts.st_size > 18 << 30
    assert facts.st_blocks * 512 < 1 << 24
    expected = prepare_beton(coco / "train2017.zip", tmp_path / "a.beton", **options).beton
    assert prepare_beton(large, tmp_path / "b.beton", **options, workers=2).beton.identity == expected.identity


def test_deflated_members_are_read_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "words " * 1000)
        archive.writestr("empty", "")
    fs, path = locate(str(tmp_path / "a.zip"))
    members = list_zip(fs, path)
    assert {name: ZipMembers(fs).read(place) for name, place in members.items()} == {
        "a.txt": b"words " * 1000, "empty": b"",
    }  # fmt: skip


def test_objects_lie_beside_their_file(tmp_path):
    beton = prepared(own(tmp_path / "own"), tmp_path / "a.beton").beton
    assert objects_path(beton.path).exists()
    objects_path(beton.path).unlink()
    with pytest.raises(DataError, match="do not exist; copy them too"):
        open_beton(beton.path)
    assert Image.open(tmp_path / "own/images/000000000009.jpg").size == (60, 40)


def test_unpacked_annotations_come_before_their_archive(tmp_path):
    for name in ("train2017", "annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "annotations_trainval2017.zip").touch()
    (part,) = annotated_parts(str(tmp_path))
    assert (part.images, part.annotations) == (f"{tmp_path}/train2017", f"{tmp_path}/annotations")


def test_another_orientation_begins_anew(tmp_path):
    """COCO's pixels are those of torchvision's loader, so the side-car does not name the orientation."""
    half_turn = Image.Exif()
    half_turn[0x0112] = 3
    names = images_of("train2017", 2)
    files = {name: encoded(photograph(n, 64), exif=half_turn) for n, name in enumerate(names)}
    folder = own(tmp_path / "own", files)

    def stop(done, total):
        raise KeyboardInterrupt

    options = {"objects": ObjectOptions(upright=True), "part_samples": 1}
    with pytest.raises(KeyboardInterrupt):
        prepared(folder, tmp_path / "a.beton", part_samples=1, progress=stop)
    for name in ("a", "undisturbed"):
        prepare_targets(folder, tmp_path / f"{name}.beton", None, **options)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "undisturbed.beton").read_bytes()
