"""Write objects as COCO's files have them: results for its evaluation, and annotations for other programs."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.image_objects import ImageObjects
from pipeline.errors import UserError, listed
from pipeline.objectives.average_precision import coco_boxes
from pipeline.storage.folder import Folder
from pipeline.tracking.object_pictures import objects_over
from tools.predict.detection_model import DetectionModel
from tools.predict.image_inputs import Photographs
from tools.predict.label_map_files import places_of

ANNOTATIONS = "detections.json"  # in the folder of a prediction
PICTURE_PIXELS = 384  # least long side of a picture; smaller images are enlarged by a whole factor
OBJECTS_SHOWN = 8  # of an image, in text


def coco_results(image_id: int, objects: ImageObjects, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO's result entries of an image: box as x, y, width, height; the mask's RLE counts as text.

    Args:
        image_id: the image's number in the annotations.
        category_ids: the number of each class there.
    """
    entries, boxes = [], coco_boxes(objects.boxes).tolist()
    for n, (box, number) in enumerate(zip(boxes, objects.classes.tolist(), strict=True)):
        entry = {"image_id": image_id, "category_id": category_ids[number], "bbox": box}
        if objects.scores is not None:
            entry["score"] = float(objects.scores[n])
        if objects.masks is not None:
            mask = objects.masks[n]
            entry["segmentation"] = {"size": list(map(int, mask["size"])), "counts": mask["counts"].decode("ascii")}
        entries.append(entry)
    return entries


def write_coco_results(path: Path, found: Iterable[tuple[int, ImageObjects]], category_ids: Sequence[int]) -> None:
    """Write a JSON list of result entries, which COCO's `loadRes` reads; `found` has image numbers and objects.

    Raises:
        UserError: if the file cannot be written.
    """
    entries = [entry for image_id, objects in found for entry in coco_results(image_id, objects, category_ids)]
    _write_json(path, entries)


@dataclass(frozen=True)
class SearchedImage:
    """An image, the picture of its objects, and these; `shown` are those in the picture."""

    name: str
    picture: Path
    objects: ImageObjects
    shown: ImageObjects

    def __str__(self) -> str:
        pairs = zip(self.shown.names, self.shown.scores, strict=True)
        return f"{self.name}: {listed([f'{n} {score:.2f}' for n, score in pairs], OBJECTS_SHOWN) or 'nothing'}"


def write_detections(
    model: DetectionModel, images: Photographs, out: Path, least_score: float, progress: Callable[[int, int], Any]
) -> list[SearchedImage]:
    """Find objects in images; write OUT/pictures, PNG files under the images' names, and OUT/detections.json.

    The JSON file has COCO's form of annotations: images, categories, and objects with their scores. Nothing is written
    if no image can be read.

    Args:
        least_score: of the objects in the pictures. The JSON file has all objects.

    Raises:
        UserError: if a file cannot be written, or two images would have one.
    """
    places, searched, listed, entries = places_of(images.all_names), [], [], []
    try:
        for name, rgb in images.pixels(model.reading, progress):
            objects = model.objects(rgb)
            file = out / "pictures" / places[name]
            file.parent.mkdir(parents=True, exist_ok=True)
            shown = objects.chosen(objects.scores >= least_score)
            zoom = -(-PICTURE_PIXELS // max(rgb.shape[:2]))  # names would hide the objects of a small picture
            large = rgb.repeat(zoom, axis=0).repeat(zoom, axis=1)
            Image.fromarray(objects_over(large, shown, model.classes)).save(file)
            searched.append(SearchedImage(name, file, objects, shown))
            listed.append({"id": len(searched), "file_name": name, "height": rgb.shape[0], "width": rgb.shape[1]})
            results = coco_results(len(searched), objects, model.category_ids)
            for entry, area in zip(results, _areas(objects), strict=True):
                entries.append({"id": len(entries) + 1, **entry, "area": area, "iscrowd": 0})
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another --out") from None
    if searched:
        numbered = zip(model.category_ids, model.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in numbered]
        _write_json(out / ANNOTATIONS, {"images": listed, "categories": categories, "annotations": entries})
    return searched


def _areas(objects: ImageObjects) -> list[float]:
    """The pixels of each object's mask, or of its box where there are no masks."""
    from pycocotools import mask as coco_masks

    if objects.masks:
        return coco_masks.area(objects.masks).astype(float).tolist()
    return (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1).tolist()


def detections_json(searched: Sequence[SearchedImage], unreadable: Sequence[tuple[str, str]]) -> str:
    """A list with an object for each image: its picture and what was found, or its error."""
    read = [
        {
            "image": one.name,
            "picture": str(one.picture),
            "objects": [
                {"class": name, "score": float(score), "box": box}
                for name, score, box in zip(
                    one.objects.names, one.objects.scores, one.objects.boxes.astype(float).tolist(), strict=True
                )
            ],
        }
        for one in searched
    ]
    return json.dumps([*read, *({"image": name, "error": reason} for name, reason in unreadable)], indent=2)


def _write_json(path: Path, content: Any) -> None:
    try:
        Folder.at(path.absolute().parent).publish(path.name, json.dumps(content).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
