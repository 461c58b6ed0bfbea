"""The same images in every supported layout give the same file."""

import io
import json
import os
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from pipeline.data.beton import JPEG, contents_of, open_beton, samples_of
from pipeline.errors import DataError
from pipeline.weights.heads import read_class_names
from tests.archives import (
    WNIDS,
    WORDS,
    class_images,
    devkit,
    encoded,
    meta_mat,
    photograph,
    tar,
    train_tar,
    validation,
    write_folder,
)
from tools.prepare.detect import open_source
from tools.prepare.devkit import read_synsets
from tools.prepare.encoding import Encoding
from tools.prepare.image_source import read_lines
from tools.prepare.preparation import prepare_beton
from tools.prepare.preparation_report import summary_lines

CLASSES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


@pytest.fixture(scope="module")
def images():
    return class_images(3)


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    """The file prepared from a folder."""
    directory = tmp_path_factory.mktemp("reference")
    prepare_beton(write_folder(directory / "train", images), directory / "a.beton")
    return directory


@pytest.mark.parametrize("name", ["annotations.json", "folder.beton"])
def test_what_is_no_data_file_is_not_replaced(images, tmp_path, name):
    write_folder(tmp_path / "train", images)
    (tmp_path / "annotations.json").write_text("{}")  # OUT was forgotten
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(DataError, match=rf"{name} exists and is no \.beton file, so it stays; name the"):
        prepare_beton(tmp_path / "train", tmp_path / name, overwrite=True)
    assert (tmp_path / "annotations.json").read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {"annotations.json", "folder.beton", "train"}


def written(path):
    return open_beton(path), [bytes(content) for _, content in contents_of(open_beton(path), JPEG)]


def test_folder(images, reference):
    beton, contents = written(reference / "a.beton")
    assert beton.classes == WNIDS
    assert contents == [content for wnid in WNIDS for _, content in sorted(images[wnid].items())]
    assert samples_of(beton)["f1"].tolist() == [label for label in range(4) for _ in range(3)]


def folder_tar(images, prefix=""):
    return tar({f"{prefix}{wnid}/{name}": files[name] for wnid, files in images.items() for name in files})


LAYOUTS = {
    "train.tar": lambda images: {"train.tar": train_tar(images)},
    "folders.tar": lambda images: {"folders.tar": folder_tar(images)},
    "deeper.tar": lambda images: {"deeper.tar": folder_tar(images, "./data/train/")},
    "synsets": lambda images: {f"synsets/{wnid}.tar": tar(files) for wnid, files in images.items()},
    "train": lambda images: {f"train/{wnid}/{name}": f[name] for wnid, f in images.items() for name in f},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("store", ["local", "memory"])
def test_every_layout_gives_the_same_file(images, reference, tmp_path, layout, store):
    root = tmp_path if store == "local" else f"memory://{tmp_path.name}-{layout}"
    fs, place = fsspec.url_to_fs(str(root))
    for name, content in LAYOUTS[layout](images).items():
        fs.makedirs(os.path.dirname(f"{place}/{name}"), exist_ok=True)
        fs.pipe_file(f"{place}/{name}", content)
    prepare_beton(f"{root}/{layout}", tmp_path / "b.beton")
    assert (tmp_path / "b.beton").read_bytes() == (reference / "a.beton").read_bytes()


@pytest.fixture
def val(tmp_path):
    content, ids = validation(8)
    (tmp_path / "val.tar").write_bytes(content)
    (tmp_path / "devkit.tar.gz").write_bytes(devkit(ids))
    by_id = dict(zip([3, 1, 4, 2], WNIDS, strict=True))
    return tmp_path, [by_id[number] for number in ids], ids


@pytest.mark.parametrize("compressed", [True, False])
def test_meta_mat(compressed):
    expected = {3: (WNIDS[0], WORDS[0]), 1: (WNIDS[1], WORDS[1]), 4: (WNIDS[2], WORDS[2]), 2: (WNIDS[3], WORDS[3])}
    assert read_synsets(meta_mat(compressed)) == {**expected, 1005: ("n00001740", "entity")}


def test_validation_archive_with_its_devkit(val):
    directory, wnids, _ = val
    prepare_beton(directory / "val.tar", directory / "val.beton", labels=str(directory / "devkit.tar.gz"))
    beton, contents = written(directory / "val.beton")
    assert beton.classes == WNIDS
    assert beton.class_descriptions == dict(zip(WNIDS, WORDS, strict=True))
    assert [beton.classes[label] for label in samples_of(beton)["f1"]] == wnids
    with tarfile.open(directory / "val.tar") as archive:
        assert contents == [archive.extractfile(member).read() for member in archive]


def test_other_forms_of_labels_say_the_same(val):
    directory, wnids, ids = val
    images = open_source(str(directory / "val.tar"), unlabelled=True)
    (directory / "order.txt").write_text("\n".join(wnids))
    lines = [
        f"{item.name.removesuffix('.JPEG')},{wnid} 1 2 3 4" for item, wnid in zip(images.items, wnids, strict=True)
    ]
    (directory / "kaggle.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(lines)))
    unpacked = directory / "unpacked" / "data"
    unpacked.mkdir(parents=True)
    (unpacked / "meta.mat").write_bytes(meta_mat())
    (unpacked / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, ids)))
    with tarfile.open(directory / "val.tar") as archive:
        archive.extractall(directory / "val", filter="data")
    expected = [WNIDS.index(wnid) for wnid in wnids]
    for labels in ("order.txt", "kaggle.csv", "unpacked", "unpacked/data/ILSVRC2012_validation_ground_truth.txt"):
        for source in ("val.tar", "val"):
            found = open_source(str(directory / source), str(directory / labels))
            assert found.classes == WNIDS
            assert [item.label for item in found.items] == expected


