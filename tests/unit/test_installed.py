"""`import fcmae` from an editable install and from a wheel, in directories that hold folders of the program's names."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fcmae
from tests.fitted import write_fitted_run, write_photos

ROOT = Path(fcmae.__file__).parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
ASK = """
import os, fcmae
print(os.path.realpath(fcmae.__file__), fcmae.load(os.environ["RUN"]).predict(os.environ["PHOTO"])[0][0].name)
"""


def install(folder: Path, form: str) -> tuple[Path, Path]:
    """A copy of the program, cloned as usual into a folder called fcmae, and an interpreter that it is installed in."""
    clone = folder / "fcmae"
    clone.mkdir(parents=True)
    for name in ("pipeline", "cluster", "recipes", "tools"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("fcmae.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, clone)
    (folder / "wheels").mkdir()
    built = subprocess.run(
        [sys.executable, "-c", BUILD, form, folder / "wheels"], cwd=clone, capture_output=True, text=True, check=True
    )
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    packages = Path(next((folder / "venv" / "lib").glob("python*/site-packages")))
    with zipfile.ZipFile(folder / "wheels" / built.stdout.split()[-1]) as wheel:
        wheel.extractall(packages)
    # The packages that this test runs with, after its own; what they say of an fcmae of theirs is not followed.
    libraries = {str(Path(torch.__file__).parents[1]), *site.getsitepackages()}
    (packages / "zz-libraries.pth").write_text("\n".join(libraries) + "\n")
    if form == "build_wheel":
        shutil.rmtree(clone / "build", ignore_errors=True)
    return python, packages if form == "build_wheel" else clone


@pytest.mark.slow
@pytest.mark.parametrize("form", ["build_editable", "build_wheel"])
def test_it_is_imported_right_from_any_directory(tmp_path, form):
    python, home = install(tmp_path / "installed", form)
    write_fitted_run(tmp_path / "run")
    write_photos(tmp_path / "photos")
    (tmp_path / "among folders" / "fcmae" / "docs").mkdir(parents=True)
    for trap in ("tools", "pipeline"):
        (tmp_path / "among traps" / trap).mkdir(parents=True)
        (tmp_path / "among traps" / trap / "__init__.py").write_text("raise SystemExit('a trap')")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"RUN": str(tmp_path / "run"), "PHOTO": str(tmp_path / "photos" / "rings.jpg")}
    places = [
        tmp_path / "among folders",
        tmp_path / "among traps",
        tmp_path / "installed",
        tmp_path / "installed" / "fcmae",
    ]
    for place in places:
        done = subprocess.run(
            [python, "-c", ASK], cwd=place, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (place, done.stderr)
        own = home if form == "build_editable" or place.name != "fcmae" else tmp_path / "installed" / "fcmae"
        assert done.stdout.split() == [f"{own.resolve()}/fcmae.py", "rings"], place
