"""Means and deviations of pixels, by which images are normalised for a model."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.errors import CheckpointError
from pipeline.recipe.settings_base import Limit, Settings


class ChannelStatistics(Settings):
    """The mean and the standard deviation of each channel, as shares of the highest level: 0.485 is level 123.675."""

    mean: tuple[Limit, ...] = Field(min_length=1)
    std: tuple[Limit, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean {list(self.mean)} and std {list(self.std)} must both hold three numbers, or one for all channels"
            )
        if not all(0 <= value <= 1 for value in self.mean) or not all(0 < value <= 1 for value in self.std):
            raise ValueError(
                f"mean {list(self.mean)} and std {list(self.std)} must lie between 0 and 1, std above 0; divide values"
                " of 0 to 255 by 255"
            )
        return self

    @classmethod
    def of_weights(cls, facts: Mapping[str, Any], channels: int = 3) -> Self:
        """Return the statistics that weights were trained with, from the facts of their file; ImageNet's without any.

        channels: of the model.

        Raises:
            CheckpointError: if the file names numbers that are none.
        """
        if not ("mean" in facts and "std" in facts):
            return IMAGENET.for_channels(channels)
        try:
            return cls(mean=tuple(facts["mean"]), std=tuple(facts["std"])).for_channels(channels)
        except (TypeError, ValueError):
            raise CheckpointError(
                f"the weights name mean {facts['mean']!r} and std {facts['std']!r}, which are not one number or three"
                " between 0 and 1; export them again from their run"
            ) from None

    def __str__(self) -> str:
        """The notation of a recipe."""
        return f"{{mean: {list(self.mean)}, std: {list(self.std)}}}"

    @property
    def facts(self) -> dict[str, list[float]]:
        """The entries of a weights file's facts; none for ImageNet's, which files without them have."""
        return {} if self == IMAGENET else {"mean": list(self.mean), "std": list(self.std)}

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean as a colour of 8 bits: RandAugment's operations fill empty places with it."""
        red, green, blue = (round(255 * value) for value in self.for_channels(3).mean)
        return red, green, blue

    def for_channels(self, channels: int) -> Self:
        """Return the statistics for a model of so many channels; one number serves all of them.

        The grey statistics of three channels are their averages: of ImageNet's, 0.449 and 0.226.
        """
        if channels == len(self.mean):
            return self
        if len(self.mean) == 1:
            return type(self)(mean=self.mean * channels, std=self.std * channels)
        mean, std = (round(sum(values) / len(values), 6) for values in (self.mean, self.std))
        return type(self)(mean=(mean,), std=(std,))


IMAGENET = ChannelStatistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""ImageNet's, which published weights expect."""
