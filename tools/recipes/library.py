"""The recipes and studies that come with the program, by name."""

import importlib.resources
import re
from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import RecipeError, UserError

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
_HOME = Path(str(importlib.resources.files("recipes")))
# Other files are parts of recipes, or data about them.
_RECIPE = re.compile(r"(?=.*^name:)(?=.*^(?:extends|stages):)", re.MULTILINE | re.DOTALL)
_STUDY = re.compile(r"(?=.*^name:)(?=.*^arms:)", re.MULTILINE | re.DOTALL)


def included_recipes() -> dict[str, Path]:
    """Name -> file, such as convnextv2/huge-22k-512."""
    return _included(_RECIPE)


def included_studies() -> dict[str, Path]:
    """Name -> file, such as studies/cifar10."""
    return _included(_STUDY)


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of an included one: slak/tiny; huge-22k-512 where only one is called so; base is
    ConvNeXt V2's.

    Raises:
        RecipeError: if there is neither.
    """
    return _find(name, included_recipes(), "recipe")


def find_study(name: str) -> Path:
    """As `find_recipe`, for studies."""
    return _find(name, included_studies(), "study")


def _find(name: str, known: dict[str, Path], what: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    asked = name.removesuffix(".yaml").removeprefix("recipes/")
    for full in (asked, f"convnextv2/{asked}"):
        if full in known:
            return known[full]
    found = [path for own, path in known.items() if own.rpartition("/")[2] == asked]
    if len(found) == 1:
        return found[0]
    near = [n for n in known if n.rpartition("/")[2] == asked] or get_close_matches(asked, known, n=3, cutoff=0.4)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise RecipeError(
        f"there is no {what} {name}, neither as a file nor by that name; {meant}`fcmae {what} list` shows all"
    )


def conflicts_beside(path: Path) -> Path | None:
    """The list of conflicts that the comments of a recipe refer to, if it or what is around it has one."""
    return next((p for p in (folder / "conflicts.yaml" for folder in path.resolve().parents[:2]) if p.exists()), None)


def _included(pattern: re.Pattern[str]) -> dict[str, Path]:
    if not _HOME.is_dir():
        raise UserError(f"{_HOME} is no directory, so the included recipes cannot be found; install the program anew")
    files = {str(p.relative_to(_HOME).with_suffix("")): p for p in _HOME.rglob("*.yaml")}
    return {name: files[name] for name in sorted(files, key=_by_size) if pattern.match(files[name].read_text())}


def _by_size(name: str) -> tuple[str, int, str]:
    folder, _, own = name.rpartition("/")
    size = next((place for place, size in enumerate(SIZES) if size in own.split("-")), -1)
    return folder, size, own
