"""Damaged and unusual files among images are left out, re-encoded or kept, and the report names them."""

import gzip
import io
import json
import os
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from pipeline.data.beton import RAW, contents_of, open_beton
from pipeline.errors import DataError
from tests.archives import encoded, photograph
from tests.support import squashed_images
from tools.prepare import encoding
from tools.prepare.encoding import Encoding
from tools.prepare.image_files import opened_image
from tools.prepare.preparation import prepare_beton

PHOTO = photograph(3, 240)
JPEG = encoded(PHOTO, quality=85)
PROGRESSIVE = encoded(PHOTO, quality=85, progressive=True)
PNG = encoded(PHOTO, "PNG")
HALF_EXIF = Image.Exif()
HALF_EXIF[0x0112] = 6


def with_exif():
    return encoded(PHOTO, exif=HALF_EXIF)


def huge_png():
    """A header that promises 2 gigapixels."""
    start = b"IHDR" + struct.pack(">IIBBBBB", 50000, 40000, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + start + struct.pack(">I", zlib.crc32(start)) + PNG[33:]


def no_size():
    """A frame header with a height of 0."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + b"\0\0" + JPEG[at + 7 :]


def sixteen_bits():
    return encoded(Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)), "PNG")


def lost_table():
    """No quantisation table."""
    at = JPEG.index(b"\xff\xdb")
    length = struct.unpack(">H", JPEG[at + 2 : at + 4])[0]
    return JPEG[:at] + JPEG[at + 2 + length :].replace(b"\xff\xdb", b"\xff\xec")


def several(kind):
    file = io.BytesIO()
    PHOTO.save(file, kind, save_all=True, append_images=[PHOTO.rotate(180)])
    return file.getvalue()


LEFT_OUT = {
    "zero.jpg": (b"", "empty file"),
    "zeros.jpg": (bytes(5000), "not an image"),
    "text.jpg": (b"not an image", "not an image"),
    "error page.jpg": (b"<!DOCTYPE html><html>429 Too Many Requests</html>", "not an image"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "not an image"),
    "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "packed.jpg": (gzip.compress(JPEG), "not an image"),
    "start alone.jpg": (b"\xff\xd8", "not an image"),
    "start and noise.jpg": (b"\xff\xd8" + np.random.default_rng(0).bytes(4000), ""),
    "first byte.jpg": (b"\0" + JPEG[1:], "not an image"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "half progressive.jpg": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
    "header.jpg": (JPEG[:300], ""),
    "no size.jpg": (no_size(), ""),
    "no table.jpg": (lost_table(), ""),
    "half.png": (PNG[: len(PNG) // 2], "truncated"),
    "checksum.png": (PNG[:40] + b"x" + PNG[41:], ""),
    "bomb.png": (huge_png(), "admit them by --max-pixels, or with --max-side"),
    "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(400), ""),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a drawing, not pixels"),
    "folder.jpg": (None, "a folder, not a file"),
    "pipe.jpg": (None, "not a regular file"),
    "broken link.jpg": (None, "a link to nothing"),
    "circle.jpg": (None, "a link to nothing"),
}
STORED = {
    "png inside.JPEG": (PNG, "PNG of mode RGB"),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK")), "JPEG of mode CMYK"),
    "turned.jpg": (with_exif(), "encoded anew; turned upright (EXIF orientation 6)"),
    "junk in the end.jpg": (JPEG[:-2] + 10 * b"junk" + JPEG[-2:], "JPEG that decodes with a warning"),
    "alpha.png": (encoded(PHOTO.convert("RGBA"), "PNG"), "PNG of mode RGBA"),
    "palette.png": (encoded(PHOTO.convert("P"), "PNG"), "PNG of mode P"),
    "grey and alpha.png": (encoded(PHOTO.convert("LA"), "PNG"), "PNG of mode LA"),
    "bits.png": (encoded(PHOTO.convert("1"), "PNG"), "PNG of mode 1"),
    "deep.png": (sixteen_bits(), "64 to 65456 windowed to 8 bits (mode I;16)"),
    "gif.jpg": (several("GIF"), "page 1 of 2"),
    "bitmap.bmp": (encoded(PHOTO, "BMP"), "BMP of mode RGB"),
    "webp.jpg": (encoded(PHOTO, "WEBP"), "WEBP of mode RGB"),
    "pages.tif": (several("TIFF"), "TIFF of mode RGB; page 1 of 2"),
    "jpeg 2000.jpg": (encoded(PHOTO, "JPEG2000"), "JPEG2000 of mode RGB"),
    "long.png": (encoded(Image.new("RGB", (66000, 2)), "PNG"), "66000 x 2 pixels shrunk to 65500 x 2"),
}
KEPT = {"several.jpg": (several("MPO"), "page 1 of 2")}
PLAIN = {
    "grey.jpg": encoded(PHOTO.convert("L")),
    "progressive.jpg": PROGRESSIVE,
    "subsampled.jpg": encoded(PHOTO, subsampling=1),
    "UPPER.JPG": JPEG,
    "jpeg inside.png": JPEG,
    "trailer.jpg": JPEG + bytes(99),
    "one pixel.jpg": encoded(Image.new("RGB", (1, 1))),
    "bad exif.jpg": JPEG[:2] + b"\xff\xe1\0\x10Exif\0\0MM\0\x2a\xff\xff\xff\xff" + JPEG[2:],
}
IGNORED = ("notes.txt", ".DS_Store", "._a.jpg", "Thumbs.db")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("strange")
    source = directory / "source" / "class"
    source.mkdir(parents=True)
    for name, (content, _) in {**LEFT_OUT, **STORED, **KEPT}.items():
        if content is not None:
            (source / name).write_bytes(content)
    for name, content in PLAIN.items():
        (source / name).write_bytes(content)
    for name in IGNORED:
        (source / name).write_bytes(b"x")
    (source / "folder.jpg").mkdir()
    os.mkfifo(source / "pipe.jpg")
    (source / "broken link.jpg").symlink_to("nowhere.jpg")
    (source / "circle.jpg").symlink_to("circle.jpg")
    with pytest.raises(DataError, match=rf"{len(LEFT_OUT)} bad images in .* and {len(LEFT_OUT) - 3} more, listed in"):
        prepare_beton(directory / "source", directory / "a.beton")
    refused = (directory / "a.beton.report.jsonl").read_bytes()
    assert sorted(p.name for p in directory.iterdir()) == ["a.beton.parts", "a.beton.report.jsonl", "source"]
    summary = prepare_beton(directory / "source", directory / "a.beton", on_bad="skip")
    assert sorted(p.name for p in directory.iterdir()) == ["a.beton", "a.beton.json", "a.beton.report.jsonl", "source"]
    assert summary.report.read_bytes() == refused
    notes = [json.loads(line) for line in refused.splitlines()]
    return source, open_beton(directory / "a.beton"), {note["name"]: note for note in notes}


def test_there_are_enough_kinds():
    assert len(LEFT_OUT) >= 20
    assert len(LEFT_OUT) + len(STORED) + len(KEPT) >= 40


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out(prepared, name):
    note = prepared[2][f"class/{name}"]
    assert note["outcome"] == "left out"
    assert LEFT_OUT[name][1] in note["why"]
    assert note["why"]
    assert "\n" not in note["why"]


@pytest.mark.parametrize("name", [*STORED, *KEPT])
def test_what_is_encoded_anew_or_strange(prepared, name):
    note = prepared[2][f"class/{name}"]
    assert note["outcome"] == "stored"
    assert {**STORED, **KEPT}[name][1] in note["why"]


def test_what_is_kept_without_a_word(prepared):
    notes = prepared[2]
    assert {name for name, note in notes.items() if note["outcome"] == "ignored"} == {f"class/{n}" for n in IGNORED}
    assert len(notes) == len(LEFT_OUT) + len(STORED) + len(KEPT) + len(IGNORED)


def shown(image, name):
    """The pixels that a viewer shows."""
    if name == "deep.png":
        scaled = (np.asarray(image).astype(float) - 64) / (65456 - 64) * 255
        image = Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("RGB")


def compare_all(source, beton, whys, reference):
    """Evaluation squashes images to 64 pixels without loss, except for those that were re-encoded."""
    pixels = squashed_images(beton, 64)
    names = [n for n in sorted(os.listdir(source)) if n in PLAIN or n in STORED or n in KEPT]
    assert len(names) == len(pixels) == beton.samples
    for name, image in zip(names, pixels, strict=True):
        with Image.open(source / name) as original:
            rgb = reference(original, name)
        if name == "long.png":
            continue
        expected = np.asarray(rgb.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(image - expected)
        if "encoded anew" in whys.get(name, ""):
            assert difference.mean() < 12 if name == "bits.png" else difference.mean() < 4, name
        else:
            assert difference.max() == 0, name


def test_all_pixels_are_those_that_are_shown(prepared):
    source, beton, notes = prepared
    compare_all(source, beton, {name.rpartition("/")[2]: note["why"] for name, note in notes.items()}, shown)


def test_images_of_imagenet_have_the_pixels_of_torchvisions_loader(prepared, tmp_path):
    """Classes that are WordNet ids mean ImageNet: orientation, transparency and depth are as its published numbers."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n01440764").symlink_to(prepared[0])
    summary = prepare_beton(tmp_path / "images", tmp_path / "a.beton", on_bad="skip")
    assert summary.beton.settings == {
        "source": "folder", "max_side": None, "quality": 90, "raw_fraction": 0.0, "pillow": PIL.__version__,
    }  # fmt: skip
    whys = {n["name"].rpartition("/")[2]: n["why"] for n in map(json.loads, summary.report.read_text().splitlines())}
    compare_all(prepared[0], summary.beton, whys, lambda image, name: image.convert("RGB"))
    assert whys["turned.jpg"] == "its EXIF orientation is ignored"
    assert "cut to 8 bits" in whys["deep.png"]
    assert with_exif() in {bytes(content) for _, content in contents_of(summary.beton, 0)}


