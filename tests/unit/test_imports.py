"""Imports run downwards only, never in a circle, and heavy libraries stay where they are used.

Read from the sources (ast), so that nothing needs to be installed and a branch that never runs counts too. An import is
*lazy* inside a function or under `if TYPE_CHECKING`: it does not happen when the file is loaded. Lazy imports count for
the direction, for who knows whom does not depend on the moment. They do not count for circles: Python can load the
files, and a registry that looks up its members when asked is the honest use of one.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "recipes", "cluster", "tools")  # from the ground up
# What these packages may use beside themselves and the standard library: they work on a machine that has torch alone.
SELF_CONTAINED = {"pipeline.models": ("torch", "pipeline.sparse"), "pipeline.sparse": ("torch",)}
# Slow to load or absent on many machines: loaded inside functions, or by a module that bears the library's name.
HEAVY = ("deepspeed", "mlflow", "spconv", "triton")


class Import(NamedTuple):
    module: str  # who
    target: str  # whom: a file of the project where it is one, else the dotted name as written
    lazy: bool
    line: int


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted names of all project files below `root`; a package is its __init__.py."""
    files = (path for room in ROOMS for path in sorted((root / room).rglob("*.py")))
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports_of(modules: dict[str, Path], module: str) -> Iterator[Import]:
    path = modules[module]

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            # `from package import name` loads package.name when that is a file, and only the package otherwise.
            names = [f"{base}.{alias.name}" for alias in node.names]
            return [name if name in modules else base for name in names]
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return []

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for target in dict.fromkeys(targets(node)):
            yield Import(module, target, lazy, node.lineno)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, lazy)
            return
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy)

    yield from walk(ast.parse(path.read_text(), str(path)), False)


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` leads to; `start` itself only by way of a circle."""
    seen: set[str] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(edges.get(name, ()))
    return seen


def violations(root: Path) -> list[str]:
    """One sentence for each import that breaks a rule."""
    modules = modules_of(root)
    imports = [found for module in modules for found in imports_of(modules, module)]
    return [*against_direction(imports), *beyond_torch(imports), *circles(modules, imports), *heavy(modules, imports)]


def against_direction(imports: list[Import]) -> Iterator[str]:
    for module, target, _, line in imports:
        room, target_room = module.split(".")[0], target.split(".")[0]
        if target_room == "tests":
            yield f"{module}:{line} imports {target}: tests are not part of the program"
        elif target_room in ROOMS and ROOMS.index(target_room) > ROOMS.index(room):
            yield f"{module}:{line} imports {target}: {room} is below {target_room}"
        elif target_room == "submitit" and room == "pipeline":
            yield f"{module}:{line} imports {target}: pipeline knows nothing of Slurm"


def beyond_torch(imports: list[Import]) -> Iterator[str]:
    for module, target, _, line in imports:
        if module == "pipeline":  # its __init__ is loaded before any file of the self-contained packages
            package, allowed = "pipeline", ("torch",)
        else:
            package = next((name for name in SELF_CONTAINED if is_within(module, name)), "")
            if not package:
                continue
            allowed = (*SELF_CONTAINED[package], package)
        library = target.split(".")[0]
        if library in sys.stdlib_module_names or library in HEAVY:  # `heavy` has the rule for these
            continue
        if not any(is_within(target, name) for name in allowed):
            yield f"{module}:{line} imports {target}: {package} may use only {', '.join(allowed)}"


def circles(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        if not found.lazy and found.target in modules:
            edges[found.module].add(found.target)
    reach = {module: reachable(edges, module) for module in modules}
    in_circles = [module for module in modules if module in reach[module]]
    while in_circles:
        first = in_circles[0]
        members = [module for module in in_circles if first in reach[module] and module in reach[first]]
        yield f"{', '.join(members)} import each other in a circle"
        in_circles = [module for module in in_circles if module not in members]


def heavy(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    loads: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        if not found.lazy:
            name = found.target
            loads[found.module].add(name if name in modules else name.split(".")[0])
    for module in modules:  # loading a.b.c loads a and a.b first
        loads[module] |= {parent for parent in modules if is_within(module, parent) and parent != module}
    for module in modules:
        for library in HEAVY:
            if library in reachable(loads, module) and library not in module:
                yield f"{module} loads {library} as soon as it is imported: import it where it is used"


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for folder in path.relative_to(root).parents:
            if folder.parts and not (root / folder / "__init__.py").exists():
                (root / folder / "__init__.py").write_text("")


def test_project_keeps_its_rules():
    assert violations(REPOSITORY) == []


def test_project_is_really_read():
    modules = modules_of(REPOSITORY)
    assert Import("cluster.launcher", "pipeline.errors", False, 0) in [
        found._replace(line=0) for found in imports_of(modules, "cluster.launcher")
    ]
    assert set(ROOMS) == {name for name in modules if "." not in name}


PLANTED = {
    "upwards": ({"pipeline/a.py": "import cluster.slurm", "cluster/slurm.py": ""}, "pipeline is below cluster"),
    "upwards in a function": (
        {"cluster/a.py": "def f():\n    from tools import cli", "tools/cli.py": ""},
        "cluster.a:2 imports tools.cli: cluster is below tools",
    ),
    "upwards for types only": (
        {"recipes/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cluster"},
        "recipes is below cluster",
    ),
    "upwards by name": ({"pipeline/a.py": "import importlib\nimportlib.import_module('tools.cli')"}, "below tools"),
    "upwards by dots": ({"pipeline/data/a.py": "from ...cluster import slurm"}, "pipeline is below cluster"),
    "tests": ({"tools/a.py": "from tests.support import x"}, "tests are not part"),
    "circle of two": (
        {"pipeline/a.py": "import pipeline.b", "pipeline/b.py": "from pipeline import a"},
        "pipeline.a, pipeline.b import each other",
    ),
    "circle of three in a folder": (
        {
            "pipeline/data/a.py": "from . import b",
            "pipeline/data/b.py": "from .c import x",
            "pipeline/data/c.py": "try:\n    from pipeline.data.a import y\nexcept ImportError:\n    pass",
        },
        "pipeline.data.a, pipeline.data.b, pipeline.data.c import each other",
    ),
    "circle through the package": (
        {"pipeline/data/__init__.py": "from pipeline.data.a import x", "pipeline/data/a.py": "from . import y"},
        "pipeline.data, pipeline.data.a import each other",
    ),
    "itself": ({"pipeline/a.py": "import pipeline.a"}, "pipeline.a import each other"),
    "models beyond torch": ({"pipeline/models/a.py": "import numpy"}, "may use only torch"),
    "models beyond torch in a function": ({"pipeline/models/a.py": "def f():\n    import pydantic"}, "may use only"),
    "models and the pipeline": ({"pipeline/models/a.py": "from pipeline.errors import UserError"}, "may use only"),
    "sparse and models": ({"pipeline/sparse/a.py": "from ..models import b"}, "pipeline.sparse may use only torch"),
    "behind models": ({"pipeline/__init__.py": "import yaml"}, "pipeline may use only torch"),
    "submitit": ({"pipeline/a.py": "def f():\n    from submitit.helpers import x"}, "knows nothing of Slurm"),
    "heavy": ({"pipeline/tracking/a.py": "import mlflow.entities"}, "pipeline.tracking.a loads mlflow"),
    "heavy by way of its own module": (
        {"pipeline/tracking/mlflow.py": "import mlflow", "tools/cli.py": "from pipeline.tracking import mlflow"},
        "tools.cli loads mlflow",
    ),
    "heavy by way of a package": (
        {
            "pipeline/engines/__init__.py": "from . import deepspeed",
            "pipeline/engines/deepspeed.py": "import deepspeed",
        },
        "pipeline.engines loads deepspeed",
    ),
}


@pytest.mark.parametrize(("files", "sentence"), PLANTED.values(), ids=PLANTED)
def test_planted_violation_is_found(tmp_path, files, sentence):
    write_tree(tmp_path, files)
    assert any(sentence in found for found in violations(tmp_path)), violations(tmp_path)


def test_what_is_allowed_stays_allowed(tmp_path):
    write_tree(
        tmp_path,
        {
            "tools/cli.py": "import rich\nfrom cluster import slurm\nfrom pipeline import run",
            "cluster/slurm.py": "import submitit\nfrom pipeline.run import run_stage",
            "pipeline/run.py": "from pipeline.a import x\ndef track():\n    from pipeline.tracking import mlflow",
            # A lazy import back is no circle.
            "pipeline/a.py": "def x():\n    from pipeline import run",
            "pipeline/tracking/mlflow.py": "import mlflow",
            "pipeline/models/__init__.py": "from pipeline.models.b import create",
            "pipeline/models/b.py": "import math\nimport torch.nn as nn\nfrom pipeline.sparse.dense import Dense",
            "pipeline/sparse/dense.py": "import torch\ndef kernel():\n    from pipeline.sparse import triton_kernel",
            "pipeline/sparse/triton_kernel.py": "import torch, triton",
        },
    )
    assert violations(tmp_path) == []
