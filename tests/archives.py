"""ImageNet's layouts, rebuilt small from real photographs (those that scikit-image ships)."""

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "ihc.png")
WNIDS = ("n01440764", "n01443537", "n02085620", "n04399382")
WORDS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "Chihuahua", "teddy, teddy bear")


@cache
def _pictures() -> list[Image.Image]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in PICTURES]


def photograph(number: int, largest: int = 96) -> Image.Image:
    """A crop of a photograph: each number another place, scale and shape."""
    numbers, source = np.random.default_rng(number), _pictures()[number % len(PICTURES)]
    width, height = (int(side * numbers.uniform(0.3, 0.9)) for side in source.size)
    left, top = numbers.integers(source.width - width + 1), numbers.integers(source.height - height + 1)
    crop = source.crop((left, top, left + width, top + height))
    crop.thumbnail((largest, largest))
    return crop


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def class_images(count: int, wnids: tuple[str, ...] = WNIDS, start: int = 0) -> dict[str, dict[str, bytes]]:
    """{class: {file name: JPEG}}, `count` of each class."""
    return {
        wnid: {
            f"{wnid}_{number}.JPEG": encoded(photograph(start + 1000 * label + number), quality=85)
            for number in range(count)
        }
        for label, wnid in enumerate(wnids)
    }


def tar(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_folder(directory: Path, images: Mapping[str, Mapping[str, bytes]]) -> Path:
    for wnid, files in images.items():
        (directory / wnid).mkdir(parents=True)
        for name, content in files.items():
            (directory / wnid / name).write_bytes(content)
    return directory


def train_tar(images: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """As ILSVRC2012_img_train.tar: an archive of archives, whose order is not the classes'."""
    return tar({f"{wnid}.tar": tar(images[wnid]) for wnid in reversed(images)})


def validation(count: int, start: int = 10**6) -> tuple[bytes, list[int]]:
    """As ILSVRC2012_img_val.tar, and each image's ILSVRC2012_ID; the classes' IDs are 1, 2, ... in another order."""
    ids = [3, 1, 4, 2]
    members = {
        f"ILSVRC2012_val_{number + 1:08d}.JPEG": encoded(photograph(start + number), quality=85)
        for number in range(count)
    }
    return tar(members), [ids[number * 7 % 4] for number in range(count)]


def meta_mat(compressed: bool = True) -> bytes:
    """As the devkit's meta.mat: leaves with the IDs 3, 1, 4, 2 for WNIDS, and a node above them."""
    import scipy.io

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((5, 1), [(name, "O") for name in fields])
    rows = [
        (wnid_id, wnid, words, "a gloss", 0, np.zeros((1, 0)), 0)
        for wnid_id, wnid, words in zip([3, 1, 4, 2], WNIDS, WORDS, strict=True)
    ]
    rows.append((1005, "n00001740", "entity", "being", 4, np.array([[1, 2, 3, 4]], np.uint16), 5))
    for row, values in enumerate(rows):
        synsets[row, 0] = tuple(float(v) if isinstance(v, int) else v for v in values)
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": synsets}, do_compression=compressed)
    return file.getvalue()


def devkit(ids: list[int]) -> bytes:
    """As ILSVRC2012_devkit_t12.tar.gz."""
    import gzip

    folder = "ILSVRC2012_devkit_t12"
    truth = "".join(f"{number}\n" for number in ids).encode()
    return gzip.compress(
        tar(
            {
                f"{folder}/readme.txt": b"read me",
                f"{folder}/data/meta.mat": meta_mat(),
                f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": truth,
            }
        )
    )
