"""Images and masks become label maps to the pixel; bad masks, folders and classes are named in a sentence each."""

import io
import json
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.data.beton import contents_of, open_beton, samples_of
from pipeline.data.label_maps import LabelMaps
from pipeline.data.maps_file import maps_path
from pipeline.errors import DataError
from tests.archives import encoded
from tests.label_map_folders import (
    ADE20K_CLASSES,
    ade20k_files,
    masked_files,
    png,
    shapes_on_photograph,
    write_ade20k_zip,
    write_files,
    write_masked_folder,
)
from tools.cli import app
from tools.prepare.class_values import class_values
from tools.prepare.encoding import Encoding
from tools.prepare.mask_pairs import MapOptions
from tools.prepare.masks import mask_pixels, turned_array
from tools.prepare.preparation import prepare_beton, prepare_targets
from tools.verify.beton_file import verify_beton

LABELS = np.random.default_rng(0).integers(0, 3, (8, 12)).astype(np.uint8)
GREY = Image.fromarray(LABELS)
PICTURE = encoded(Image.fromarray(np.repeat(LABELS[:, :, None] * 80, 3, 2)), "PNG")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(rows, bits, colour=0, size=(12, 8)):
    """A PNG of rows of packed bytes, in forms that Pillow does not write."""
    body = b"".join(b"\0" + bytes(row) for row in rows)
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def packed(bits):
    fields = ((LABELS[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1).reshape(8, -1)
    return raw_png(np.packbits(fields, axis=1), bits)


def with_channels(mode, alpha=255):
    channels = [GREY] * len(mode.removesuffix("A")) + [Image.new("L", GREY.size, alpha)]
    return encoded(Image.merge(mode, channels[: len(mode)]), "PNG")


def with_label(value, dtype=np.uint8):
    labels = LABELS.astype(dtype)
    labels[2, 5] = value
    return png(labels)


def several(kind):
    file = io.BytesIO()
    GREY.save(file, kind, save_all=True, append_images=[GREY.rotate(180)])
    return file.getvalue()


def with_orientation(image, orientation, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def palette():
    image = GREY.copy()
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200, 7, 7, 7])
    return encoded(image, "PNG", transparency=1)


BAD_MASKS = {
    "empty": (b"", "empty file"),
    "text": (b"class 1", "not an image"),
    "page": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "half": (png(LABELS)[:60], "truncated|broken|cannot|not enough"),
    "huge": (raw_png([], 8, size=(50000, 40000)), "may be a decompression bomb"),
    "jpeg": (encoded(GREY), "JPEG compression changes labels; save masks as PNG"),
    "webp": (encoded(GREY.convert("RGB"), "WEBP"), "WEBP compression changes labels"),
    "gif": (encoded(GREY, "GIF"), "a GIF file; save masks as PNG"),
    "small": (png(LABELS[:4]), "12 x 4 pixels, and its image has 12 x 8"),
    "turned": (png(LABELS.T), "8 x 12 pixels, and its image has 12 x 8"),
    "label 3": (with_label(3), "value 3 at row 2, column 5 has no class"),
    "label 254": (with_label(254), "value 254 at row 2, column 5 has no class"),
    "16 bits": (with_label(300, np.uint16), "value 300 at row 2, column 5 has no class"),
    "colours": (encoded(Image.merge("RGB", [GREY, GREY, Image.new("L", (12, 8))]), "PNG"), "a colour mask .*#rrggbb"),
    "transparent": (with_channels("RGBA", 0), "some of its pixels are transparent"),
    "translucent": (with_channels("LA", 254), "some of its pixels are transparent"),
    "numbers": (encoded(Image.fromarray(LABELS.astype(np.float32)), "TIFF"), "floating-point numbers"),
    "negative": (encoded(Image.fromarray(LABELS.astype(np.int32) - 1), "TIFF"), "values from -1 to 1"),
    "pages": (several("TIFF"), "2 pages; a mask has one"),
    "frames": (several("PNG"), "2 pages; a mask has one"),
    "inverted": (encoded(GREY, "TIFF", tiffinfo={262: 0}), "0 is white"),
    "jpeg in tiff": (encoded(GREY.resize((16, 16)), "TIFF", compression="jpeg"), "TIFF compression changes labels"),
    "deep colours": (raw_png(np.zeros((8, 72), np.uint8), 16, 2), "16 bits in each channel of mode RGB"),
}  # fmt: skip
BAD_FILES = {
    "no mask.png": "it has no mask (no mask.png)",
    "no image.png": "a mask without an image",
    "two masks.png": "two masks.png and two masks.tif are masks of one name",
    "two images.jpg": "two images.jpg and two images.png are images of one name",
    "two images.png": "two images.jpg and two images.png are images of one name",
    "folder.png": "mask folder.png: a folder, not a file",
    "dead link.png": "mask dead link.png: a link to nothing that can be read",
    "mirrored.png": "mask mirrored.png: its image has EXIF orientation 3, and the mask's size does not say whether",
    "broken image.png": "not an image",
}
GOOD_MASKS = {
    "grey": png(LABELS),
    "16 bits": png(LABELS.astype(np.uint16)),
    "2 bits": packed(2),
    "4 bits": packed(4),
    "palette": palette(),
    "RGB": with_channels("RGB"),
    "RGBA": with_channels("RGBA"),
    "LA": with_channels("LA"),
    "TIFF": encoded(GREY, "TIFF", compression="tiff_lzw"),
    "32 bits": encoded(Image.fromarray(LABELS.astype(np.int32)), "TIFF"),
    "BMP": encoded(GREY, "BMP"),
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """{name: why} of everything that the preparation of all bad masks left out."""
    place = tmp_path_factory.mktemp("bad")
    files = {"classes.txt": b"a\nb\nc\n", "images/good.png": PICTURE, "masks/good.png": png(LABELS)}
    files |= {f"images/{name}.png": PICTURE for name in BAD_MASKS}
    files |= {f"masks/{name}.png": mask for name, (mask, _) in BAD_MASKS.items()}
    files |= {f"images/{name}": PICTURE for name in BAD_FILES if name not in ("no image.png", "two images.jpg")}
    files |= {f"masks/{name}": png(LABELS) for name in BAD_FILES if name not in ("no mask.png", "two images.jpg")}
    files |= {"images/two images.jpg": encoded(GREY), "masks/two masks.tif": encoded(GREY, "TIFF")}
    files["images/mirrored.png"] = with_orientation(Image.open(io.BytesIO(PICTURE)), 3)
    files["images/broken image.png"] = b"broken"
    for name in ("folder.png", "dead link.png"):
        del files[f"masks/{name}"]
    write_files(place, files)
    (place / "masks/folder.png").mkdir()
    (place / "masks/dead link.png").symlink_to("nowhere")
    summary = prepare_beton(place, place / "a.beton", maps=MapOptions(), on_bad="skip")
    assert summary.beton.samples == 1
    with pytest.raises(DataError, match=r"32 bad images in .* and 29 more, listed in .*--on-bad skip"):
        prepare_beton(place, place / "b.beton", maps=MapOptions())
    lines = map(json.loads, summary.report.read_text().splitlines())
    return {line["name"]: line["why"] for line in lines if line["outcome"] == "left out"}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_bad_mask_is_named_with_its_reason(reported, name):
    assert re.fullmatch(rf"mask {name}\.png: .*({BAD_MASKS[name][1]}).*", reported[f"{name}.png"])
    assert "\n" not in reported[f"{name}.png"]


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_image_or_mask_without_the_other_is_named(reported, name):
    assert reported[name].startswith(BAD_FILES[name])


@pytest.mark.parametrize("name", GOOD_MASKS)
def test_labels_survive_in_every_exact_form(name):
    assert np.array_equal(mask_pixels(GOOD_MASKS[name])[0], LABELS)


def test_black_and_white_are_0_and_1():
    assert np.array_equal(
        mask_pixels(encoded(GREY.point(lambda value: 255 * (value > 0)).convert("1"), "PNG"))[0], LABELS > 0
    )


def test_ignored_values_have_no_class_in_any_form():
    ordered = class_values("classes.txt", b"sky\nignored\nroad\nignored\n")
    assert ordered.names == ("sky", "road")
    assert ordered == class_values("classes.txt", b"0 sky\n1 ignored\n2 road\n3 ignored\n")
    assert ordered.labels(np.array([[0, 1, 2, 3, 255]])).tolist() == [[0, 255, 1, 255, 255]]


def prepared(folder, **options):
    return prepare_beton(folder, folder / "a.beton", maps=MapOptions(**options), overwrite=True).beton


BASE = {"images/a.png": PICTURE, "masks/a.png": png(LABELS)}
BAD_FOLDERS = [
    ({}, {}, "holds no folders images and masks"),
    ({"images/a.png": PICTURE}, {}, "holds no folders images and masks"),
    ({**BASE, "labels/a.png": b""}, {}, "holds masks and labels; name one"),
    ({**BASE, "images/a.png": None, "images/a.txt": b""}, {}, "images holds no image files; name the folder of images"),
    ({**BASE, "masks/a.png": None, "masks/a.npy": b""}, {}, "masks holds no image files; name the folder of masks"),
    (BASE, {"masks": "nowhere"}, "masks .*nowhere are no folder"),
    ({"images/a.png": png(LABELS), "masks/a.jpg": encoded(GREY)}, {}, "are JPEGs, as .* name the folder of images"),
    ({"images/a.png": PICTURE, "masks/a_seg.png": b""}, {}, r"no mask .* give --mask-name '\{name\}_seg'"),
    ({"images/x/a.png": PICTURE, "masks/a.png": b""}, {}, "no mask .* give both the same sub-folders"),
    ({"images/a.png": PICTURE, "masks/b.png": b""}, {}, "no mask .* give each mask the name of its image"),
    (BASE, {"mask_name": "mask"}, r"--mask-name 'mask' must hold \{name\} once"),
    (BASE, {"classes": "nowhere.txt"}, "--classes .*nowhere.txt does not exist"),
    ({**BASE, "classes.txt": b""}, {}, "classes .*classes.txt are empty; write one class name"),
    ({**BASE, "classes.txt": b"\xff\xfe\xfa"}, {}, "are no text in UTF-8"),
    ({**BASE, "classes.txt": b"a\nb\na\n"}, {}, "line 3 of classes .* repeats 'a'"),
    ({**BASE, "classes.txt": b"0 a\nb\n"}, {}, "line 2 of classes .* has no value, and others have"),
    ({**BASE, "classes.txt": b"0 a\n0 b\n"}, {}, "line 2 of classes .* gives 0 a second class"),
    ({**BASE, "classes.txt": b"0 a\n#ff0000 b\n"}, {}, "both values and colours"),
    ({**BASE, "classes.txt": b"0 a\n70000 b\n"}, {}, "has value 70000, and masks hold 0 to 65535"),
    ({**BASE, "classes.txt": b"0 ignored\n"}, {}, "are 0; give 1 to 65,535"),
    ({**BASE, "classes.txt": b"a\n<b>\n"}, {}, "class '<b>' of .* has a name that"),
    ({**BASE, "classes.txt": b"a\nb\nc\n"}, {"ignore": (1,)}, "--ignore 1 is the value of class 'b'"),
    ({**BASE, "classes.txt": b"#000000 a\n"}, {"ignore": (1,)}, "--ignore 1 is a number, but the classes are colours"),
    ({**BASE, "objectInfo150.txt": b"Idx\tName\nx\twall\n"}, {}, "line 2 of classes .* has no Idx and Name"),
    ({**BASE, "masks/a.png": png(0 * LABELS)}, {}, "hold 0 alone, which is no two classes"),
    ({**BASE, "masks/a.png": png(50 * LABELS)}, {}, "hold the values 0, 50, 100, which are no class numbers"),
    ({**BASE, "masks/a.png": encoded(GREY)}, {}, "hold nothing alone"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "options", "says"), BAD_FOLDERS, ids=[case[2][:40] for case in BAD_FOLDERS])
def test_a_bad_folder_or_file_of_classes_is_refused_in_a_sentence(tmp_path, files, options, says):
    write_files(tmp_path, {name: content for name, content in files.items() if content is not None})
    source = tmp_path / "images" if "masks" in options else tmp_path
    paths = {name: str(tmp_path / options[name]) for name in ("masks", "classes") if name in options}
    with pytest.raises(DataError, match=says) as caught:
        prepare_beton(source, tmp_path / "a.beton", maps=MapOptions(**options | paths))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.beton").exists()


def test_maps_are_the_masks_and_frequencies_are_counted(tmp_path):
    write_masked_folder(tmp_path, 7)
    beton = prepared(tmp_path)
    maps, counts = LabelMaps.open(beton), np.zeros(256, int)
    for number in range(7):
        expected = np.asarray(Image.open(tmp_path / f"masks/{number:04d}.png"))
        assert np.array_equal(maps.map(number), expected)
        counts += np.bincount(expected.ravel(), minlength=256)
    assert beton.classes == ("background", "red", "green", "blue")
    assert beton.maps.frequencies == tuple(counts[:4].tolist())
    report = (tmp_path / "a.beton.report.jsonl").read_text().splitlines()
    assert json.loads(report[1])["why"].startswith(f"{counts[1]:,} pixels, ")
    assert verify_beton(beton.path, full=True)[1] == []


@pytest.mark.parametrize(
    ("values", "options", "classes", "labels"),
    [
        ([0, 255, 255], {}, ("0", "255"), [0, 1, 1]),
        ([0, 1, 255], {}, ("0", "1"), [0, 1, 255]),
        ([0, 2, 3], {"ignore": (0,)}, ("1", "2", "3"), [255, 1, 2]),
        ([0, 2, 255], {"text": "0 land\n2 sea\n255 sea\n"}, ("land", "sea"), [0, 1, 1]),
        ([7, 9, 1], {"text": "9 a\n7 b\n1 ignored\n"}, ("a", "b"), [1, 0, 255]),
        ([300, 0, 65535], {}, tuple(map(str, range(301))), [300, 0, 65535]),
    ],
    ids=["binary", "255 is ignored", "--ignore", "two values of one class", "any order", "16 bits"],
)  # fmt: skip
def test_values_become_classes(tmp_path, values, options, classes, labels):
    every = np.array(values)[LABELS % len(values)]
    if max(values) == 300 or values[0] == 300:  # enough classes must occur
        every[0], every[1], every[2], every[3] = (np.arange(n, n + 12) for n in (0, 12, 24, 36))
        every = np.concatenate([every, np.arange(48, 300).reshape(-1, 12)])
    mask = every.astype(np.uint8 if every.max() < 256 else np.uint16)
    picture = encoded(Image.new("RGB", mask.shape[::-1]), "PNG")
    files = {"images/a.png": picture, "masks/a.png": png(mask), "names.txt": options.get("text", "").encode()}
    write_files(tmp_path, files)
    given = {"classes": str(tmp_path / "names.txt")} if "text" in options else {}
    beton = prepared(tmp_path, ignore=options.get("ignore", ()), **given)
    assert beton.classes == classes
    found = LabelMaps.open(beton).map(0)
    for value, label in zip(values, labels, strict=True):
        assert (found[mask == value] == label).all()


def test_colours_become_classes(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 128], [9, 9, 9]], np.uint8)
    files = {**BASE, "masks/a.png": encoded(Image.fromarray(colours[LABELS]), "PNG")}
    write_files(tmp_path, {**files, "classes.txt": b"#000000 black\n#FF0080 pink\n#090909 ignored\n"})
    beton = prepared(tmp_path)
    assert np.array_equal(LabelMaps.open(beton).map(0), np.array([0, 1, 255])[LABELS])
    write_files(tmp_path, {"classes.txt": b"#000000 black\n#ff0080 pink\n"})
    with pytest.raises(DataError, match=r"mask a\.png: colour #090909 at row"):
        prepared(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn", ["upright", "as stored"])
def test_a_map_is_turned_as_its_image(tmp_path, orientation, drawn):
    """The image's pixels tell their labels, so the stored image must show the map."""
    picture = Image.fromarray(np.repeat(LABELS[:, :, None] * 80, 3, 2))
    mask = turned_array(LABELS, orientation) if drawn == "upright" else LABELS
    write_files(tmp_path, {"images/a.png": with_orientation(picture, orientation), "masks/a.png": png(mask)})
    if drawn == "as stored" and 1 < orientation <= 4:
        with pytest.raises(DataError, match=f"EXIF orientation {orientation}"):
            prepared(tmp_path)
        return
    beton = prepared(tmp_path, upright=drawn == "upright")
    image = samples_of(beton)["f0"][0]
    pixels = np.frombuffer(next(contents_of(beton, 1))[1], np.uint8).reshape(image["height"], image["width"], 3)
    assert np.array_equal(LabelMaps.open(beton).map(0), pixels[:, :, 0] // 80)


def test_a_map_shrinks_with_its_image(tmp_path):
    labels = np.zeros((60, 90), np.uint8)
    labels[:40, 45:], labels[40:] = 1, 2
    picture = Image.fromarray(np.repeat(labels[:, :, None] * 80, 3, 2))
    write_files(tmp_path, {"images/a.png": with_orientation(picture, 6), "masks/a.png": png(labels)})
    beton = prepare_beton(tmp_path, tmp_path / "a.beton", maps=MapOptions(), encoding=Encoding(max_side=30)).beton
    found = LabelMaps.open(beton).map(0)
    expected = np.zeros((30, 20), np.uint8)  # turned by 90 degrees, a third of the size
    expected[15:], expected[:, :7] = 1, 2
    assert (found.shape, (found != expected).mean() < 0.06) == ((30, 20), True)
    assert np.array_equal(np.delete(found, slice(6, 8), 1), np.delete(expected, slice(6, 8), 1))


def test_an_interruption_and_workers_change_no_byte(tmp_path):
    source = write_masked_folder(tmp_path / "source", 11)
    prepare_beton(source, tmp_path / "a.beton", maps=MapOptions(), part_samples=3)

    def stop(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    target = tmp_path / "b.beton"
    with pytest.raises(KeyboardInterrupt):
        prepare_beton(source, target, maps=MapOptions(), part_samples=3, progress=stop)
    assert not maps_path(target).exists()
    prepare_beton(source, target, maps=MapOptions(), part_samples=3, workers=2)
    for suffix in ("", ".maps", ".json"):
        assert (tmp_path / f"b.beton{suffix}").read_bytes() == (tmp_path / f"a.beton{suffix}").read_bytes()
    assert not (tmp_path / "b.beton.parts").exists()


def test_ade20ks_archive_is_two_files_of_150_classes(tmp_path):
    write_ade20k_zip(tmp_path / "ADEChallengeData2016.zip", 5, 2)
    write_files(tmp_path, ade20k_files(5, 2))
    command = ["prepare maps", str(tmp_path / "ADEChallengeData2016.zip"), str(tmp_path / "ade.beton")]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    assert "ade.beton is ready: 5 images of 150 classes" in answer.output
    train, validation = (open_beton(tmp_path / name) for name in ("ade.beton", "ade-val.beton"))
    assert (train.samples, validation.samples) == (5, 2)
    assert train.classes == validation.classes
    assert train.classes[:3] == ("wall", "building", "sky")
    assert train.class_descriptions["building"] == "building, edifice"
    for number in range(5):  # 1 to 150 become 0 to 149, and 0 is ignored
        labels = np.array(ADE20K_CLASSES)[shapes_on_photograph(number, len(ADE20K_CLASSES))[1]]
        labels[:, 0] = 0
        assert np.array_equal(LabelMaps.open(train).map(number), np.where(labels == 0, 255, labels - 1))
    unpacked = prepare_targets(tmp_path / "ADEChallengeData2016", tmp_path / "folder.beton", None, maps=MapOptions())
    assert [summary.beton.identity for summary in unpacked] == [train.identity, validation.identity]
    with pytest.raises(DataError, match="has a part for validation already; leave out --split"):
        prepare_targets(tmp_path / "ADEChallengeData2016", tmp_path / "b.beton", 0.5, maps=MapOptions())


def test_a_damaged_archive_is_named(tmp_path):
    path = write_ade20k_zip(tmp_path / "ade.zip", 3, 1)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("ADEChallengeData2016/annotations/training/ADE_train_00000002.png")
    damaged = bytearray(content)
    at = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    damaged[at] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"1 bad image .*mask training/ADE_train_00000002.png: cannot be read from its"):
        prepare_targets(path, tmp_path / "a.beton", None, maps=MapOptions())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"archive .*ade.zip cannot be read .*; copy it again"):
        prepare_targets(path, tmp_path / "a.beton", None, maps=MapOptions())


def test_verify_names_damaged_maps(tmp_path):
    write_files(tmp_path, masked_files(4))
    beton = prepared(tmp_path)
    content = bytearray(maps_path(beton.path).read_bytes())
    content[40] ^= 0xFF
    maps_path(beton.path).write_bytes(content)
    damage = verify_beton(beton.path)[1]
    assert len(damage) == 2
    assert "a.beton.maps is damaged (SHA-256); copy it again" in damage[0]
    assert damage[1].startswith("the label map of sample 0 in")


def test_images_for_tests_are_not_trained_on(tmp_path):
    names = [f"{kind}/{part}/{n}.png" for part in ("train", "test") for n in range(2) for kind in ("images", "masks")]
    write_files(tmp_path / "set", {name: PICTURE if name.startswith("images") else png(LABELS) for name in names})
    (summary,) = prepare_targets(tmp_path / "set", tmp_path / "a.beton", None, maps=MapOptions())
    assert summary.counts.pop(("ignored", "of the test part")) == 2
    assert summary.beton.samples == 2