def parquet(path, rows, names=None, group=2, label="label"):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    images = arrow.array([{"bytes": content, "path": name} for name, content, _ in rows], kind)
    table = arrow.table({"image": images, label: arrow.array([number for *_, number in rows], arrow.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def test_parquet_as_the_hubs_have_it(images, tmp_path):
    rows = [
        (f"{name.removesuffix('.JPEG')}_{wnid}.JPEG", content, WNIDS.index(wnid))
        for wnid, files in images.items()
        for name, content in files.items()
    ][::-1]
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:7], WORDS)
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[7:], WORDS)
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows[:1], WORDS)
    with pytest.raises(DataError, match=r"holds train, validation; choose one: '.*/data/train-\*.parquet'"):
        prepare_beton(tmp_path / "data", tmp_path / "a.beton")
    prepare_beton(f"{tmp_path}/data/train-*.parquet", tmp_path / "a.beton", part_samples=5)
    beton, contents = written(tmp_path / "a.beton")
    assert contents == [content for _, content, _ in rows]
    assert samples_of(beton)["f1"].tolist() == [label for *_, label in rows]
    assert beton.classes == WNIDS
    assert beton.class_descriptions == dict(zip(WNIDS, WORDS, strict=True))


def test_parquet_of_others(images, tmp_path):
    rows = [(None, content, 1) for content in images[WNIDS[0]].values()]
    parquet(tmp_path / "named.parquet", rows, ["cat", "dog", "eel"])
    assert open_source(str(tmp_path / "named.parquet")).classes == ("cat", "dog", "eel")
    parquet(tmp_path / "bare.parquet", rows)
    assert open_source(str(tmp_path / "bare.parquet")).classes == ("00000", "00001")
    parquet(tmp_path / "broken.parquet", [(None, None, 0), *rows])
    assert prepare_beton(tmp_path / "broken.parquet", tmp_path / "a.beton", on_bad="skip").counts == {
        ("left out", "no bytes in its row"): 1
    }
    parquet(tmp_path / "other.parquet", rows, label="class")
    with pytest.raises(DataError, match="no column `label` of numbers"):
        open_source(str(tmp_path / "other.parquet"))
    assert open_source(str(tmp_path / "other.parquet"), unlabelled=True).classes == ("all",)
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_source(str(tmp_path / "no.parquet"))
    parquet(tmp_path / "high.parquet", [(None, b"", 7)], ["a"])
    with pytest.raises(DataError, match="holds 7, but the schema names 1"):
        open_source(str(tmp_path / "high.parquet"))


