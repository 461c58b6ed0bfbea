"""A split is a function of the images' paths, and both parts are prepared alike."""

import json
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from pipeline.data.beton import contents_of, open_beton, samples_of
from pipeline.errors import DataError
from tests.archives import class_images, encoded, photograph, write_folder
from tools.prepare import survey
from tools.prepare.detect import open_source
from tools.prepare.encoding import Encoding
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.image_source import ByteRanges
from tools.prepare.preparation import prepare_beton, prepare_split
from tools.prepare.preparation_report import missing_classes, summary_lines
from tools.prepare.splits import better_fraction, describe_split, validation_part
from tools.prepare.survey import survey_images

NAMES = [
    f"patient{patient}/slide{slide}/{number}.png" for patient in range(50) for slide in (1, 2) for number in range(9)
]


def held_out(names, *settings):
    return {name for name, held in zip(names, validation_part(names, *settings), strict=True) if held}


def test_a_fraction_is_held_out_and_stays_when_images_are_added():
    held = held_out(NAMES, 0.2)
    assert 0.15 < len(held) / len(NAMES) < 0.25
    assert held_out(NAMES[::-2], 0.2) == held & set(NAMES[::-2])
    assert held <= held_out(NAMES, 0.3), "a larger fraction adds images"


@pytest.mark.parametrize("pattern", [r"(patient\d+)/", r"^[^/]+"])
def test_groups_stay_whole(pattern):
    held = held_out(NAMES, 0.2, pattern)
    patients = {name.split("/")[0] for name in held}
    assert held == {name for name in NAMES if name.split("/")[0] in patients}
    assert 4 <= len(patients) <= 18
    two = held_out(NAMES, 0.2, r"patient(\d+)/slide(\d)")
    assert {name.rpartition("/")[0] for name in two} != {name.rpartition("/")[0] for name in held}


@pytest.mark.parametrize(
    ("settings", "words"),
    [((0.0,), "between 0 and 1"), ((1.0,), "between 0 and 1"), ((0.1, "("), "is no regular expression"),
     ((0.1, "patient1/"), r"does not match patient0/slide1/0.png and 881 more")],
)  # fmt: skip
def test_splits_that_cannot_be(settings, words):
    with pytest.raises(DataError, match=words):
        validation_part(NAMES, *settings)


def test_a_split_far_from_what_was_asked_names_a_better_one():
    names = [f"img{number:03d}.{'png' if number % 2 else 'jpg'}" for number in range(40)]
    assert len(held_out(names, 0.1)) == 1
    assert describe_split(names, 1, 40, 0.1) == (
        "held out for validation: 1 of 40 images, and --split 0.1 asks for about 4: a hash of each path decides, so"
        " small numbers vary; repeat with --split 0.15 (4 images), or with more images"
    )
    assert len(held_out(names, 0.15)) == 4
    near = validation_part(names, 0.2)
    assert describe_split(names, sum(near), 40, 0.2) == f"held out for validation: {sum(near)} of 40 images"
    assert describe_split(NAMES, 0, len(NAMES), 0.2, r"patient\d+").count("a hash of each group") == 1


@pytest.mark.parametrize("count", [2, 3, 7, 40])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("group_by", [None, r"^patient\d"])
def test_the_better_split_holds_out_what_it_says(count, fraction, group_by):
    names = NAMES[::23][:count]
    split, held = re.fullmatch(r"--split (\S+) \((\d+) images?\)", better_fraction(names, fraction, group_by)).groups()
    assert len(held_out(names, float(split), group_by)) == int(held)
    if group_by is None:
        assert int(held) == min(max(round(fraction * count), 1), count - 1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos") / "photos", class_images(8, ("cat", "dog")))


def contents(path):
    beton = open_beton(path)
    labels = samples_of(beton)["f1"]
    return {(bytes(content), int(labels[n])) for mode in (0, 1) for n, content in contents_of(beton, mode)}


def test_images_that_are_left_out_are_not_counted_as_held_out_or_kept(tmp_path):
    """`11 of 69 images` were held out, where 4 could not be read and 65 were stored."""
    folder = write_folder(tmp_path / "photos", class_images(8, ("cat", "dog")))
    for number in range(4):
        (folder / "cat" / f"bad{number}.jpg").write_bytes(b"no image")
    train, held = prepare_split(folder, tmp_path / "own.beton", 0.3, on_bad="skip")
    assert train.beton.samples + held.beton.samples == 16
    assert held.split.startswith(f"held out for validation: {held.beton.samples} of 16 images")


def test_both_files_make_the_whole(photos, tmp_path):
    whole = prepare_beton(photos, tmp_path / "whole.beton").beton
    train, held = prepare_split(photos, tmp_path / "own.beton", 0.3)
    assert (train.beton.path.name, held.beton.path.name) == ("own.beton", "own-val.beton")
    assert contents(train.beton.path) | contents(held.beton.path) == contents(whole.path)
    assert train.beton.samples + held.beton.samples == whole.samples
    assert train.beton.classes == held.beton.classes == whole.classes
    assert held.beton.settings["split"] == 0.3
    assert held.beton.settings["part"] == "validation"
    assert f"held out for validation: {held.beton.samples} of 16 images" in [*summary_lines(held)]
    assert not train.split
    bytes_of = [path.read_bytes() for path in (train.beton.path, held.beton.path)]
    train.beton.path.unlink()
    with pytest.raises(DataError, match=r"own-val.beton exists already"):
        prepare_split(photos, tmp_path / "own.beton", 0.3)
    (tmp_path / "own.beton.parts").mkdir()  # as if it had been interrupted after the first file
    again = prepare_split(photos, tmp_path / "own.beton", 0.3, workers=2, part_samples=3)
    assert [summary.beton.path.read_bytes() for summary in again] == bytes_of
    with pytest.raises(DataError, match="exists already"):
        prepare_split(photos, tmp_path / "own.beton", 0.3)
    with pytest.raises(DataError, match=r"no image of .* is for validation"):
        prepare_split(photos, tmp_path / "other.beton", 1e-9)


def test_missing_classes_are_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "eel").mkdir()
    shutil.copy(next((photos / "cat").iterdir()), tmp_path / "photos" / "eel" / "only.JPEG")
    both = prepare_split(tmp_path / "photos", tmp_path / "own.beton", 0.3)
    (sentence,) = missing_classes([summary.beton for summary in both])
    assert "has no images of eel; give another --split" in sentence


