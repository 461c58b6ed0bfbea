"""Counter-based random numbers: each draw is a hash of its purpose and place, so no generator state has to be saved.

A key is a chain of 64-bit mixes, `key(seed, epoch, sample_id, purpose)`. The same functions run on numpy arrays and,
compiled, inside the image decoder; `mix64_tensor` runs on torch tensors. The mix is the finaliser of SplitMix64
(Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

import hashlib
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_UNMIX_1, _UNMIX_2 = np.uint64(pow(int(_MIX_1), -1, 2**64)), np.uint64(pow(int(_MIX_2), -1, 2**64))
_S27, _S30, _S31, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_TO_UNIT = 2.0**-53


class Purpose(IntEnum):
    """The purpose of a draw, a part of its key: draws for two purposes are independent."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    MIX = 5
    DROP_PATH = 6
    AUGMENT = 7
    ERASE = 8
    ERASE_NOISE = 9
    SCENE_SIZE = 10
    PHOTOMETRIC = 11
    DROPOUT = 12
    OBJECT_SIZE = 13
    SAMPLE_OBJECTS = 14
    SUBSET = 20
    MEASURE = 21
    SPARSITY = 30


def mix64(x):
    """Return one SplitMix64 step of uint64 values: numpy arrays, or a scalar inside numba."""
    z = x + _GAMMA
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


def unmix64(z: np.ndarray) -> np.ndarray:
    """Return the x of `mix64(x) = z`. The mix is a bijection, so a hash of one number can be turned back into it."""
    for shift, inverse in ((_S31, _UNMIX_2), (_S27, _UNMIX_1), (_S30, np.uint64(1))):
        z = (z ^ (z >> shift) ^ (z >> (shift + shift))) * inverse
    return z - _GAMMA


def mix64_tensor(x: "Tensor") -> "Tensor":
    """Return the bits of `mix64` for an int64 tensor, on its device.

    torch has no unsigned integers to compute with, so each right shift clears the copies of the sign bit.
    """
    z = x + as_int64(int(_GAMMA))
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * as_int64(int(_MIX_1))
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * as_int64(int(_MIX_2))
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def as_int64(x: int) -> int:
    """Return the signed number with the same 64 bits as an unsigned one."""
    return x - (1 << 64) if x >> 63 else x


def key(*parts) -> np.ndarray:
    """Return the uint64 key of integer parts. Arrays among the parts broadcast: sample ids (n,) give keys (n,)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix64(state ^ mix64(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return state if any(np.ndim(part) for part in parts) else state[0:1].reshape(())


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` float64 numbers in [0, 1) for each key: shape `keys.shape + (count,)`.

    Number n is a hash of (key, n).
    """
    counter = mix64(np.arange(count, dtype=np.uint64))
    return (mix64(np.asarray(keys, np.uint64)[..., None] ^ counter) >> _S11).astype(np.float64) * _TO_UNIT


def text_key(*parts: object) -> int:
    """Return a 63-bit key of text, for example a tensor's name; the same on every machine and in every process."""
    # A file name may hold bytes that are not valid text.
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") >> 1
