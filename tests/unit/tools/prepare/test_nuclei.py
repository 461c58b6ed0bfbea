"""Crops of the nuclei's image: each pixel beside its mask, and no pixel on both sides of the split."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

from tools.prepare.nuclei import write_nuclei


def test_crops_keep_training_and_validation_apart(tmp_path) -> None:
    rows = np.arange(512, dtype=np.uint16)[:, None]
    image = np.broadcast_to(rows // 2, (512, 512))
    nuclei = np.where(np.arange(512) % 100 < 30, rows + 1, 0).astype(np.uint16)  # the number is the row's
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as package:
        for name, pixels in {"img2d": image, "mask2d": nuclei}.items():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "TIFF")
            package.writestr(f"stardist/data/images/{name}.tif", file.getvalue())
    train, validation = write_nuclei(tmp_path / "a.whl", tmp_path / "out")
    seen = {}
    for folder, count in ((train, 117), (validation, 4)):
        names = sorted(path.name for path in (folder / "images").iterdir())
        assert len(names) == count
        annotated = json.loads((folder / "annotations.json").read_text())
        assert [one["file_name"] for one in annotated["images"]] == names
        of = {one["id"]: (one["file_name"], set()) for one in annotated["images"]}
        for one in annotated["annotations"]:
            of[one["image_id"]][1].add(one["bbox"][1])  # each nucleus of this picture is a row
        assert {name: len(ys) for name, ys in of.values()} == dict.fromkeys(names, 128)
        seen[folder] = set()
        for name in names:
            crop, mask, instances = (
                np.asarray(Image.open(folder / kind / name)).astype(int) for kind in ("images", "masks", "instances")
            )
            assert crop.shape == (128, 128)
            np.testing.assert_array_equal(mask, instances > 0)
            np.testing.assert_array_equal(crop[mask > 0], (instances[mask > 0] - 1) // 2)
            seen[folder] |= set(instances[mask > 0].tolist())
    assert seen[train] == set(range(1, 385))
    assert seen[validation] == set(range(385, 513))
