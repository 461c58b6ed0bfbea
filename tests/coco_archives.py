"""COCO rebuilt small: its archives' names and layout, its ids with gaps, crowds, odd boxes and turned images."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.archives import encoded, photograph

CATEGORIES = {1: "person", 3: "car", 18: "dog", 90: "toothbrush"}
TURNED = 1  # the number of the image whose EXIF orientation is 6, which COCO's sizes do not follow
EMPTY = 2  # the number of the image without annotations


def images_of(part: str, count: int) -> dict[str, bytes]:
    """JPEGs of several sizes by their names, whose numbers have gaps."""
    files = {}
    for number in range(count):
        picture = photograph(number + 50 * (part == "val2017"), 64).resize((60 + 4 * number, 40 + 6 * number))
        exif = Image.Exif()
        if number == TURNED:
            exif[0x0112] = 6
        files[f"{9 + 16 * number:012}.jpg"] = encoded(picture, exif=exif)
    return files


def annotations_of(files: dict[str, bytes], seed: int = 0) -> dict:
    """Two polygons and a crowd for each image but one, as COCO writes them: keys, order and number formats."""
    numbers, images, annotations = np.random.default_rng(seed), [], []
    for name, content in files.items():
        width, height = Image.open(io.BytesIO(content)).size
        image_id = int(name[:-4])
        images.append({"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/{name}",
                       "height": height, "width": width,
                       "date_captured": "2013-11-14 11:18:45", "id": image_id})  # fmt: skip
        if len(images) - 1 == EMPTY:
            continue
        for corners in (3, 7):
            points = numbers.uniform(0, [width, height], (corners, 2)).round(2)
            (x0, y0), (x1, y1) = points.min(0), points.max(0)
            annotations.append({
                "segmentation": [points.ravel().tolist()], "area": float(numbers.uniform(1, 900)), "iscrowd": 0,
                "image_id": image_id, "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                "category_id": int(numbers.choice([*CATEGORIES])), "id": 900 + 7 * len(annotations),
            })  # fmt: skip
        mask = np.zeros((height, width), np.uint8)
        mask[5:20, 10:30] = 1
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]])))
        runs = np.diff([0, *edges, mask.size]).tolist()
        annotations.append({
            "segmentation": {"counts": runs, "size": [height, width]}, "area": 300, "iscrowd": 1,
            "image_id": image_id, "bbox": [10, 5, 20, 15], "category_id": 1, "id": 900_100_000_000 + image_id,
        })  # fmt: skip
    annotations[0]["bbox"] = [12.5, 7.25, 0.0, 9.0]  # COCO has boxes without width
    categories = [{"supercategory": "thing", "id": number, "name": name} for number, name in CATEGORIES.items()]
    order = numbers.permutation(len(annotations))
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017}, "licenses": [{"id": 3, "name": "Attribution"}],
        "images": images, "annotations": [annotations[n] for n in order], "categories": categories,
    }  # fmt: skip


def write_coco(folder: Path, train: int = 6, val: int = 4) -> Path:
    """Write COCO's three archives."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED) as annotations:
        for part, count in (("train2017", train), ("val2017", val)):
            files = images_of(part, count)
            with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                archive.mkdir(part)
                for name, content in files.items():
                    archive.writestr(f"{part}/{name}", content)
            objects = json.dumps(annotations_of(files, seed=count))
            annotations.writestr(f"annotations/instances_{part}.json", objects)
            annotations.writestr(f"annotations/captions_{part}.json", "[]")
            annotations.writestr(f"annotations/person_keypoints_{part}.json", objects)
    return folder


def spread(archive: Path, out: Path, size: int) -> Path:
    """Write a copy of a .zip, sparse, whose members lie far apart in `size` bytes (zip64)."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as copy:
        names = [name for name in source.namelist() if not name.endswith("/")]
        for number, name in enumerate(names, 1):
            copy.writestr(name, source.read(name))
            copy.fp.seek(number * size // len(names))
            copy.start_dir = copy.fp.tell()
    return out
