"""The pixels of the grid of reconstructions, and curves of unusual journals."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.tracking.journal import Journal
from pipeline.tracking.pictures import (
    HIDDEN,
    draw_curves,
    draw_label_maps,
    draw_reconstruction,
    limit_single_value,
    overlay,
    palette,
)


def test_the_grid_shows_input_masked_and_painted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, *painted = rng.integers(0, 256, (3, 2, 3, 32, 32), dtype=np.uint8)
    mask = np.zeros((2, 16), dtype=bool)
    mask[0, 1] = mask[1, 4] = True  # row 0, column 1 and row 1, column 0 of 4 x 4 cells
    draw_reconstruction(images, mask, dict(zip("ab", painted, strict=True)), tmp_path / "new" / "grid.png")
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.text == {"columns": "4", "rows": "2"}
    sheet = np.asarray(picture)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]

    seen = images.copy()
    seen[0, :, :8, 8:16] = seen[1, :, 8:16, :8] = np.array(HIDDEN)[:, None, None]
    height, width = sheet.shape[0] - 2 * (128 + 6), (sheet.shape[1] - 6) // 4  # caption, one column
    for x, column in enumerate((images, seen, *painted)):
        for y, image in enumerate(column):
            top, left = height + y * (128 + 6), 6 + x * width
            shown = sheet[top : top + 128, left : left + 128]
            np.testing.assert_array_equal(shown[2::4, 2::4], image.transpose(1, 2, 0))
            np.testing.assert_array_equal(shown, shown[::4, ::4].repeat(4, axis=0).repeat(4, axis=1))
    assert (sheet[:height] < 128).any(), "no captions"


def test_large_images_keep_their_size(tmp_path: Path) -> None:
    images = np.zeros((1, 3, 224, 224), dtype=np.uint8)
    draw_reconstruction(images, np.ones((1, 49), dtype=bool), {"a": images}, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width == 3 * 230 + 6


def test_label_maps_lie_over_their_images(tmp_path: Path) -> None:
    """The truth of image 0 is its left half; the prediction is all class 2; a strip is ignored; sizes differ."""
    image = np.full((3, 128, 256), 100, dtype=np.uint8)
    image[0] = 160
    truth = np.zeros((64, 128), dtype=np.uint8)  # half the image's size
    truth[:, :64] = 1
    truth[:8] = 255
    predicted, small = np.full((64, 128), 2, np.uint8), np.full((3, 10, 40), 90, np.uint8)
    maps = [np.zeros((10, 40), np.uint8)] * 2
    draw_label_maps([image, small], [truth, maps[0]], [predicted, maps[1]], ["a", "b", "c", "d"], tmp_path / "grid.png")
    picture = Image.open(tmp_path / "grid.png")
    assert (picture.text["columns"], picture.text["rows"]) == ("3", "2")
    head, sheet, colours = int(picture.text["head"]), np.asarray(picture), palette(4)
    assert picture.text["heights"] == "128 64"
    assert len(sheet) == head + (128 + 6) + (64 + 6), "each row is as high as its own images"
    assert (sheet[head + 134 : head + 198, 6 : 6 + 256] == 90).all()
    shown = [sheet[head : head + 128, 6 + x * 262 :][:, :256] for x in range(3)]
    np.testing.assert_array_equal(shown[0], image.transpose(1, 2, 0))
    expected = {(100, 50): 1, (100, 200): 0}
    for (y, x), label in expected.items():
        np.testing.assert_array_equal(shown[1][y, x], np.rint(0.55 * colours[label] + 0.45 * image[:, y, x]))
    assert shown[1][5, 5].tolist() == [120, 120, 120]  # ignored: the mean of 160, 100, 100
    np.testing.assert_array_equal(shown[2], overlay(shown[0], np.full((128, 256), 2), colours))
    legend = sheet[: head - 22].reshape(-1, 3)
    named = [(legend == colour).all(axis=1).any() for colour in colours]
    assert named == [True, True, True, False]  # no pixel is of class d


def test_classes_have_colours_of_their_own() -> None:
    assert palette(0).shape == (0, 3)
    assert len(np.unique(palette(1000), axis=0)) == 1000
    np.testing.assert_array_equal(palette(150), palette(1000)[:150])


@pytest.mark.parametrize("loss", [1.0, 0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("lines", [0, 1, 60])
def test_curves_are_drawn_for_any_journal(tmp_path: Path, loss: float, lines: int) -> None:
    with Journal(tmp_path / "journal.jsonl", 1) as journal:
        journal.write("attempt", step=0)
        for step in range(lines):
            journal.write("step", step=step, loss=loss if step % 7 == 0 else 3.0 / (step + 1), lr=1e-3)
            journal.write("evaluate", step=step, metrics={"top1": step, "loss": None})
        journal.write("step", step="odd")
    draw_curves(tmp_path / "journal.jsonl", tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert picture.height > (700 if lines else 500)


@pytest.mark.parametrize(
    ("name", "values", "limits"),
    [("top1", [62.0], (0, 100)), ("loss", [0.6], (0, 1.2)), ("loss", [math.nan], None), ("miou", [30.0, 40.0], None)],
)
def test_an_axis_of_one_evaluation_begins_at_zero(name, values, limits) -> None:
    axis = Figure().subplots()
    axis.plot(range(len(values)), values)
    own = axis.get_ylim()
    limit_single_value(axis, name, values)
    assert axis.get_ylim() == (limits or own)


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"old")
    images = np.zeros((1, 3, 32, 32), dtype=np.float64)
    with pytest.raises(AssertionError, match="cells"):
        draw_reconstruction(images, np.ones((1, 7), dtype=bool), {}, tmp_path / "grid.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("grid.png", b"old")]