def deep_folder(folder):
    """TIFFs of 16 bits beside a photograph."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for n in range(6):
        values = numbers.integers(100 * n, 4000, (20, 30), dtype=np.uint16)
        Image.fromarray(values).save(folder / f"{n}.tif")
    (folder / "photo.jpg").write_bytes(encoded(photograph(1)))
    return folder


def test_one_window_for_all_images_whatever_the_workers(tmp_path):
    folder = deep_folder(tmp_path / "deep")
    values = np.sort(np.concatenate([np.asarray(Image.open(p)).ravel() for p in sorted(folder.glob("*.tif"))]))
    low, high = (float(values[int(np.ceil(share * len(values))) - 1]) for share in (0.001, 0.999))
    source = open_source(str(folder), unlabelled=True)
    reader, seen = ByteRanges(source.reader.fs), []
    found = [
        survey_images(source.items, reader, ReadingSettings(), workers, lambda *done: seen.append(done)).window
        for workers in (1, 2)
    ]
    assert found == [(low, high)] * 2
    assert seen == [(6, 6)] * 2  # the photograph is not looked at
    summary = prepare_beton(folder, tmp_path / "a.beton", unlabelled=True)
    settings = ReadingSettings.of_side_car(summary.beton.settings)
    assert settings == ReadingSettings(window=(low, high))
    stored = [content for _, content in contents_of(summary.beton, 1)]
    scaled = (np.asarray(Image.open(folder / "0.tif")).astype(float) - low) / (high - low) * 255
    assert stored[0] == np.repeat(np.rint(scaled.clip(0, 255)).astype(np.uint8)[..., None], 3, 2).tobytes()
    given = prepare_beton(folder, tmp_path / "b.beton", unlabelled=True, reading=ReadingSettings(window=(0, 65535)))
    assert (given.beton.settings["window_low"], given.beton.settings["window_high"]) == (0, 65535)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_percentiles_of_wide_values_are_close(tmp_path, kind):
    folder = tmp_path / "deep"
    folder.mkdir()
    values = (np.random.default_rng(0).normal(-500, 1000, (2, 100, 100)) * 1000).astype(kind)
    for n, image in enumerate(values):
        Image.fromarray(image).save(folder / f"{n}.tif")
    source = open_source(str(folder), unlabelled=True)
    window = survey_images(source.items, source.reader, ReadingSettings()).window
    np.testing.assert_allclose(window, np.quantile(values, [0.001, 0.999], method="lower"), rtol=1e-4, atol=2e3)


@pytest.mark.parametrize(("value", "high"), [(np.uint16(7), 8), (np.float32(2.0**100), 2.0**100 + 2.0**48)])
def test_a_constant_data_set_has_a_window(tmp_path, value, high):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), value)).save(tmp_path / "deep" / "a.tif")
    assert prepare_beton(tmp_path / "deep", tmp_path / "a.beton", unlabelled=True).beton.settings["window_high"] == high


def test_deep_images_under_a_jpegs_name_are_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "deep" / "a.jpg", "PNG")
    with pytest.raises(DataError, match=r"a.jpg \(an image of mode I;16 has more than 8 bits; .* --window LOW HIGH"):
        prepare_beton(tmp_path / "deep", tmp_path / "a.beton", unlabelled=True)


def test_all_pages(tmp_path):
    (tmp_path / "pages").mkdir()
    pages = [Image.fromarray(np.full((8, 8), 1000 * n, np.uint16)) for n in range(5)]
    pages[0].save(tmp_path / "pages" / "stack.tif", save_all=True, append_images=pages[1:])
    frames = [photograph(n) for n in range(2)]
    frames[0].save(tmp_path / "pages" / "two.jpg", "MPO", save_all=True, append_images=frames[1:])
    reading = ReadingSettings(pages="all")
    files = []
    for name, workers in (("a.beton", 1), ("b.beton", 2)):
        summary = prepare_beton(
            tmp_path / "pages", tmp_path / name, unlabelled=True, reading=reading, workers=workers, part_samples=1
        )
        files.append(summary.beton.path.read_bytes())
    assert files[0] == files[1]
    assert summary.beton.samples == 7
    assert [int(content[0]) for _, content in contents_of(summary.beton, 1)][:5] == [0, 64, 128, 191, 255]
    why = [json.loads(line)["why"] for line in summary.report.read_text().splitlines()]
    assert ["page 5 of 5" in text for text in why].count(True) == 1


def test_large_images_are_admitted_by_options(tmp_path, monkeypatch):
    (tmp_path / "large").mkdir()
    Image.new("L", (400, 300), 200).save(tmp_path / "large" / "slide.png")
    monkeypatch.setattr("tools.prepare.encoding.MOST_PIXELS", 100_000)
    refused = (
        r"slide.png \(400 x 300 pixels may be a decompression bomb; admit them by --max-pixels, or with --max-side"
    )
    with pytest.raises(DataError, match=refused):
        prepare_beton(tmp_path / "large", tmp_path / "a.beton", unlabelled=True)
    small = prepare_beton(tmp_path / "large", tmp_path / "a.beton", unlabelled=True, encoding=Encoding(max_side=100))
    assert (small.beton.max_width, small.beton.max_height) == (100, 75)
    whole = prepare_beton(
        tmp_path / "large", tmp_path / "b.beton", unlabelled=True, reading=ReadingSettings(max_pixels=120_000)
    )
    assert whole.beton.max_width == 400


def test_the_summary_is_three_lines(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    cat = tmp_path / "photos" / "cat"
    for n in range(5):
        (cat / f"bad {n}.jpg").write_bytes(b"")
    Image.new("RGBA", (20, 20)).save(cat / "clear.png")
    (cat / "notes.txt").write_bytes(b"")
    summary = prepare_beton(tmp_path / "photos", tmp_path / "a.beton", on_bad="skip", encoding=Encoding(max_side=90))
    first, second, third = summary_lines(summary)
    assert first.startswith("17 images; ")
    for words in (
        "shrunk",
        "1 composited on white",
        "1 ignored",
        "5 left out: cat/bad 0.jpg (empty file), ",
        " and 2 more",
    ):
        assert words in first
    assert second == f"each of these is named in {tmp_path}/a.beton.report.jsonl"
    assert third == f"{tmp_path}/a.beton is ready: 17 images of 2 classes, sha256 {summary.beton.sha256}"
    plain = prepare_beton(photos, tmp_path / "b.beton")
    assert len(list(summary_lines(plain))) == 1


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    (tmp_path / "phone").mkdir()
    heif.from_pillow(photograph(1)).save(tmp_path / "phone" / "a.heic", quality=95)
    photograph(1).save(tmp_path / "phone" / "b.avif", quality=95)
    summary = prepare_beton(tmp_path / "phone", tmp_path / "a.beton", unlabelled=True)
    assert summary.counts == {("stored", "stored as pixels"): 2}
    for _, content in contents_of(summary.beton, 1):
        difference = np.frombuffer(content, np.uint8).astype(int) - np.asarray(photograph(1), int).ravel()
        assert np.abs(difference).mean() < 6


def test_heic_without_its_reader_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(400))
    monkeypatch.setattr("tools.prepare.image_files._reads_heif", lambda: False)
    with pytest.raises(DataError, match=r"a.heic .HEIC needs pillow-heif; run `pip install pillow-heif`"):
        prepare_beton(tmp_path / "phone", tmp_path / "a.beton", unlabelled=True)


def test_a_killed_worker_is_one_sentence(monkeypatch):
    class Pool(ProcessPoolExecutor):
        def map(self, *arguments):
            raise BrokenProcessPool

    monkeypatch.setattr(survey, "ProcessPoolExecutor", Pool)
    with pytest.raises(DataError, match="a worker process was killed, perhaps for lack of memory; repeat the command"):
        list(survey.mapped(len, [[], []], 2))


def test_a_second_source_does_not_replace_the_validation_images_of_one_at_work(tmp_path):
    first, second = (write_folder(tmp_path / str(n), class_images(4, start=n)) for n in (0, 100))
    refused = []

    def progress(done, total):
        if (tmp_path / "a-val.beton").exists() and not refused:
            with pytest.raises(DataError, match="is being written by another process") as caught:
                prepare_split(second, tmp_path / "a.beton", 0.5)
            refused.append(caught)

    prepare_split(first, tmp_path / "a.beton", 0.5, progress=progress)
    prepare_split(first, tmp_path / "b.beton", 0.5)
    assert refused
    assert open_beton(tmp_path / "a-val.beton").identity == open_beton(tmp_path / "b-val.beton").identity
