"""The notation in which recipes name an augmentation."""

import re
from dataclasses import dataclass
from typing import Self

MOST_MAGNITUDE = 10.0


@dataclass(frozen=True)
class RandAugmentSettings:
    """magnitude and deviation: the normal distribution of the magnitude; probability: of each of the two operations."""

    magnitude: float
    deviation: float = 0.0
    probability: float = 0.5

    @classmethod
    def parse(cls, text: str) -> Self:
        """From timm's notation: `rand-m9-mstd0.5-inc1`, `p` for the probability. Errors: ValueError naming the part."""
        head, *parts = text.split("-")
        found: dict[str, float] = {}
        for part in parts:
            match = re.fullmatch(r"(m|mstd|inc|p)(\d+(?:\.\d+)?)", part)
            if match is None or match[1] in found:
                raise ValueError(
                    f"{part!r} of {text!r} is not supported; write mM, mstdS, pP and inc1, as in rand-m9-mstd0.5-inc1"
                )
            found[match[1]] = float(match[2])
        if head != "rand" or found.get("inc") != 1 or "m" not in found:
            raise ValueError(f"{text!r} is not supported: only rand-m...-inc1 is, as in rand-m9-mstd0.5-inc1")
        if found["m"] > MOST_MAGNITUDE or found.get("mstd", 0) > 100 or found.get("p", 0) > 1:
            raise ValueError(f"{text!r} is not supported: m is at most 10, mstd at most 100, p at most 1")
        return cls(found["m"], found.get("mstd", 0.0), found.get("p", 0.5))
