"""Average precision: every figure is that of a second implementation, however classes and images are shared out."""

import hotcoco
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.image_objects import ImageObjects
from pipeline.data.objects import Objects
from pipeline.data.objects_file import objects_of_image
from pipeline.objectives.average_precision import (
    FIGURES,
    KINDS,
    average_precision,
    coco_boxes,
    compare_classes,
    summarise,
)
from pipeline.objectives.detected_objects import pack_objects, unpack_objects

CATEGORY_IDS = (1, 5, 90, 91)  # nothing is of the last class


def ellipse(box, size) -> bytes:
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    (x1, y1, w, h) = box
    inside = ((x - x1 - w / 2) / (w / 2)) ** 2 + ((y - y1 - h / 2) / (h / 2)) ** 2 <= 1
    return coco_mask.encode(np.asfortranarray(inside, np.uint8))["counts"]


def scenes(folder, count, seed=0) -> tuple[Objects, list[ImageObjects]]:
    """Images of up to 240 pixels with 0 to 6 objects, a quarter of them crowds, and detections with few scores."""
    random, found = np.random.default_rng(seed), []
    with BetonWriter(folder / "scenes.beton", ["a", "b", "c", "d"], count) as writer:
        for number in range(count):
            size = tuple(random.integers(150, 240, 2).tolist())
            boxes = [
                np.round([*(random.uniform(0, 0.4, 2) * size[::-1]), *(random.uniform(0.03, 0.8, 2) * size[::-1])], 1)
                for _ in range(random.integers(0, 7))
            ]
            objects = [
                {"box": box.tolist(), "class": int(random.integers(3)), "crowd": bool(random.random() < 0.25),
                 "rle": ellipse(box, size), "area": float(np.round(box[2] * box[3] * 0.8, 2))}
                for box in boxes
            ]  # fmt: skip
            writer.add(
                np.zeros((*size, 3), np.uint8), 0, objects=objects_of_image(1000 - number, size, objects, CATEGORY_IDS)
            )
            seen = [one for one in objects if random.random() < 0.8]
            moved = [np.abs(one["box"] + random.integers(-1, 2, 4) * random.uniform(0, 8)) + 0.5 for one in seen * 2]
            classes = [one["class"] if random.random() < 0.8 else int(random.integers(4)) for one in seen * 2]
            order = random.permutation(len(moved))
            xywh = np.array(moved).reshape(-1, 4)[order]
            masks = [{"size": list(size), "counts": ellipse(box, size)} for box in xywh]
            corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
            scores = random.integers(1, 6, len(order)) / 8
            found.append(ImageObjects(size, corners, np.array(classes, np.int64)[order], scores, masks))
    return Objects.open(open_beton(folder / "scenes.beton")), found


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes"), 100)


