"""Pictures of objects: masks are tinted, boxes have their class's colour, and crowded scenes stay readable."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_masks

from pipeline.data.batch import Batch
from pipeline.data.image_objects import ImageObjects
from pipeline.objectives.objective import ObjectOverlays
from pipeline.tracking.object_pictures import TINT, draw_detections, objects_over
from pipeline.tracking.pictures import HIDDEN, palette
from pipeline.training.painting import Painter

NAMES = ["a", "b", "c"]


def rle(mask: np.ndarray) -> dict:
    return coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))


def scene(boxes, classes, size=(64, 96), **others) -> ImageObjects:
    masks = []
    for x1, y1, x2, y2 in boxes:
        mask = np.zeros(size, bool)
        mask[y1:y2, x1:x2] = True
        masks.append(rle(mask))
    return ImageObjects(
        size, np.array(boxes, np.float64).reshape(-1, 4), np.array(classes, np.int64), None, masks
    )._replace(**others)


def test_masks_are_tinted_inside_and_boxes_have_the_colour() -> None:
    image = np.full((128, 192, 3), 100, np.uint8)  # twice the size in which the objects are given
    objects = scene([(10, 20, 40, 50)], [1], scores=np.array([0.9]))
    drawn, colour = objects_over(image, objects, NAMES), palette(3)[1]
    np.testing.assert_array_equal(drawn[70, 40], np.rint(TINT * colour + (1 - TINT) * 100))
    for y, x in ((60, 20), (60, 79), (99, 50)):  # edges
        np.testing.assert_array_equal(drawn[y, x], colour)
    np.testing.assert_array_equal(drawn[110:], image[110:])
    assert (drawn[30:40, 20:60] != 100).any(), "its name is above"
    without = objects_over(image, objects._replace(masks=None), NAMES)
    np.testing.assert_array_equal(without[70, 40], image[70, 40])
    crowd = objects_over(image, objects._replace(crowd=np.array([True])), NAMES)
    np.testing.assert_array_equal(crowd[99, 50], HIDDEN)


def test_small_objects_lie_over_large_ones_whatever_their_order() -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    boxes, classes, scores = [(5, 15, 60, 60), (20, 30, 40, 50)], [0, 2], np.array([0.5, 0.6])
    drawn = objects_over(image, scene(boxes, classes, scores=scores), NAMES)
    np.testing.assert_array_equal(drawn[45, 20], palette(3)[2])
    again = objects_over(image, scene(boxes[::-1], classes[::-1], scores=scores[::-1]), NAMES)
    np.testing.assert_array_equal(drawn, again)


def test_names_in_a_crowd_leave_the_small_objects_visible() -> None:
    """Of 300 tiny objects, whose names would be wider than they are, none has a name."""
    rng, image = np.random.default_rng(0), np.full((240, 320, 3), 255, np.uint8)
    corners = rng.integers(0, (300, 220), (300, 2))
    boxes = np.concatenate([corners, corners + 6], 1)
    objects = ImageObjects((240, 320), boxes, np.zeros(300, np.int64), np.linspace(0, 1, 300))
    drawn = objects_over(image, objects, ["a long name of a class"])
    for x1, y1, x2, y2 in boxes[-5:]:
        assert (drawn[y1:y2, x1:x2] == palette(1)[0]).all(-1).sum() >= 20
    assert (drawn == 255).mean() > 0.5
    one = objects_over(image, objects.chosen(np.array([0])), ["a long name of a class"])
    assert (one != 255).any(-1).sum() > 24, "a single small object has a name"


def test_the_grid_shows_truth_beside_prediction(tmp_path) -> None:
    """Unsure detections are left out, an image without objects is shown, and the bytes are the same again."""
    image = np.full((3, 64, 96), 80, np.uint8)
    truth = scene([(10, 20, 40, 50)], [1])
    prediction = scene([(50, 20, 90, 50), (0, 0, 20, 20)], [2, 0], scores=np.array([0.9, 0.05]))
    empty = scene([], [])
    arguments = [image, image], [truth, empty], [prediction, empty._replace(scores=np.zeros(0))], NAMES
    for name in ("one", "two"):
        draw_detections(*arguments, tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = Image.open(tmp_path / "one.png")
    head, sheet = int(picture.text["head"]), np.asarray(picture)
    assert (picture.text["columns"], picture.text["rows"]) == ("3", "2")
    wide, high = (picture.width - 6) // 3 - 6, (picture.height - head) // 2 - 6
    cells = [sheet[head : head + high, 6 + x * (wide + 6) :][:, :wide] for x in range(3)]
    assert (cells[0] == 80).all()
    for cell, (y, x), number in ((cells[1], (49, 20), 1), (cells[2], (49, 70), 2)):
        np.testing.assert_array_equal(cell[(y + 1) * wide // 96 - 1, x * wide // 96], palette(3)[number])
    assert (cells[2][: high // 4, : wide // 4] == 80).all(), "a score of 0.05 is not shown"
    second = sheet[head + high + 6 :, 6:]
    assert (second[:high, wide + 6 :][:, :wide] == 80).all()


def test_the_painter_draws_objects(tmp_path) -> None:
    image = np.full((3, 64, 96), 80, np.uint8)
    truth = scene([(10, 20, 40, 50)], [1])
    painted = iter([ObjectOverlays([], [], []), ObjectOverlays([image], [truth], [truth])])
    painter = Painter(SimpleNamespace(paint=lambda model, batch: next(painted)), 2)
    batch = Batch(*(torch.zeros(1),) * 3, epoch=0, slots=(), valid=torch.ones(1, dtype=torch.bool))
    painter(None, batch)
    painter(None, batch)
    assert painter.draw(tmp_path / "new" / "grid.png", NAMES)
    draw_detections([image], [truth], [truth], NAMES, tmp_path / "grid.png")
    assert (tmp_path / "new" / "grid.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
