"""Hypothesis looks further on a person's machine; in CI it repeats itself, so that a red run is the change's fault."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")
