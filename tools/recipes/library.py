"""Find recipes and studies: by path, or by the name of those that come with the program."""

import importlib.resources
import re
from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import RecipeError, UserError

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
_ALL_SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge", "huge")
_HOME = Path(str(importlib.resources.files("recipes")))
# The other YAML files are parts of recipes or data about them.
_RECIPE = re.compile(r"(?=.*^name:)(?=.*^(?:extends|stages):)", re.MULTILINE | re.DOTALL)
_STUDY = re.compile(r"(?=.*^name:)(?=.*^arms:)", re.MULTILINE | re.DOTALL)


def included_recipes() -> dict[str, Path]:
    """Name (such as convnextv2/huge-22k-512) -> file."""
    return _included(_RECIPE)


def included_studies() -> dict[str, Path]:
    """Name (such as studies/cifar10) -> file."""
    return _included(_STUDY)


def find_recipe(name: str) -> Path:
    """Find a recipe by path or by the name of an included one.

    A name may lack its folder if it is unique (huge-22k-512) or ConvNeXt V2's (base is convnextv2/base).

    Raises:
        RecipeError: if there is no such recipe.
    """
    return _find(name, included_recipes(), "recipe")


def find_study(name: str) -> Path:
    """Find a study, as `find_recipe` does recipes."""
    return _find(name, included_studies(), "study")


def _find(name: str, known: dict[str, Path], kind: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    names = {full.rpartition("/")[2]: full for full in reversed(known)} | dict(zip(known, known, strict=True))
    for full in (wanted, f"convnextv2/{wanted}"):
        if full in known:
            return known[full]
    same = [full for full in known if full.rpartition("/")[2] == wanted]
    if len(same) == 1:
        return known[same[0]]
    if name.endswith((".yaml", ".yml")) and not same:
        near = [names[name] for name in get_close_matches(wanted, names, n=3, cutoff=0.75)]  # a file was meant
    else:
        near = same or [names[name] for name in get_close_matches(wanted, names, n=3, cutoff=0.4)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    if Path(name).is_dir() and kind == "recipe":
        hint = "it is a folder; `fcmae pretrain` and `fcmae finetune` train on folders of images; "
    raise RecipeError(f"there is no {kind} {name}, as a file or included; {hint}`fcmae {kind} list` shows all")


def conflicts_file(path: Path) -> Path | None:
    """The conflicts.yaml that the comments of a recipe refer to, in its folder or the one above; None without one."""
    return next((p for p in (folder / "conflicts.yaml" for folder in path.resolve().parents[:2]) if p.exists()), None)


def _included(pattern: re.Pattern[str]) -> dict[str, Path]:
    if not _HOME.is_dir():
        raise UserError(f"{_HOME} is missing, and the included recipes are in it; install the program again")
    files = {str(p.relative_to(_HOME).with_suffix("")): p for p in _HOME.rglob("*.yaml")}
    return {name: files[name] for name in sorted(files, key=_by_size) if pattern.match(files[name].read_text())}


def _by_size(name: str) -> tuple[str, int, str]:
    folder, _, base = name.rpartition("/")
    size = next((number for number, size in enumerate(_ALL_SIZES) if size in base.split("-")), -1)
    return folder, size, base
