"""Every mode, depth, format and orientation that Pillow opens gives stated pixels, a note, or a refusal."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, ImageCms

from pipeline.errors import DataError
from tools.prepare.image_pixels import AS_LOADER, ReadingSettings, pixels_of
from tools.prepare.image_source import ByteRanges, Item
from tools.prepare.survey import survey_images

HEIGHT, WIDTH = 6, 8
RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
BITS = np.where(GREY > 127, 255, 0).astype(np.uint8)
ALPHA = np.resize(np.array([0, 51, 128, 255], np.uint8), (HEIGHT, WIDTH))
SIXTEEN = RANDOM.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
FLOATS = RANDOM.normal(0, 1, (HEIGHT, WIDTH)).astype(np.float32)
LOW, HIGH = 1000, 50000
WINDOW = ReadingSettings(window=(LOW, HIGH))


def rgb(grey):
    return np.repeat(grey[..., None], 3, 2)


def on(ground, colours, alpha=ALPHA):
    """The stated reference: colours over a ground, rounded to the nearest."""
    share = alpha[..., None].astype(float) / 255
    return np.floor(colours * share + np.array(ground) * (1 - share) + 0.5).astype(np.uint8)


def windowed(values, low=LOW, high=HIGH):
    scaled = (values.astype(np.float64) - low) / (high - low) * 255
    return rgb(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))


def image(mode, array):
    return Image.frombytes(mode, (WIDTH, HEIGHT), np.ascontiguousarray(array).tobytes())


def with_alpha(array):
    return np.concatenate([array.reshape(HEIGHT, WIDTH, -1), ALPHA[..., None]], 2)


PALETTE = Image.fromarray(COLOUR).quantize(16)
CMYK = with_alpha(COLOUR)
TABLE = {  # mode: an image of it, its pixels, the kinds of its notes
    "1": (Image.fromarray(BITS).convert("1"), rgb(BITS), []),
    "L": (Image.fromarray(GREY), rgb(GREY), []),
    "LA": (image("LA", with_alpha(GREY)), on(255, rgb(GREY)), ["composited on white"]),
    "La": (image("LA", with_alpha(rgb(GREY)[..., :1])).convert("La"), None, ["composited on white"]),
    "P": (PALETTE, np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(PALETTE)], []),
    "PA": (Image.merge("RGBA", (*PALETTE.convert("RGB").split(), Image.fromarray(ALPHA))).convert("PA"), None,
           ["composited on white"]),
    "RGB": (Image.fromarray(COLOUR), COLOUR, []),
    "RGBA": (image("RGBA", with_alpha(COLOUR)), on(255, COLOUR), ["composited on white"]),
    "RGBa": (image("RGBA", with_alpha(COLOUR)).convert("RGBa"), None, ["composited on white"]),
    "RGBX": (image("RGBX", with_alpha(COLOUR)), COLOUR, []),
    "CMYK": (image("CMYK", CMYK), np.asarray(image("CMYK", CMYK).convert("RGB")), ["converted from CMYK"]),
    "YCbCr": (image("YCbCr", COLOUR), np.asarray(image("YCbCr", COLOUR).convert("RGB")), ["converted from YCbCr"]),
    "HSV": (image("HSV", COLOUR), np.asarray(image("HSV", COLOUR).convert("RGB")), ["converted from HSV"]),
    "LAB": (image("LAB", COLOUR), np.asarray(image("LAB", COLOUR).convert("RGB")), ["converted from LAB"]),
    "I": (Image.fromarray(SIXTEEN.astype(np.int32)), windowed(SIXTEEN), ["windowed to 8 bits"]),
    "I;16": (Image.fromarray(SIXTEEN), windowed(SIXTEEN), ["windowed to 8 bits"]),
    "I;16L": (image("I;16L", SIXTEEN.astype("<u2")), windowed(SIXTEEN), ["windowed to 8 bits"]),
    "I;16B": (image("I;16B", SIXTEEN.astype(">u2")), windowed(SIXTEEN), ["windowed to 8 bits"]),
    "I;16N": (image("I;16N", SIXTEEN), windowed(SIXTEEN), ["windowed to 8 bits"]),
    "F": (Image.fromarray(SIXTEEN.astype(np.float32)), windowed(SIXTEEN), ["windowed to 8 bits"]),
}  # fmt: skip
TABLE["La"] = (TABLE["La"][0], on(255, np.asarray(TABLE["La"][0].convert("LA"))[..., :1]), TABLE["La"][2])
TABLE["PA"] = (TABLE["PA"][0], on(255, np.asarray(TABLE["PA"][0].convert("RGBA"))[..., :3],
                                  np.asarray(TABLE["PA"][0].convert("RGBA"))[..., 3]), TABLE["PA"][2])  # fmt: skip
TABLE["RGBa"] = (TABLE["RGBa"][0], on(255, np.asarray(TABLE["RGBa"][0].convert("RGBA"))[..., :3]), TABLE["RGBa"][2])


def test_the_table_has_every_mode():
    assert set(TABLE) == set(Image.MODES)


def test_the_documentation_has_every_mode_and_note():
    """Each mode stands in the table of docs/unusual-images.md, and so does each kind of note that the modes give."""
    page = (Path(__file__).resolve().parents[4] / "docs" / "unusual-images.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("|")]
    missing = [mode for mode in TABLE if not any(re.search(rf"(^|[ ,]){re.escape(mode)}[ ,:]", row) for row in rows)]
    assert missing == []
    kinds = {kind for _, _, kinds in TABLE.values() for kind in kinds if not kind.startswith("converted from")}
    assert {kind for kind in kinds if kind not in page} == set()


@pytest.mark.parametrize("mode", TABLE)
def test_the_pixels_of_every_mode(mode):
    original, expected, kinds = TABLE[mode]
    pixels, changes = pixels_of(original, WINDOW)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, pixels.shape))
    assert [change.kind for change in changes] == kinds


@pytest.mark.parametrize("mode", [mode for mode in TABLE if mode != "La"])
def test_torchvisions_reading_is_pillows(mode):
    pixels, changes = pixels_of(TABLE[mode][0], AS_LOADER)
    np.testing.assert_array_equal(pixels, np.asarray(TABLE[mode][0].convert("RGB")))
    assert bool(changes) == bool(TABLE[mode][2]), "what differs from what is shown is noted"


TURNS = {  # EXIF orientation: what shows the stored pixels upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
FORMATS = {  # format: options of a lossless file, or None where there is none
    "PNG": {}, "TIFF": {}, "BMP": {}, "GIF": {}, "WEBP": {"lossless": True, "exact": True}, "PPM": {}, "TGA": {},
    "JPEG2000": {}, "QOI": {}, "SGI": {}, "PCX": {}, "ICO": None, "DDS": {}, "JPEG": None, "AVIF": None, "IM": {},
    "MPO": None, "SPIDER": None, "DIB": {}, "MSP": {},
}  # fmt: skip
TAKING_EXIF = ("PNG", "TIFF", "WEBP", "JPEG", "AVIF", "MPO")


def saved(original, kind, orientation):
    """The file, or None if the format cannot hold this mode."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    options = {"exif": exif} if orientation != 1 else {}
    try:
        original.save(file, kind, **options, **(FORMATS[kind] or {}))
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def cells():
    for kind in FORMATS:
        for mode in TABLE:
            for orientation in TURNS if kind in TAKING_EXIF else (1,):
                yield kind, mode, orientation


