"""The base of all sections of a recipe, and the kinds of their fields."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def operational(default: Any, **constraints: Any) -> Any:
    """Declare a field that may change on resume, because it does not change the computed function."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def added(default: Any, *equal: Any, **constraints: Any) -> Any:
    """Declare a field that older recipes lack: at its default the fingerprint is that of a recipe without the field.

    equal: other values that compute the same as the default.
    """
    return Field(default, json_schema_extra={"same_as_absent": [default, *equal]}, **constraints)


class Settings(BaseModel):
    """The base of all sections: unknown keys and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
