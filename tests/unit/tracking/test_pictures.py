"""The pixels of the grid of reconstructions, and curves of unusual journals."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.tracking.journal import Journal
from pipeline.tracking.pictures import HIDDEN, draw_curves, draw_reconstruction


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


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"old")
    images = np.zeros((1, 3, 32, 32), dtype=np.float64)
    with pytest.raises(AssertionError, match="cells"):
        draw_reconstruction(images, np.ones((1, 7), dtype=bool), {}, tmp_path / "grid.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("grid.png", b"old")]
