import uuid

import pytest

from pipeline.errors import StageError
from pipeline.storage.folder import Folder
from pipeline.storage.working_copy import Mirror, remote_of, working_copy


@pytest.fixture
def on(tmp_path, monkeypatch):
    """The working copy of one run on a machine of a name."""
    url = f"memory://{uuid.uuid4().hex}/run"

    def on(machine):
        monkeypatch.setenv("FCMAE_MIRROR", str(tmp_path / machine))
        return working_copy(url)

    return on


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_path_is_its_own_working_copy(tmp_path):
    assert working_copy(tmp_path) == tmp_path
    assert remote_of(tmp_path) is None


def test_what_one_machine_wrote_another_one_finds(on):
    one = on("one")
    assert not one.exists(), "an empty run is no directory yet"
    write(one / "recipe.yaml", "name: x")
    write(one / "pretrain" / "journal.jsonl", "1\n")
    write(one / "pretrain" / "attempts" / "000001.json", "not from here")
    uploads = Mirror(one, remote_of(one))
    uploads.push()
    other = on("other")
    assert (other / "recipe.yaml").read_text() == "name: x"
    assert (other / "pretrain" / "journal.jsonl").read_text() == "1\n"
    assert not (other / "pretrain" / "attempts").exists()
    write(one / "pretrain" / "journal.jsonl", "1\n2\n")
    uploads.push()
    assert (on("other") / "pretrain" / "journal.jsonl").read_text() == "1\n2\n"


def test_a_file_that_goes_away_meanwhile_is_none_to_send(on, monkeypatch):
    one = on("one")
    write(one / "a.txt", "stays")
    write(one / "b.txt", "goes")
    write(one / "c.txt", "stays too")
    publish = Folder.publish

    def publish_while_b_goes(folder, name, data, **options):
        (one / "b.txt").unlink(missing_ok=True)
        publish(folder, name, data, **options)

    monkeypatch.setattr(Folder, "publish", publish_while_b_goes)
    Mirror(one, remote_of(one)).push()
    other = on("other")
    assert sorted(path.name for path in other.iterdir() if path.suffix == ".txt") == ["a.txt", "c.txt"]


def test_a_stage_knows_its_place_in_the_store(on):
    one = on("one")
    assert str(remote_of(one / "pretrain")) == f"{remote_of(one)}/pretrain"


def test_a_tail_that_was_not_uploaded_yet_stays(on):
    one = on("one")
    write(one / "journal.jsonl", "1\n")
    Mirror(one, remote_of(one)).push()
    write(one / "journal.jsonl", "1\n2\n")
    assert (on("one") / "journal.jsonl").read_text() == "1\n2\n"
    write(one / "journal.jsonl", "another")
    assert (on("one") / "journal.jsonl").read_text() == "1\n"


def test_done_goes_last_and_unchanged_files_do_not_go_again(on, monkeypatch):
    one, sent = on("one"), []
    for name in ("DONE", "a", "z/b"):
        write(one / name, name)
    publish = Folder.publish
    monkeypatch.setattr(Folder, "publish", lambda folder, name, data: (sent.append(name), publish(folder, name, data)))
    uploads = Mirror(one, remote_of(one))
    uploads.push()
    uploads.push()
    assert sent[-1] == "DONE"
    assert len(sent) == 3


def test_a_store_that_does_not_answer_is_one_sentence(on, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no answer")

    folder = remote_of(on("one"))
    monkeypatch.setattr(type(folder.fs), "find", fail)
    with pytest.raises(StageError, match=r"cannot be read \(ConnectionError: no answer\)"):
        on("one")
