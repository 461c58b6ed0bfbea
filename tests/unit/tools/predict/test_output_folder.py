"""The folder of a prediction holds its own files, and those that others put there or changed."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from tools.predict.output_folder import INDEX, OutputFolder


def predict(path: Path, files: dict[str, bytes], **options) -> list[str]:
    folder = OutputFolder(path, **options)
    for name, content in files.items():
        folder.add(name, content).write_bytes(content)
    return list(folder.notes(["maps", "overlays"]))


def names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*")} - {INDEX}


def test_files_of_an_earlier_prediction_are_removed_and_those_of_others_stay(tmp_path) -> None:
    out = tmp_path / "new" / "seen"
    assert (
        predict(out, {"classes.txt": b"a", "maps/x/one.png": b"1", "maps/two.png": b"2", "overlays/two.png": b"3"})
        == []
    )
    (out / "maps" / "two.png").write_bytes(b"corrected by hand")
    (out / "maps" / "other.png").write_bytes(b"2")
    notes = predict(out, {"maps/three.png": b"4", "maps/\udcff.png": b"5"})
    assert names(out) == {"maps", "maps/two.png", "maps/other.png", "maps/three.png", "maps/\udcff.png"}
    assert notes == [
        f"{out}: 3 files of an earlier prediction removed",
        f"{out / 'maps'} also holds 2 files that this command did not write; they are left there",
    ]
    assert predict(out, {"maps/three.png": b"4"})[0] == f"{out}: 2 files of an earlier prediction removed"
    assert names(out) == {"maps", "maps/two.png", "maps/other.png", "maps/three.png"}


def test_images_that_are_read_stay(tmp_path) -> None:
    predict(tmp_path, {"overlays/a.png": b"1", "overlays/b.png": b"2"})
    predict(tmp_path, {}, keep=[])
    assert names(tmp_path) == {"overlays", "overlays/a.png", "overlays/b.png"}  # as no file is added
    predict(tmp_path, {"c": b"3"}, keep=[f"{tmp_path}/overlays/../overlays/a.png"])
    assert names(tmp_path) == {"overlays", "overlays/a.png", "c"}


def test_files_of_a_killed_prediction_are_known(tmp_path) -> None:
    folder = OutputFolder(tmp_path)
    folder.add("maps/a.png", b"1").write_bytes(b"1")
    folder.add("maps/b.png", b"2")  # killed before it was written
    with (tmp_path / INDEX).open("a") as index:
        index.write('{"path": "maps/c.p')
    predict(tmp_path, {"c": b"3"})
    assert names(tmp_path) == {"c"}


def test_an_index_removes_nothing_outside_of_its_folder(tmp_path) -> None:
    (tmp_path / "mine.png").write_bytes(b"1")
    out = tmp_path / "seen"
    predict(out, {"link.png": b"1"})
    (out / "link.png").unlink()
    (out / "link.png").symlink_to(tmp_path / "mine.png")
    line = (out / INDEX).read_text()
    for path in ("../mine.png", str(tmp_path / "mine.png"), "maps/../../mine.png"):
        with (out / INDEX).open("a") as index:
            index.write(line.replace("link.png", path))
    predict(out, {"c": b"3"})
    assert (tmp_path / "mine.png").read_bytes() == b"1"
    assert (out / "link.png").is_symlink()


@pytest.mark.parametrize("line", ["{}", "[]", "x", '{"path": 3, "sha256": ""}', "[" * 100_000])
def test_a_damaged_index_is_refused_in_one_sentence(tmp_path, line) -> None:
    (tmp_path / INDEX).write_text(line + "\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl is damaged; give another --out"):
        predict(tmp_path, {"maps/a.png": b"1"})
