"""Imports run down the floors of the house, never in a circle, and heavy libraries load where they are used.

The rules read the sources (ast), so nothing needs to be installed and a branch that never runs counts too. Imports
inside functions and for types count as much as the others: who knows whom does not depend on the moment.
"""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# From the top floor to the ground. A room may import from the rooms after it.
FLOORS = (
    "fcmae", "tools", "cluster", "recipes", "pipeline.run", "pipeline.rehearsal", "pipeline.training",
    "pipeline.health", "pipeline.tracking", "pipeline.cost", "pipeline.engines", "pipeline.objectives",
    "pipeline.checkpoint", "pipeline.weights", "pipeline.models", "pipeline.sparse", "pipeline.kernels",
    "pipeline.data", "pipeline.optim", "pipeline.stage", "pipeline.recipe", "pipeline.storage",
    "pipeline.distributed", "pipeline.errors", "pipeline.url_secrets", "pipeline.randomness", "pipeline",
)  # fmt: skip
# These rooms work on a machine that has torch alone, with numpy, which the hashes of pipeline.randomness need.
TORCH_ALONE = ("pipeline.models", "pipeline.sparse", "pipeline.kernels")
# Slow to load or absent on many machines: loaded inside functions, or by a module that bears the library's name.
HEAVY = ("deepspeed", "mlflow", "spconv", "triton")
# The same in the rooms of TORCH_ALONE, whose loops for the CPU it compiles; data/ loads it everywhere.
COMPILERS = ("numba",)
# What engines must never load, however indirectly: they run where the data loader is not installed.
WITHOUT_FFCV = "pipeline.engines"
# What starts beside every rank, or for every job and command: importing torch takes seconds.
WITHOUT_TORCH = (
    "pipeline.health.sentinel", "pipeline.tracking.forwarder", "cluster.slurm.supervisor", "cluster.slurm.worker",
    "tools.cli",
)  # fmt: skip


