"""`fcmae verify --full` names what training would refuse in a file whose hashes are right."""

import shutil
import struct
from pathlib import Path

import pytest

from pipeline.data.beton import SAMPLE, SAMPLES_AT
from pipeline.errors import DataError
from tests.chaos.malformed_inputs import sign_again
from tests.support import tiny_data
from tools.verify.beton_file import verify_beton


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    tiny_data(place, train=8, validation=8)
    return place


@pytest.mark.parametrize(
    ("at", "content", "words"),
    [
        (1, struct.pack("<HH", 0, 0), "sample 3 (0x0 px, label 3) has no pixels"),
        (1, struct.pack("<HH", 65535, 65535), "sample 3 (65535x65535 px, label 3) is larger than the side-car"),
        (1, struct.pack("<HH", 24, 23), "sample 3 (24x23 px, label 3) holds raw pixels of another number"),
        (0, b"\x07", "sample 3 (24x24 px, label 3) is stored in a mode that is neither JPEG nor raw pixels"),
        (16, struct.pack("<q", 10**9), "sample 3 (24x24 px, label 1000000000) has a label without a class"),
        (16, struct.pack("<q", -1), "sample 3 (24x24 px, label -1) has a label without a class"),
        (16, struct.pack("<q", 2), "class stripes has 3 samples, and the side-car says 2"),
        (5, struct.pack("<Q", 2**63), "sample 3 (24x24 px, label 3) is not found where the sample table says"),
    ],
)  # fmt: skip
def test_a_row_that_training_cannot_use_is_named(whole, tmp_path, at, content, words):
    place = shutil.copytree(whole, tmp_path / "data")
    path = place / "train.beton"
    data = bytearray(path.read_bytes())
    row = SAMPLES_AT + 3 * SAMPLE.itemsize + at
    data[row : row + len(content)] = content
    path.write_bytes(data)
    sign_again(path)
    assert any(sentence.startswith(words) for sentence in verify_beton(path, full=True)[1])
    assert verify_beton(path)[1] == []  # the hashes alone are those of the side-car


def test_a_whole_file_has_no_odd_rows(whole):
    assert verify_beton(whole / "train.beton", full=True)[1] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 50_000, "has no readable side-car"),
        ('{"format_version": ' + "1" * 5000 + "}", "has no readable side-car"),
        ('{"format_version": [' + "1," * 1000 + "1]}", "has format_version"),
    ],
)
def test_a_side_car_that_is_none_is_named_in_a_short_sentence(whole, tmp_path, text, words):
    place = shutil.copytree(whole, tmp_path / "data")
    (place / "train.beton.json").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        verify_beton(place / "train.beton")
    assert len(str(error.value)) < 500