def test_own_photographs_without_classes(images, tmp_path):
    write_folder(tmp_path, {"photos": images[WNIDS[0]]})
    with pytest.raises(DataError, match="--unlabelled"):
        prepare_beton(tmp_path / "photos", tmp_path / "a.beton")
    prepare_beton(tmp_path / "photos", tmp_path / "a.beton", unlabelled=True)
    assert open_beton(tmp_path / "a.beton").classes == ("all",)
    assert open_beton(tmp_path / "a.beton").samples == 3


def test_descriptions(images, tmp_path):
    (tmp_path / "words.txt").write_text("n01440764\ttench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn9 x\n")
    prepare_beton(write_folder(tmp_path / "t", images), tmp_path / "a.beton", descriptions=str(tmp_path / "words.txt"))
    assert open_beton(tmp_path / "a.beton").class_descriptions == CLASSES


def test_images_and_names_to_exclude(images, tmp_path):
    """Validation images can be left out of ImageNet-22K."""
    train = write_folder(tmp_path / "train", images)
    stolen = {
        "val_1.JPEG": images[WNIDS[1]][f"{WNIDS[1]}_2.JPEG"],
        "val_2.JPEG": images[WNIDS[2]][f"{WNIDS[2]}_0.JPEG"],
    }
    (tmp_path / "val.tar").write_bytes(tar(stolen))
    prepare_beton(tmp_path / "val.tar", tmp_path / "val.beton", unlabelled=True)
    (tmp_path / "broken.txt").write_text(f"{WNIDS[0]}_1\n{WNIDS[3]}/{WNIDS[3]}_0.JPEG\n")
    for source in ("val.tar", "val.beton"):
        summary = prepare_beton(
            train,
            tmp_path / f"{source}.beton",
            exclude_images=str(tmp_path / source),
            exclude_names=str(tmp_path / "broken.txt"),
        )
        assert summary.counts == {("excluded", "its bytes are listed"): 2, ("excluded", "its name is listed"): 2}
        names = [json.loads(line)["name"] for line in summary.report.read_text().splitlines()]
        assert names == [
            f"{WNIDS[0]}/{WNIDS[0]}_1.JPEG",
            f"{WNIDS[1]}/{WNIDS[1]}_2.JPEG",
            f"{WNIDS[2]}/{WNIDS[2]}_0.JPEG",
            f"{WNIDS[3]}/{WNIDS[3]}_0.JPEG",
        ]
        assert not set(stolen.values()) & set(written(tmp_path / f"{source}.beton")[1])


def test_exclusions_that_exclude_nothing_are_a_note(images, tmp_path):
    train = write_folder(tmp_path / "train", images)
    write_folder(tmp_path / "other", {"cat": {"a.png": encoded(photograph(7), "PNG")}})
    other = str(prepare_beton(tmp_path / "other", tmp_path / "other.beton").beton.path)
    said = list(summary_lines(prepare_beton(train, tmp_path / "a.beton", exclude_images=other)))
    assert said[0].startswith("no image was excluded: none has a listed name, or the bytes of an image to exclude (")
    assert not [line for line in summary_lines(prepare_beton(train, tmp_path / "b.beton")) if "no image was" in line]
    raw = str(prepare_beton(train, tmp_path / "raw.beton", encoding=Encoding(raw_fraction=1.0)).beton.path)
    with pytest.raises(DataError, match=r"raw\.beton was prepared with raw_fraction 1, .*name these files instead"):
        prepare_beton(train, tmp_path / "c.beton", exclude_images=raw)


