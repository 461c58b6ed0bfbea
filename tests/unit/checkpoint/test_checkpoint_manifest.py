import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.checkpoint.manifest import CheckpointName, FileRecord, Manifest, commit_record

names = st.builds(CheckpointName, attempt=st.integers(0, 999_999), step=st.integers(0, 999_999_999))


@given(names)
def test_a_name_is_read_as_it_was_written(name):
    assert CheckpointName.parse(str(name)) == name


@example("step-000000000.00000\u0660")  # a digit outside ASCII
@given(st.one_of(st.text(), st.from_regex(r"step-\d{1,12}\.\d{1,8}.?", fullmatch=True)))
def test_only_the_exact_text_of_a_name_is_one(text):
    name = CheckpointName.parse(text)
    assert name is None or (str(name) == text and text.isascii())


def test_a_later_attempt_is_newer_even_at_an_earlier_step():
    assert max(CheckpointName(attempt=2, step=10), CheckpointName(attempt=1, step=20)).attempt == 2


@given(names, st.dictionaries(st.text(min_size=1).filter(lambda key: "/" not in key), st.integers(0, 2**50)))
def test_a_manifest_is_read_as_it_was_written(name, sizes):
    files = {key: FileRecord(size, "00") for key, size in {**sizes, ".metadata": 1}.items()}
    manifest = Manifest(name, files, {"why": "end", "step": name.step})
    assert Manifest.decode(manifest.encode()) == manifest


json_values = st.recursive(
    st.one_of(st.none(), st.integers(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(st.sampled_from(["name", "files", "facts", "bytes", "sha256", "a"]), inner)
    ),
)


@given(st.one_of(st.binary(), json_values.map(lambda value: json.dumps(value).encode())))
def test_anything_else_is_refused_with_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r".+"):
        Manifest.decode(text)


def test_the_commit_record_depends_on_every_byte_of_the_manifest():
    assert len({commit_record(text) for text in (b"{}", b"{} ", b"")}) == 3
