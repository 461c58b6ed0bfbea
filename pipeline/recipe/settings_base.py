"""The base of all sections of a recipe or a site, and the kinds of their fields.

Every number has a lower and an upper bound: in its `Field`, or as one of the types below. The bounds are wide: they
keep out what cannot be meant (1e300 epochs) or computed with, not what is unusual.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_STEPS = 999_999_999  # the names of checkpoints have nine digits
MOST_EPOCHS = 1_000_000
MOST_CHANNELS = 65_536
YEAR_SECONDS = 366 * 86_400

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Percent = Annotated[float, Field(ge=0, le=100)]
Limit = Annotated[float, Field(ge=-1e9, le=1e9)]
"""A value to compare a measured one with."""


def _check_ascending(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"{list(span)} is no range; write the smaller number first")
    return span


ASCENDING = AfterValidator(_check_ascending)
"""For pairs of numbers that are a range."""


def operational(default: Any, **constraints: Any) -> Any:
    """Declare a field that may change on resume, because it does not change the computed function."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def added(default: Any, *equal: Any, **constraints: Any) -> Any:
    """Declare a field that older recipes lack: at its default the fingerprint is that of a recipe without the field.

    equal: other values that compute the same as the default.
    """
    return Field(default, json_schema_extra={"same_as_absent": [default, *equal]}, **constraints)


class Settings(BaseModel):
    """The base of all sections: unknown keys, values of other types, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
