"""RandAugment as a recipe writes it, in timm's notation: `rand-m9-mstd0.5-inc1`."""

import re
from dataclasses import dataclass
from typing import Self

MOST_MAGNITUDE = 10.0


@dataclass(frozen=True)
class RandAugmentSettings:
    """The magnitude's normal distribution, and the probability that each of an image's two operations is applied."""

    magnitude: float
    deviation: float = 0.0
    probability: float = 0.5

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read timm's notation: `m` for the magnitude, `mstd` for its deviation, `p` for the probability.

        Raises:
            ValueError: naming the part that is not supported.
        """
        head, *parts = text.split("-")
        values: dict[str, float] = {}
        for part in parts:
            match = re.fullmatch(r"(m|mstd|inc|p)(\d+(?:\.\d+)?)", part)
            if match is None or match[1] in values:
                raise ValueError(
                    f"{part!r} of {text!r} is not supported; write mM, mstdS, pP and inc1, as in rand-m9-mstd0.5-inc1"
                )
            values[match[1]] = float(match[2])
        if head != "rand" or values.get("inc") != 1 or "m" not in values:
            raise ValueError(f"{text!r} is not supported: only rand-m...-inc1 is, as in rand-m9-mstd0.5-inc1")
        settings = cls(values["m"], values.get("mstd", 0.0), values.get("p", 0.5))
        if settings.magnitude > MOST_MAGNITUDE or settings.deviation > 100 or settings.probability > 1:
            raise ValueError(f"{text!r} is not supported: m is at most 10, mstd at most 100, p at most 1")
        return settings