class Import(NamedTuple):
    module: str
    target: str  # a module of the project where there is one, else the dotted name as written
    lazy: bool  # inside a function: not executed when the module is loaded
    line: int


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor(module: str) -> int | None:
    """The place of a module's room in FLOORS; None for foreign modules and for `pipeline` rooms without a floor."""
    return next((place for place, room in enumerate(FLOORS[:-1]) if is_within(module, room)), None)


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted names of all project files below `root`; a package is its __init__.py."""
    rooms = ("pipeline", "recipes", "cluster", "tools")
    files = [*root.glob("fcmae.py"), *(path for room in rooms for path in sorted((root / room).rglob("*.py")))]
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
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from package import name` loads package.name when that is a file, and only the package otherwise.
            names = [f"{base}.{alias.name}" for alias in node.names]
            return [name if name in modules else base for name in names]
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return []

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for target in dict.fromkeys(targets(node)):
            yield Import(module, target, lazy, node.lineno)
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
    return [*upwards(modules, imports), *beyond_torch(imports), *circles(modules, imports), *heavy(modules, imports)]


def upwards(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    for module in modules:
        if floor(module) is None and module != "pipeline":
            yield f"{module} is on no floor: give its room a place in FLOORS"
    for module, target, _, line in imports:
        here, there = floor(module), floor(target)
        if is_within(target, "tests"):
            yield f"{module}:{line} imports {target}: tests are not part of the program"
        elif is_within(target, "submitit") and is_within(module, "pipeline"):
            yield f"{module}:{line} imports {target}: pipeline knows nothing of Slurm"
        elif there is not None and (here is None or there < here):
            yield f"{module}:{line} imports {target}: {FLOORS[here or -1]} is below {FLOORS[there]}"


def beyond_torch(imports: list[Import]) -> Iterator[str]:
    for module, target, _, line in imports:
        if not any(is_within(module, room) for room in TORCH_ALONE):
            continue
        library = target.split(".")[0]
        # `heavy` has the rule for these libraries.
        if library in sys.stdlib_module_names or library in (*HEAVY, *COMPILERS):
            continue
        if library == "numpy" and "numba" in module:  # numba needs it, and its arrays are all that loops can work on
            continue
        if not any(is_within(target, name) for name in ("torch", "pipeline.randomness", *TORCH_ALONE)):
            yield f"{module}:{line} imports {target}: with {', '.join(TORCH_ALONE)} it may use only torch"


def circles(modules: dict[str, Path], imports: list[Import]) -> Iterator[str]:
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        if found.target in modules:
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
        loaded = reachable(loads, module)
        alone = any(is_within(module, room) for room in TORCH_ALONE)
        for library in (*HEAVY, *(COMPILERS if alone else ()), *(["ffcv"] if is_within(module, WITHOUT_FFCV) else [])):
            if library in loaded and library not in module:
                yield f"{module} loads {library} as soon as it is imported: import it where it is used"


def test_project_keeps_its_rules():
    assert violations(REPOSITORY) == []


@pytest.mark.parametrize("package", ["pipeline", "cluster", "tools", "recipes"])
def test_every_module_can_be_imported(package):
    there = importlib.import_module(package).__path__
    names = [module.name for module in pkgutil.walk_packages(there, package + ".", onerror=lambda name: None)]
    assert {name for name in modules_of(REPOSITORY) if is_within(name, package)} == {package, *names}
    for name in names:
        if not name.endswith(".__main__"):  # these run when imported
            importlib.import_module(name)


def test_what_starts_often_starts_without_torch():
    lines = [f"import {module}" for module in WITHOUT_TORCH] + ["import sys", "sys.exit('torch' in sys.modules)"]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, check=False).returncode == 0


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for folder in path.relative_to(root).parents:
            if folder.parts and not (root / folder / "__init__.py").exists():
                (root / folder / "__init__.py").write_text("")


PLANTED = {
    "upwards": ({"pipeline/run.py": "import cluster.slurm"}, "pipeline.run is below cluster"),
    "upwards in a function": ({"cluster/a.py": "def f():\n    from tools import cli"}, "cluster is below tools"),
    "upwards for types": (
        {"recipes/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cluster"},
        "recipes is below cluster",
    ),
    "upwards by name": ({"pipeline/run.py": "import importlib\nimportlib.import_module('tools.cli')"}, "below tools"),
    "upwards by dots": ({"pipeline/data/a.py": "from ...cluster import slurm"}, "pipeline.data is below cluster"),
    "upwards inside pipeline": (
        {"pipeline/data/a.py": "from pipeline.engines import b", "pipeline/engines/b.py": ""},
        "pipeline.data is below pipeline.engines",
    ),
    "from the package itself": ({"pipeline/__init__.py": "import pipeline.errors"}, "pipeline is below"),
    "no floor": ({"pipeline/attic/a.py": ""}, "pipeline.attic.a is on no floor"),
    "tests": ({"tools/a.py": "from tests.support import x"}, "tests are not part"),
    "circle": (
        {"pipeline/data/a.py": "import pipeline.data.b", "pipeline/data/b.py": "from pipeline.data import a"},
        "pipeline.data.a, pipeline.data.b import each other",
    ),
    "circle in functions and for types": (
        {
            "pipeline/data/a.py": "def f():\n    from . import b",
            "pipeline/data/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import x",
            "pipeline/data/c.py": "try:\n    from pipeline.data.a import y\nexcept ImportError:\n    pass",
        },
        "pipeline.data.a, pipeline.data.b, pipeline.data.c import each other",
    ),
    "circle through the package": (
        {"pipeline/data/__init__.py": "from pipeline.data.a import x", "pipeline/data/a.py": "from . import y"},
        "pipeline.data, pipeline.data.a import each other",
    ),
    "models beyond torch": ({"pipeline/models/a.py": "def f():\n    import numpy"}, "may use only torch"),
    "models and the pipeline": ({"pipeline/kernels/a.py": "from pipeline.errors import UserError"}, "may use only"),
    "kernels and numba": (
        {
            "pipeline/kernels/numba_loops.py": "import numba",
            "pipeline/models/a.py": "from pipeline.kernels import numba_loops",
        },
        "pipeline.models.a loads numba",
    ),
    "submitit": ({"pipeline/run.py": "def f():\n    from submitit.helpers import x"}, "knows nothing of Slurm"),
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
    "FFCV behind the engines": (
        {"pipeline/engines/a.py": "import pipeline.data.loader", "pipeline/data/loader.py": "import ffcv"},
        "pipeline.engines.a loads ffcv",
    ),
}


@pytest.mark.parametrize(("files", "sentence"), PLANTED.values(), ids=PLANTED)
def test_planted_violation_is_found(tmp_path, files, sentence):
    write_tree(tmp_path, files)
    assert any(sentence in found for found in violations(tmp_path)), violations(tmp_path)


def test_allowed_imports_stay_allowed(tmp_path):
    write_tree(
        tmp_path,
        {
            "tools/cli.py": "import rich\nfrom cluster import slurm\nfrom pipeline import run",
            "cluster/slurm.py": "import submitit\nfrom pipeline.run import run_stage",
            "pipeline/run.py": "from pipeline.data.a import x\ndef track():\n    from pipeline.tracking import mlflow",
            "pipeline/data/a.py": "import numpy",
            "pipeline/tracking/mlflow.py": "import mlflow",
            "pipeline/models/b.py": "import math\nimport torch.nn as nn\nfrom pipeline.sparse.dense import Dense",
            "pipeline/sparse/dense.py": "import torch\ndef kernel():\n    from pipeline.kernels import triton_kernel",
            "pipeline/kernels/triton_kernel.py": "import torch, triton",
            "pipeline/kernels/numba_loops.py": "import numba, numpy",
            "pipeline/kernels/pooling.py": "def f():\n    from pipeline.kernels.numba_loops import pool",
        },
    )
    assert violations(tmp_path) == []