def cut(content):
    """An archive whose download stopped between two members."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return content[: archive.getmembers()[-1].offset]


def refusals(images):
    files = images[WNIDS[0]]
    return {
        "nowhere": ({}, "does not exist"),
        "empty": ({"empty/x.txt": b""}, "no class folders"),
        "packed": ({"packed/train.tar.gz": b"x"}, "unpack train.tar.gz first"),
        "no images": ({"no images/cats/a.txt": b"x"}, "has no images"),
        "a.tar.gz": ({"a.tar.gz": b"x"}, "is compressed"),
        "flat.tar": ({"flat.tar": tar(files)}, "images without class folders"),
        "half.tar": ({"half.tar": tar(files)[:-13000]}, "is truncated"),
        "cut.tar": ({"cut.tar": cut(train_tar(images))}, "its end is missing"),
        "inner.tar": ({"inner.tar": tar({f"{WNIDS[0]}.tar": cut(tar(files))})}, "its end is missing"),
        "garbage.tar": ({"garbage.tar": b"no archive at all" * 99}, "is truncated, damaged or compressed"),
        "nested": ({"nested/train.tar": train_tar(images)}, "holds archives itself; name it alone"),
        "bare.tar": ({"bare.tar": tar({f"{WNIDS[0]}.tar": tar({"x.txt": b""})})}, "has no images"),
    }


@pytest.mark.parametrize(
    "name", ["nowhere", "empty", "packed", "no images", "a.tar.gz", "flat.tar", "half.tar", "cut.tar", "inner.tar",
             "garbage.tar", "nested", "bare.tar"],
)  # fmt: skip
def test_sources_that_cannot_be_used(images, tmp_path, name):
    made, words = refusals(images)[name]
    for path, content in made.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        prepare_beton(tmp_path / name, tmp_path / "a.beton")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("a.beton*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"1\n2\n3\n", "are numbers, and meta.mat"),
        (b"n01\nn02\n", "are 2, but the source holds 8"),
        (b"ILSVRC2012_val_00000001 n01\n", "have no line for ILSVRC2012_val_00000002.JPEG and 6 more"),
        (b"n01\nn02 x\n", "line 1 of labels .* is neither one class nor NAME CLASS"),
        (b"a b c\n", "line 1 of labels .* is neither one class nor NAME CLASS"),
        (b"a,b.jpg cat\nc.jpg dog\n", "line 1 of labels .* is neither one class nor NAME CLASS"),
        (b"", "are empty"),
        (b"\xff\xfe\x00", "are no text in UTF-8"),
        (b"a.jpg,cat\nb.jpg,\n", "line 2 of labels .* has an empty name or class"),
        (b"a.jpg,cat\nb.jpg,cat,7\n", "line 2 of labels .* has 3 columns instead of 2"),
        (b"image,label\na.jpg,cat\na.jpg,dog\n", "a.jpg two classes, cat on line 2 and dog on line 3"),
        (b"a.jpg,cat,x\n", "have 3 columns and no header; name one of them `image`"),
        (b"image,what,else\na.jpg,cat,x\n", "have 3 columns and the header image, what, else"),
        (b'a.jpg,"cat\nb.jpg,dog\n', "line 2 of labels .* cannot be read as CSV"),
    ],
)
def test_labels_that_do_not_fit(val, content, words):
    directory = val[0]
    (directory / "labels.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare_beton(directory / "val.tar", directory / "a.beton", labels=str(directory / "labels.txt"))


def test_a_devkit_that_is_none(val):
    directory = val[0]
    (directory / "devkit.tar.gz").write_bytes((directory / "devkit.tar.gz").read_bytes()[:300])
    with pytest.raises(DataError, match="copy the devkit again"):
        prepare_beton(directory / "val.tar", directory / "a.beton", labels=str(directory / "devkit.tar.gz"))
    (directory / "other.tar").write_bytes(tar({"meta.mat": b"x" * 200, "ILSVRC2012_validation_ground_truth.txt": b"1"}))
    with pytest.raises(DataError, match="cannot be understood"):
        prepare_beton(directory / "val.tar", directory / "a.beton", labels=str(directory / "other.tar"))
    write_folder(directory / "folders", {"cats": {"a.jpg": b""}})
    (directory / "order.txt").write_text("cat\n")
    with pytest.raises(DataError, match="has its own; leave them out"):
        prepare_beton(directory / "folders", directory / "a.beton", labels=str(directory / "order.txt"))


def test_images_beside_class_folders_are_not_lost_without_a_word(images, tmp_path):
    source = write_folder(tmp_path / "train", images)
    (source / "stray.jpg").write_bytes(images[WNIDS[0]][f"{WNIDS[0]}_0.JPEG"])
    with pytest.raises(DataError, match=r"1 bad image in .*: stray.jpg \(it lies in no class folder\)"):
        prepare_beton(source, tmp_path / "a.beton")
    everything = prepare_beton(source, tmp_path / "all.beton", unlabelled=True)
    assert (everything.beton.samples, everything.beton.classes, everything.counts) == (13, ("all",), {})
    found = prepare_beton(source, tmp_path / "a.beton", on_bad="skip")
    assert found.beton.samples == 12
    assert found.counts == {("left out", "it lies in no class folder"): 1}


def test_an_archive_beside_class_folders_does_not_replace_them(images, tmp_path):
    source = write_folder(tmp_path / "train", images)
    (source / "old.tar").write_bytes(tar(images[WNIDS[0]]))
    with pytest.raises(DataError, match=rf"holds both archives \(old.tar, ...\) and folders \({WNIDS[0]}, ...\)"):
        prepare_beton(source, tmp_path / "a.beton")


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        (("a.jpg", "backup.tar"), r"archives \(backup.tar, ...\) and images \(a.jpg, ...\)"),
        (("a.jpg", "table.parquet"), r"Parquet files \(table.parquet, ...\) and images \(a.jpg, ...\)"),
        (("a.tar", "b.parquet"), r"Parquet files \(b.parquet, ...\) and archives \(a.tar, ...\)"),
    ],
)
def test_an_archive_or_table_beside_images_does_not_replace_them(tmp_path, files, kinds):
    for name in files:
        (tmp_path / name).write_bytes(tar({"x.jpg": b""}))
    with pytest.raises(DataError, match=f"holds both {kinds}; move one kind away"):
        open_source(str(tmp_path), unlabelled=True)


def test_of_members_with_one_path_the_last_counts(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("./b/1.jpg", b"old"), ("a/1.jpg", b"other"), ("b/1.jpg", b"new")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "set.tar").write_bytes(file.getvalue())
    for unlabelled in (True, False):
        source = open_source(str(tmp_path / "set.tar"), unlabelled=unlabelled)
        held = {item.name: source.reader.read(item.place) for item in source.items}
        assert held == {"a/1.jpg": b"other", "b/1.jpg": b"new"}


def test_hidden_folders_of_a_tar_are_no_classes(tmp_path):
    names = ("cat/a.jpg", "cat/.ipynb_checkpoints/a-checkpoint.jpg", "dog/b.jpg", "__MACOSX/cat/c.jpg")
    for above in ("", "./", "home/.cache/set/"):
        (tmp_path / "set.tar").write_bytes(tar({above + name: b"" for name in names}))
        source = open_source(str(tmp_path / "set.tar"))
        assert [item.name for item in source.items] == ["cat/a.jpg", "dog/b.jpg"]
        assert len(open_source(str(tmp_path / "set.tar"), unlabelled=True).items) == 2
        assert dict(source.ignored) == {
            ".ipynb_checkpoints/a-checkpoint.jpg": "in a folder that is hidden or not the user's",
            "cat/c.jpg": "in a folder that is hidden or not the user's",
        }


def test_a_tar_of_two_splits_is_not_merged(images, tmp_path):
    splits = {
        f"set/{split}/{wnid}/{name}": c
        for split in ("train", "val")
        for wnid in images
        for name, c in images[wnid].items()
    }
    (tmp_path / "set.tar").write_bytes(tar(splits))
    with pytest.raises(
        DataError, match=f"two folders of class {WNIDS[0]}, set/train/{WNIDS[0]} and set/val/{WNIDS[0]}"
    ):
        prepare_beton(tmp_path / "set.tar", tmp_path / "a.beton")


@pytest.mark.parametrize(
    "names",
    [("cat/in/1.jpg", "cat/out/2.jpg", "dog/3.jpg"), ("cat/in/1.jpg", "dog/out/2.jpg"), ("a/1.jpg", "a/b/2.jpg")],
)
def test_a_tar_of_folders_in_class_folders_is_refused(tmp_path, names):
    """Classes of a folder are its outer folders, of a tar the inner ones: where these differ, the tar is refused."""
    for above in ("", "set/"):
        (tmp_path / "set.tar").write_bytes(tar({above + name: b"" for name in names}))
        with pytest.raises(DataError, match=r"folders in folders \(.*\), so its classes are in doubt; unpack it"):
            open_source(str(tmp_path / "set.tar"))


def test_sparse_files_of_a_tar_are_not_read(tmp_path):
    """The archive leaves out their holes, so at their place lie the bytes of other members."""
    (tmp_path / "cat").mkdir()
    with (tmp_path / "cat" / "a.bmp").open("wb") as file:
        file.write(b"BM")
        file.truncate(1 << 16)
    (tmp_path / "cat" / "b.bmp").write_bytes(b"b" * (1 << 17))
    subprocess.run(["tar", "-cSf", "set.tar", "cat/a.bmp", "cat/b.bmp"], cwd=tmp_path, check=True)
    if (tmp_path / "set.tar").stat().st_size > 3 << 16:
        pytest.skip("this file system has no holes")
    places = {item.name: item.place for item in open_source(str(tmp_path / "set.tar")).items}
    assert places["cat/a.bmp"] == "a sparse file; pack it without tar's option -S"
    assert not isinstance(places["cat/b.bmp"], str)


def test_a_link_to_a_class_tar_is_refused(images, tmp_path):
    (tmp_path / "train.tar").write_bytes(train_tar(images))
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        link = tarfile.TarInfo("n09999999.tar")
        link.type, link.linkname = tarfile.SYMTYPE, f"{WNIDS[0]}.tar"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"n09999999.tar is a link in the archive, .* a class would be missing; pack"):
        open_source(str(tmp_path / "train.tar"))


TABLES = {
    "header": "image,label\na.jpg,cat\nb.png,dog\nmore/a.jpg,dog\n",
    "columns by name": "id;split;label\na.jpg;train;cat\nb.png;val;dog\nmore/a.jpg;val;dog\n",
    "classes first": "label\tfilename\ncat\ta.jpg\ndog\tb.png\ndog\tmore/a.jpg\n",
    "no header": "./a.jpg,cat\nb.png,dog\nmore/a.jpg,dog\n",
    "quotes": '"a.jpg","cat"\r\n"b.png","dog"\r\n"more/a.jpg","dog"\r\n',
    "byte order mark": "\ufeffa.jpg,cat\nb.png,dog\nmore/a.jpg,dog\n",
    "spaces": "a.jpg cat\nb.png dog\nmore/a.jpg dog\n",
    "no suffixes, a folder of Windows": "a,cat\nb,dog\nmore\\a,dog\nnot there,eel\n",
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_of_labels(tmp_path, form):
    for name in ("a.jpg", "b.png", "more/a.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    (tmp_path / "labels.csv").write_bytes(TABLES[form].encode())
    source = open_source(str(tmp_path / "photos"), str(tmp_path / "labels.csv"))
    assert source.classes == ("cat", "dog")
    assert {item.name: item.label for item in source.items} == {"a.jpg": 0, "b.png": 1, "more/a.jpg": 1}


def test_classes_with_separators_in_quotes(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a, b.jpg").write_bytes(b"")
    (tmp_path / "labels.csv").write_text('"a, b.jpg","tench, Tinca tinca"\n')
    assert open_source(str(tmp_path / "photos"), str(tmp_path / "labels.csv")).classes == ("tench, Tinca tinca",)


def test_whole_trees_are_read_and_loops_are_not_followed(images, tmp_path):
    photo = next(iter(images[WNIDS[0]].values()))
    for name in (
        "a.jpg",
        "2024/b.jpg",
        "2024/may/c.jpg",
        ".trash/d.jpg",
        "__MACOSX/e.jpg",
        "2024/f.txt",
        "empty/g.nef",
    ):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo)
    (tmp_path / "photos" / "2024" / "loop").symlink_to("..")
    (tmp_path / "photos" / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "h.jpg").write_bytes(photo)
    (tmp_path / "other" / "back").symlink_to(tmp_path / "photos")
    summary = prepare_beton(tmp_path / "photos", tmp_path / "a.beton", unlabelled=True)
    assert summary.beton.samples == 4
    source = open_source(str(tmp_path / "photos"), unlabelled=True)
    assert [item.name for item in source.items] == ["2024/b.jpg", "2024/may/c.jpg", "a.jpg", "elsewhere/h.jpg"]
    assert dict(source.ignored) == {
        ".trash": "a folder that is hidden or not the user's",
        "__MACOSX": "a folder that is hidden or not the user's",
        "2024/f.txt": "its name is not an image's",
        "2024/loop": "a link to a folder that it lies in",
        "elsewhere/back": "a link to a folder that it lies in",
        "empty/g.nef": "raw data of a camera; develop them to TIFF or JPEG",
    }
    (tmp_path / "photos" / "a.jpg").unlink()
    found = open_source(str(tmp_path / "photos"), unlabelled=True)
    assert found.classes == ("2024", "elsewhere"), "folders remain classes if all images lie in them"
    assert [(item.name, item.label) for item in found.items] == [
        ("2024/b.jpg", 0), ("2024/may/c.jpg", 0), ("elsewhere/h.jpg", 1),
    ]  # fmt: skip


def test_splits_are_not_taken_for_classes(images, tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, images)
    with pytest.raises(DataError, match=r"holds train, val, which look like the splits .*; name one of them, such as"):
        open_source(str(tmp_path / "set"))


def test_links_and_devices_in_archives_are_listed(images, tmp_path):
    photo = next(iter(images[WNIDS[0]].values()))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (
            ("cat/a.jpg", tarfile.REGTYPE), ("cat/hard.jpg", tarfile.LNKTYPE), ("cat/soft.jpg", tarfile.SYMTYPE),
            ("cat/pipe.jpg", tarfile.FIFOTYPE), ("cat/null", tarfile.CHRTYPE), ("cat/notes.txt", tarfile.REGTYPE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "cat/a.jpg"
            member.size = len(photo) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(photo))
    (tmp_path / "set.tar").write_bytes(file.getvalue())
    with pytest.raises(DataError, match=r"3 bad images in .*hard.jpg \(a link in the archive, not a file\)"):
        prepare_beton(tmp_path / "set.tar", tmp_path / "a.beton")
    summary = prepare_beton(tmp_path / "set.tar", tmp_path / "a.beton", on_bad="skip")
    assert summary.beton.samples == 1
    assert summary.counts == {
        ("left out", "a link in the archive, not a file"): 2,
        ("left out", "a device or pipe in the archive, not a file"): 1,
        ("ignored", "a device or pipe in the archive, not a file"): 1,
        ("ignored", "its name is not an image's"): 1,
    }


@pytest.mark.parametrize("name", ["a\nb", "..", "<b>bold</b>", "tab\tstop", " "])
def test_class_names_that_are_refused(images, tmp_path, name):
    photo = next(iter(images[WNIDS[0]].values()))
    (tmp_path / "set.tar").write_bytes(tar({f"{name}.tar": tar({"a.jpg": photo})}))
    with pytest.raises(DataError, match=r"has a name that .*; rename it") as caught:
        prepare_beton(tmp_path / "set.tar", tmp_path / "a.beton")
    assert "\n" not in str(caught.value)


def test_labels_labelled_by_hashes_are_one_sentence(tmp_path):
    parquet(tmp_path / "a.parquet", [(None, b"", 2**62)])
    with pytest.raises(DataError, match="holds 4611686018427387904, and its classes have no names; number them from 0"):
        open_source(str(tmp_path / "a.parquet"))


def test_labels_that_give_a_name_two_classes(tmp_path):
    (tmp_path / "labels.txt").write_text("a/1.jpg cat\nb/1.jpg dog\n")
    (tmp_path / "flat.tar").write_bytes(tar({"a/1.jpg": b"", "b/1.jpg": b""}))
    source = open_source(str(tmp_path / "flat.tar"), str(tmp_path / "labels.txt"))
    assert {item.name: source.classes[item.label] for item in source.items} == {"a/1.jpg": "cat", "b/1.jpg": "dog"}
    (tmp_path / "flat.tar").write_bytes(tar({"c/1.jpg": b""}))
    with pytest.raises(DataError, match="give 1 two classes, cat and dog"):
        open_source(str(tmp_path / "flat.tar"), str(tmp_path / "labels.txt"))


@pytest.mark.parametrize("line", ["a/1.jpg,cat", "1.jpg,cat", "1,cat"])
def test_a_line_is_of_one_image(tmp_path, line):
    (tmp_path / "labels.csv").write_text(f"{line}\n")
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    said = "name 1 1 times, and the source holds 2 images of this name, such as a/1.jpg and b/1.jpg; list each by its"
    with pytest.raises(DataError, match=said):
        open_source(str(tmp_path / "photos"), str(tmp_path / "labels.csv"))
    (tmp_path / "labels.csv").write_text("old/a/1.jpg,cat\nold/b/1.jpg,cat\n")
    assert open_source(str(tmp_path / "photos"), str(tmp_path / "labels.csv")).classes == ("cat",)


def test_one_class_a_line_needs_a_plain_order(tmp_path):
    (tmp_path / "labels.txt").write_text("".join(f"class{n % 3}\n" for n in range(11)))
    for form, refused in (("{}.jpg", True), ("{:02}.jpg", False)):
        folder = tmp_path / form
        folder.mkdir()
        for n in range(11):
            (folder / form.format(n)).write_bytes(b"")
        if refused:
            with pytest.raises(DataError, match=r"order of the images is in doubt: 10\.jpg or 2\.jpg first; write"):
                open_source(str(folder), str(tmp_path / "labels.txt"))
        else:
            found = open_source(str(folder), str(tmp_path / "labels.txt"))
            assert [item.label for item in found.items] == [n % 3 for n in range(11)]


def test_parquet_files_that_number_classes_otherwise_are_not_merged(tmp_path):
    parquet(tmp_path / "a.parquet", [(None, b"", 0)], ["cat", "dog"])
    parquet(tmp_path / "b.parquet", [(None, b"", 0)], ["dog", "cat"])
    with pytest.raises(
        DataError, match=r"b\.parquet names other classes than the files before it, or in another order"
    ):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), unlabelled=True).items) == 2


def test_lists_of_names_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_lines(str(tmp_path / "names.txt")) == read_class_names(tmp_path / "names.txt") == ["cat", "dog"]


def test_names_that_are_no_text(images, tmp_path):
    source = write_folder(tmp_path / "train", images)
    odd = os.fsencode(source / WNIDS[0]) + b"/caf\xe9.jpg"
    with open(odd, "wb") as file:
        file.write(b"no image")
    found = prepare_beton(source, tmp_path / "a.beton", on_bad="skip")
    (note,) = [json.loads(line) for line in found.report.read_text().splitlines()]
    assert note == {"name": os.fsdecode(b"n01440764/caf\xe9.jpg"), "outcome": "left out", "why": "not an image"}
    os.rename(source / WNIDS[1], os.fsencode(source) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"has a name that is no UTF-8; rename it"):
        prepare_beton(source, tmp_path / "b.beton", on_bad="skip")


@contextmanager
def as_nobody():
    """Drop root's permission to read everything."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_what_may_not_be_read_is_one_sentence(images):
    with tempfile.TemporaryDirectory() as place:  # tmp_path is closed to other users
        os.chmod(place, 0o777)
        folder = write_folder(Path(place) / "train", images)
        (folder / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").chmod(0)
        refused = r"train, whose images are to be left out, cannot be read: .*Permission denied"
        with as_nobody(), pytest.raises(DataError, match=refused):
            prepare_beton(folder, Path(place) / "a.beton", exclude_images=str(folder))
        (folder / WNIDS[0]).chmod(0)
        with as_nobody(), pytest.raises(DataError, match=f"{WNIDS[0]} cannot be listed: Permission denied"):
            open_source(str(folder))
        (folder / WNIDS[0]).chmod(0o755)
