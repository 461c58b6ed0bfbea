"""The image checksum: its definition, and that it detects damage."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.image_checksum import checksum

NUMBERS = np.random.default_rng(0)


def polynomial(content: bytes) -> int:
    """Compute the checksum with Python's integers."""
    factor, lanes = 0x9E3779B1, [0] * 64
    for place, byte in enumerate(content):
        lanes[place % 64] = (lanes[place % 64] * factor + byte) % 2**32
    total = len(content)
    for lane in lanes:
        total = (total * factor % 2**32) ^ lane
        total ^= total >> 15
    return (total * factor % 2**32) >> 8


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_definition(content):
    assert checksum(np.frombuffer(content, np.uint8)) == polynomial(content)


def test_damage_is_seen():
    """Flipped bits, zeroed and moved pieces, and other lengths change the checksum."""
    content = NUMBERS.integers(0, 256, 3000, np.uint8)
    whole, unseen = checksum(content), 0
    for number in range(3000):
        changed = content.copy()
        place = NUMBERS.integers(0, 2900)
        if number % 3 == 0:
            changed[place] ^= 1 << number % 8
        elif number % 3 == 1:
            changed[place : place + 64] = 0
        else:
            changed[place : place + 64] = content[place - 64 : place] if place >= 64 else 1
        unseen += checksum(changed) == whole
    assert unseen == 0
    assert checksum(content[:-1]) != whole
    assert checksum(np.append(content, np.uint8(0))) != whole
    assert checksum(np.zeros(64, np.uint8)) != checksum(np.zeros(128, np.uint8))
