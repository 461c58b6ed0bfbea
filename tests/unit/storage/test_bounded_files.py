"""Files, JSON and YAML that others wrote: bounded, and refused in words."""

import os

import pytest

from pipeline.storage.bounded_files import MOST_DEPTH, parse_json, parse_yaml, read_file, read_text
from pipeline.storage.run_records import decode_record, read_record


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert read_file(tmp_path / "file", 5) == read_file(tmp_path / "file", None) == b"12345"
    with pytest.raises(ValueError, match="holds more than"):
        read_file(tmp_path / "file", 4)
    for name in ("pipe", "loop", "/dev/zero", ".", "nowhere", "file/below"):
        with pytest.raises(OSError):  # noqa: PT011 (each system call has its own)
            read_file(tmp_path / name)
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="codec can't decode"):
        read_text(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 50_000, "nested"),
        ("[" * 500 + "]" * 500, "nested"),
        ('{"a":' * 80 + "1" + "}" * 80, "nested"),
        ("1" * 5000, "integer string conversion"),
        ("{", "Expecting"),
        (b"\xff\xfe\x00", "codec"),
    ],
)
def test_json_that_cannot_be_used_is_a_value_error(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    assert decode_record(text if isinstance(text, bytes) else text.encode(), words) == {}


def test_json_may_be_wide_and_as_deep_as_allowed():
    wide = "[" + ",".join(["[]"] * 1000) + "]"
    assert len(parse_json(wide)) == 1000
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", "an alias contains itself on line 1"),
        ("a: &a\n  b:\n    <<: *a", "an alias contains itself on line 3"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in
            zip("abcdef", "bcdefg", strict=True)), "100,000 values, aliases counted out, on line 5"),
        ("a: [" + "a," * 1_000_000 + "]", "100,000 values"),
        ("- " * 5000 + "a", "nested more than 64 deep on line 1"),
        ("a: " + "7" * 5000, "a number of 5,000 characters"),
        ("a: 1\nb: {c: 1, c: 2}", "the key c occurs twice on line 2"),
        ("a: !!bool maybe", "not what its tag says"),
        ("a: !!timestamp now", "not what its tag says"),
        ("a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: [", "on line 2"),
        ("? [a]\n: b", "unhashable key on line 1"),
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_used_is_a_value_error(text, words):
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_yaml_has_plain_values_and_merges():
    assert parse_yaml("a: 1e-3\nb: 2026-11-29\nc: 0x10") == {"a": 1e-3, "b": "2026-11-29", "c": 16}
    # A key that a merge brings may be set again, also through two merges.
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: {<<: [*b, *a]}"
    assert parse_yaml(text)["c"] == {"x": 3, "y": 1}
    assert parse_yaml(text)["d"] == {"x": 2, "y": 1}


def test_an_unreadable_record_is_named_once(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert read_record(path) == {}
    assert capsys.readouterr().err == ""
    path.write_text("[1]")
    assert read_record(path) == read_record(path) == {}
    said = capsys.readouterr().err
    assert said == f"{path} cannot be read (it holds no JSON object), so it counts as absent\n"