def test_kept_bytes(prepared):
    stored = {bytes(content) for _, content in contents_of(prepared[1], 0)}
    assert {*PLAIN.values(), several("MPO")} <= stored


def test_sizes_qualities_and_pixels(tmp_path):
    source = tmp_path / "source" / "class"
    source.mkdir(parents=True)
    for number in range(40):
        (source / f"{number:02d}.jpg").write_bytes(encoded(photograph(number, 200)))
    prepare_beton(tmp_path / "source", tmp_path / "a.beton", encoding=Encoding(max_side=150))
    beton = open_beton(tmp_path / "a.beton")
    assert max(beton.max_height, beton.max_width) == 150
    assert beton.settings["max_side"] == 150
    prepare_beton(tmp_path / "source", tmp_path / "b.beton", encoding=Encoding(raw_fraction=0.5))
    beton = open_beton(tmp_path / "b.beton")
    assert 8 <= beton.raw_samples <= 32
    number, content = next(iter(contents_of(beton, RAW)))
    with Image.open(source / f"{number:02d}.jpg") as image:
        assert content == np.asarray(image).tobytes()


def test_what_does_not_fit_a_page_is_shrunk(monkeypatch):
    page = 20_000
    monkeypatch.setattr(encoding, "PAGE_BYTES", page)
    noise = Image.effect_noise((300, 250), 200).convert("RGB")
    for kind, why in (("PNG", "PNG of mode RGB"), ("JPEG", "bytes")):
        (stored,) = encoding.encode(encoded(noise, kind), "a", Encoding())
        assert len(stored.content) <= page
        assert max(stored.height, stored.width) < 300
        note = "; ".join(map(str, stored.changes))
        assert why in note
        assert note.endswith(f"shrunk to {stored.width} x {stored.height} to fit a page")
        with Image.open(io.BytesIO(stored.content)) as image:
            assert image.size == (stored.width, stored.height)
    assert encoding.encode(encoded(photograph(1, 64)), "a", Encoding(raw_fraction=1.0))[0].mode == RAW
    assert encoding.encode(encoded(noise, quality=50), "a", Encoding(raw_fraction=1.0))[0].mode == 0


def test_without_libturbojpeg_jpegs_are_kept_with_a_note(monkeypatch):
    monkeypatch.setattr(encoding, "has_turbojpeg", lambda: False)
    monkeypatch.setattr(encoding, "jpeg_status", None)
    content = encoded(photograph(1))
    (stored,) = encoding.encode(content, "a", Encoding())
    assert stored.content == content
    assert [change.kind for change in stored.changes] == ["kept unchecked"]
    assert "truncated" in encoding.encode(content[:-900], "a", Encoding())


def test_pillows_limit_and_pythons_warnings_are_those_of_before(monkeypatch):
    """As threads do: one image is opened before, and closed after, another one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    filters = list(warnings.filters)
    large, small = (encoded(Image.new("RGB", size), "PNG") for size in ((64, 48), (8, 8)))
    first, second = opened_image(large), opened_image(large)
    assert first.__enter__().size == (64, 48)
    assert second.__enter__().size == (64, 48)
    for opened in (first, second):
        opened.__exit__(None, None, None)
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (100, filters)
    with opened_image(small):
        assert Image.MAX_IMAGE_PIXELS == 100
