"""Fixtures: a checkpoint store, as in the tests of checkpoints."""

from tests.unit.checkpoint.conftest import events, held, open_store, state_of  # noqa: F401
