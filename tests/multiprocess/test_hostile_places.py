"""The commands, started as a person starts them, where a user may happen to be: among modules of the same names, and
without a home directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.support import tiny_image, tiny_recipe

# Modules of Python's library, of packages, and of ours; both as files and as packages.
TRAPS = (
    "queue", "random", "json", "typing", "copy", "logging", "torch", "numpy", "numba", "ffcv", "mlflow", "rich", "PIL",
    "sitecustomize", "usercustomize", "pipeline", "cluster", "recipes", "tools", "tests", "fcmae",
)  # fmt: skip
COMMAND = Path(sys.executable).with_name("fcmae")


@pytest.fixture
def place(tmp_path):
    """A directory full of traps: each notes in the file `caught` that it was imported, and fails."""
    folder = tmp_path / "place"
    for number, name in enumerate(TRAPS):
        trap = folder / f"{name}.py" if number % 2 else folder / name / "__init__.py"
        trap.parent.mkdir(parents=True, exist_ok=True)
        trap.write_text(f"open({str(tmp_path / 'caught')!r}, 'a').write(__file__); raise ImportError('a trap')\n")
    return folder


def run(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(place.parent)}
    for name in ("HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    logs = "\n".join(path.read_text() for path in place.glob("run/*/logs/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done


@pytest.mark.slow  # without a home, the decoder is compiled anew
def test_nothing_of_the_users_directory_is_imported(place, tmp_path):
    for number in range(64):
        pixels, label = tiny_image(number)
        image = place / "photos" / f"class{label}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image)
    recipe = tiny_recipe(Path("."))
    recipe["stages"] = {"intermediate": {**recipe["stages"]["intermediate"], "schedule": {"epochs": 1}}}
    recipe["defaults"]["tracking"]["mlflow"] = True
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run(place, "prepare", "photos", "train.beton", "--workers", 2)
    run(place, "prepare", "photos", "validation.beton")
    run(place, "run", "tiny.yaml", "--out", "run", "--nproc", 2)
    evaluated = run(place, "evaluate", "run", "--data", "validation.beton", "--nproc", 2)
    assert "top-1" in evaluated.stdout
    run(place, "report", "run")
    assert (place / "run" / "mlflow.db").exists()
    assert not (tmp_path / "caught").exists(), (tmp_path / "caught").read_text()