def as_json(objects: Objects, found: list[ImageObjects], kind: str):
    """The same as COCO's annotations and results."""
    images, truths, results = [], [], []
    for sample in range(len(objects)):
        image = objects.image_id(sample)
        height, width = found[sample].size
        images.append({"id": image, "height": height, "width": width})
        for row in objects.rows(sample):
            rle = objects.mask(row)
            truths.append(
                {"id": len(truths) + 1, "image_id": image, "category_id": int(row["class"]), "area": float(row["area"]),
                 "bbox": row["box"].tolist(), "iscrowd": int(row["crowd"]),
                 "segmentation": {**rle, "counts": rle["counts"].decode()}}
            )  # fmt: skip
        one = found[sample]
        for n, box in enumerate(coco_boxes(one.boxes).tolist()):
            place = {"bbox": box}
            if kind == "mask":
                place = {"segmentation": {**one.masks[n], "counts": one.masks[n]["counts"].decode()}}
            entry = {"image_id": image, "category_id": int(one.classes[n]), "score": float(one.scores[n])}
            results.append({**entry, **place})
    return {
        "images": images,
        "annotations": truths,
        "categories": [{"id": n, "name": str(n)} for n in range(4)],
    }, results


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_all_figures_are_those_of_a_second_implementation(hundred, kind, capfd):
    objects, found = hundred
    assert (objects.table["crowd"] == 1).any()
    assert (np.diff(objects.firsts) == 0).any()
    ours = average_precision(objects, range(100), found, masks=True)
    assert capfd.readouterr().out == "", "pycocotools' progress is not shown"
    truth, results = as_json(objects, found, kind)
    dataset = hotcoco.COCO(truth)
    other = hotcoco.COCOeval(dataset, dataset.load_res(results), KINDS[kind])
    other.evaluate()
    other.accumulate()
    other.summarize()
    figures = {f"{kind}_{name}": 100 * value for name, value in zip(FIGURES, other.stats, strict=True)}
    assert {name: ours.figures[name] for name in figures} == figures
    assert 10 < figures[f"{kind}_ap"] < 90
    assert next(iter(ours.figures)) == "box_ap"
    assert ours.of_classes[f"{kind}_ap"][3] is None
    assert np.mean(ours.of_classes[f"{kind}_ap"][:3]) == pytest.approx(figures[f"{kind}_ap"], abs=1e-12)


def test_ranks_share_images_and_classes_without_a_difference(hundred):
    """Each rank examines every `ranks`-th image, and afterwards every `ranks`-th class of all images."""
    ranks = 3
    objects, found = hundred
    parts = [pack_objects(range(rank, 100, ranks), found[rank::ranks]) for rank in range(ranks)]
    samples, gathered = unpack_objects(tuple(map(torch.cat, zip(*parts, strict=True))), masks=True)
    tables = np.zeros((2, 10, 102, 4, 4, 3))
    for rank in range(ranks):
        tables[:, :, :, rank::ranks] += compare_classes(objects, samples, gathered, range(rank, 4, ranks), True)
    assert summarise(tables, True) == average_precision(objects, range(100), found, True)


def test_perfect_detections_and_none_at_all(hundred):
    objects, found = hundred
    perfect = []
    for sample in range(100):
        rows = objects.rows(sample)
        rows = rows[rows["crowd"] == 0]
        boxes = np.concatenate([rows["box"][:, :2], rows["box"][:, :2] + rows["box"][:, 2:]], 1)
        masks = [objects.mask(row) for row in rows]
        perfect.append(
            ImageObjects(found[sample].size, boxes, rows["class"].astype(np.int64), np.ones(len(rows)), masks)
        )
    figures = average_precision(objects, range(100), perfect, True).figures
    assert figures["box_ap50"] == figures["mask_ap"] == pytest.approx(100, abs=1e-9)
    nothing = [one.chosen(np.zeros(0, np.int64)) for one in found]
    assert set(average_precision(objects, range(100), nothing, True).figures.values()) == {0.0}


@given(seed=st.integers(0, 2**32), masks=st.booleans())
def test_packed_objects_are_unpacked_to_the_bit(seed, masks):
    random = np.random.default_rng(seed)
    samples = random.permutation(50)[: random.integers(1, 8)].tolist()
    found = []
    for _ in samples:
        count, size = int(random.integers(0, 4)), tuple(random.integers(1, 5000, 2).tolist())
        rles = [{"size": list(size), "counts": random.bytes(int(random.integers(0, 9)))} for _ in range(count)]
        boxes, classes = random.normal(size=(count, 4)), random.integers(0, 80, count)
        found.append(ImageObjects(size, boxes, classes, random.random(count), rles if masks else None))
    back = unpack_objects(pack_objects(samples, found), masks)
    assert back[0] == samples
    for one, own in zip(back[1], found, strict=True):
        assert (one.size, one.masks) == (own.size if len(own.boxes) else (0, 0), own.masks)
        for a, b in ((one.boxes, own.boxes), (one.classes, own.classes), (one.scores, own.scores)):
            np.testing.assert_array_equal(a, b)