def test_no_mode_format_and_orientation_changes_an_image_silently():
    """Each cell is the stated pixels, or is noted, or cannot be read at all."""
    counts = {"equal": 0, "noted": 0, "refused": 0, "not of this format": 0}
    for kind, mode, orientation in cells():
        original, expected, _ = TABLE[mode]
        content = saved(original, kind, orientation)
        if content is None:
            counts["not of this format"] += 1
            continue
        upright = TURNS[orientation](np.broadcast_to(expected, (HEIGHT, WIDTH, 3)))
        try:
            with Image.open(io.BytesIO(content)) as opened:
                pixels, changes = pixels_of(opened, WINDOW)
        except (OSError, DataError):
            counts["refused"] += 1
            continue
        kinds = {change.kind for change in changes}
        if orientation != 1:
            assert "turned upright" in kinds, (kind, mode, orientation)
        assert pixels.shape == upright.shape, (kind, mode, orientation)
        if FORMATS[kind] is None:
            continue  # lossy: the file holds other pixels itself
        equal = np.array_equal(pixels, upright)
        noted = kinds & {"windowed to 8 bits", "composited on white", "reduced to 8 bits"} or "converted" in str(kinds)
        # Pillow's writers themselves reduce some modes; the file's own pixels are the reference then.
        with Image.open(io.BytesIO(content)) as opened:
            shown = TURNS[orientation if kind != "TIFF" else 1](np.asarray(opened.convert("RGB")))
        assert equal or noted or np.array_equal(pixels, shown), (kind, mode, orientation)
        counts["equal" if equal else "noted"] += 1
    assert counts["equal"] > 100, counts


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation(kind, orientation):
    content = saved(Image.fromarray(COLOUR), kind, orientation)
    pixels, changes = pixels_of(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(pixels, TURNS[orientation](COLOUR))
    assert [c.kind for c in changes] == (["turned upright"] if orientation != 1 else [])
    if kind == "PNG":
        pixels, changes = pixels_of(Image.open(io.BytesIO(content)), ReadingSettings(upright=False))
        np.testing.assert_array_equal(pixels, COLOUR)
        assert [c.kind for c in changes] == (["EXIF orientation ignored"] if orientation != 1 else [])


@pytest.mark.parametrize(("ground", "colour"), [("black", (0, 0, 0)), ("#102030", (16, 32, 48))])
def test_another_ground(ground, colour):
    pixels, changes = pixels_of(TABLE["RGBA"][0], ReadingSettings(ground=ground))
    np.testing.assert_array_equal(pixels, on(colour, COLOUR))
    assert str(changes[0]) == f"composited on {ground}"


def test_transparency_that_is_dropped_or_absent():
    pixels, (change,) = pixels_of(TABLE["RGBA"][0], ReadingSettings(ground=None))
    np.testing.assert_array_equal(pixels, COLOUR)
    assert change.kind == "transparency ignored"
    opaque = Image.fromarray(COLOUR).convert("RGBA")
    assert pixels_of(opaque)[1] == ()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_one_transparent_colour(mode):
    original = TABLE[mode][0]
    first = original.getpixel((0, 0))
    file = io.BytesIO()
    original.save(file, "PNG", transparency=first)
    pixels, changes = pixels_of(Image.open(io.BytesIO(file.getvalue())), WINDOW)
    same = np.array([[original.getpixel((x, y)) == first for x in range(WIDTH)] for y in range(HEIGHT)])
    np.testing.assert_array_equal(pixels, np.where(same[..., None], 255, TABLE[mode][1]))
    assert "composited on white" in [change.kind for change in changes]


def sixteen_bit_png(colour_type, channels, transparent=None):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    values = RANDOM.integers(0, 65536, (HEIGHT, WIDTH, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
    key = chunk(b"tRNS", values[0, 0].tobytes()) if transparent else b""
    body = chunk(b"IHDR", head) + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return values, b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("kind", "channels", "key"), [(2, 3, False), (2, 3, True), (4, 2, False), (6, 4, False)])
def test_colours_of_sixteen_bits_keep_their_upper_eight_and_say_so(kind, channels, key):
    values, content = sixteen_bit_png(kind, channels, key)
    pixels, changes = pixels_of(Image.open(io.BytesIO(content)), ReadingSettings(ground=None))
    colours = values[..., :1] if channels == 2 else values[..., :3]
    np.testing.assert_array_equal(pixels, np.broadcast_to(colours >> 8, (HEIGHT, WIDTH, 3)))
    kinds = {change.kind for change in changes}
    assert kinds == {"reduced to 8 bits"} | ({"transparency ignored"} if key or channels % 2 == 0 else set())


def test_images_of_more_than_eight_bits_need_a_window():
    for mode in ("I", "I;16", "F"):
        with pytest.raises(DataError, match=r"more than 8 bits; .* --window LOW HIGH"):
            pixels_of(TABLE[mode][0])
    for window in ((1, 1), (2, 1), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(DataError, match="give LOW below HIGH"):
            ReadingSettings(window=window)


def twelve_bit_files():
    """(values, files that hold them): TIFF, PGM in both forms, and JPEG 2000."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    tiff, coded = io.BytesIO(), io.BytesIO()
    Image.fromarray(values).save(tiff, "TIFF")
    # Pillow writes 16 bits. The field of the depth says 12 then, by which the level in the middle moves down.
    Image.fromarray(values + (2**15 - 2**11)).save(coded, "JPEG2000", no_jp2=True)
    codestream = bytearray(coded.getvalue())
    codestream[codestream.index(b"\xff\x4f\xff\x51") + 42] = 12 - 1
    plain = " ".join(map(str, values.ravel())).encode()
    files = {
        "tif": tiff.getvalue(), "pgm": b"P5 64 64 4095\n" + values.astype(">u2").tobytes(),
        "plain.pgm": b"P2 64 64 4095\n" + plain, "j2k": bytes(codestream),
    }  # fmt: skip
    return values, files


def test_a_window_is_of_the_values_in_the_file(tmp_path):
    """Pillow spreads 12 bits of PGM and JPEG 2000 over 16."""
    values, files = twelve_bit_files()
    for name, content in files.items():
        pixels, _ = pixels_of(Image.open(io.BytesIO(content)), ReadingSettings(window=(1000, 3000)))
        np.testing.assert_array_equal(pixels, windowed(values, 1000, 3000), err_msg=name)
        items = [Item(name, 0, (str(tmp_path / name), 0, None))]
        (tmp_path / name).write_bytes(content)
        assert survey_images(items, ByteRanges(LocalFileSystem()), ReadingSettings()).window == (4, 4091), name


def test_numbers_that_are_none_are_black_and_counted():
    odd = FLOATS.copy()
    odd[0, :3] = np.nan, np.inf, -np.inf
    pixels, changes = pixels_of(Image.fromarray(odd), ReadingSettings(window=(-2, 2)))
    np.testing.assert_array_equal(pixels, windowed(np.where(np.isfinite(odd), odd, -2), -2, 2))
    assert "3 pixels that are no numbers stored as black" in map(str, changes)


def tiff_with(original, tag, value):
    """A TIFF whose tag, a short number that Pillow writes, has another value."""
    file = io.BytesIO()
    original.save(file, "TIFF")
    content = bytearray(file.getvalue())
    at = content.index(struct.pack("<HHI", tag, 3, 1))
    content[at + 8 : at + 10] = struct.pack("<H", value)
    return Image.open(io.BytesIO(content))


def test_tiffs_of_unsigned_numbers_and_of_white_zeros():
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    opened = tiff_with(Image.fromarray(values.view(np.int32)), 339, 1)
    pixels, _ = pixels_of(opened, ReadingSettings(window=(0, 2**32 - 1)))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]
    pixels, changes = pixels_of(tiff_with(Image.fromarray(SIXTEEN), 262, 0), WINDOW)
    np.testing.assert_array_equal(pixels, 255 - windowed(SIXTEEN))
    assert "inverted (0 is white)" in map(str, changes)


def test_pages_and_frames():
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), 80 * n, np.uint8)) for n in range(3)]
    for kind in ("TIFF", "GIF", "WEBP", "MPO", "PNG", "AVIF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        with Image.open(io.BytesIO(file.getvalue())) as opened:
            pixels, changes = pixels_of(opened)
            assert ("first of several pages", "page 1 of 3") in changes, kind
            assert pixels.max() < 10
            opened.seek(2)
            pixels, changes = pixels_of(opened)
            assert ("further pages", "page 3 of 3") in changes, kind
            assert abs(int(pixels.min()) - 160) < 10


def profile(gamma=2.2, primaries=((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), grey=False):
    """An ICC profile of version 2: Adobe RGB's primaries with any gamma, or grey."""

    def s15(x):
        return struct.pack(">i", round(x * 65536))

    def curve(value):
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"

    def text(words):
        data = words.encode() + b"\0"
        return b"desc\0\0\0\0" + struct.pack(">I", len(data)) + data + bytes(78 + (-len(data) - 90) % 4)

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    white = np.array([0.9642, 1.0, 0.8249])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d65 = np.array([0.9505, 1.0, 1.089])
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, d65)
    adapt = np.linalg.inv(bradford) @ np.diag((bradford @ white) / (bradford @ d65)) @ bradford
    red, green, blue = (adapt @ matrix).T
    tags = {b"desc": text("A grey" if grey else "Wide RGB"), b"wtpt": xyz(white), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    if grey:
        tags[b"kTRC"] = curve(gamma)
    else:
        tags |= {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    space = b"GRAY" if grey else b"RGB "
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head = head + bytes(12) + b"acsp" + bytes(28) + b"".join(map(s15, white))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def to_linear(values, gamma=2.2):
    return (values / 255.0) ** gamma


def srgb_of(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def matrix_of(primaries):
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, np.array([0.9505, 1.0, 1.089]))


ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
SRGB = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))


def with_profile(original, content):
    file = io.BytesIO()
    original.save(file, "PNG", icc_profile=content)
    return Image.open(io.BytesIO(file.getvalue()))


def test_a_wide_colour_space_becomes_srgb():
    """The reference: the formulas of the two colour spaces, in float64."""
    pixels, changes = pixels_of(with_profile(Image.fromarray(COLOUR), profile()))
    linear = to_linear(COLOUR.astype(float)) @ (np.linalg.inv(matrix_of(SRGB)) @ matrix_of(ADOBE)).T
    assert np.abs(pixels - srgb_of(linear)).max() <= 3
    assert [str(change) for change in changes] == ["converted from Wide RGB to sRGB"]
    pixels, changes = pixels_of(with_profile(Image.fromarray(COLOUR), profile()), ReadingSettings(srgb=False))
    np.testing.assert_array_equal(pixels, COLOUR)
    assert [str(change) for change in changes] == ["colour profile ignored (Wide RGB)"]


def test_a_grey_profile_and_transparency():
    pixels, changes = pixels_of(with_profile(image("LA", with_alpha(GREY)), profile(1.8, grey=True)))
    expected = on(255, srgb_of(to_linear(rgb(GREY), 1.8)))
    assert np.abs(pixels.astype(float) - expected).max() <= 3
    assert [change.kind for change in changes] == ["converted to sRGB", "composited on white"]


def test_profiles_that_change_nothing_or_do_not_fit():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels_of(with_profile(Image.fromarray(COLOUR), srgb))[1] == ()
    for original, content in (
        (Image.fromarray(COLOUR), profile(1.8, grey=True)),
        (Image.fromarray(COLOUR), b"no profile at all" * 9),
        (Image.fromarray(SIXTEEN), profile(1.8, grey=True)),
    ):
        pixels, changes = pixels_of(with_profile(original, content), WINDOW)
        assert "colour profile ignored" in [change.kind for change in changes]
        assert pixels.shape == (HEIGHT, WIDTH, 3)


def test_colours_that_only_metadata_tell():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "JPEG", exif=exif)
    assert [c.kind for c in pixels_of(Image.open(file))[1]] == ["Adobe RGB read as sRGB"]


def test_the_settings_come_back_from_a_side_car():
    for settings in (
        ReadingSettings(),
        ReadingSettings(None, False, False, "all", (0.5, 7.25)),
        ReadingSettings(ground="#102030", window=(0, 4095)),
        AS_LOADER,
    ):
        assert ReadingSettings.of_side_car({"source": "x", **settings.side_car()}) == settings
    with pytest.raises(DataError, match="is no colour"):
        ReadingSettings(ground="plaid")
