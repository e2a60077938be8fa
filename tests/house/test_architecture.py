"""The arrows between the rooms: benchmarks, experiments, tests -> qstar -> public ops -> one op's folder -> common.

ruff's banned-api holds those that it can express; here all of them are read from the syntax trees. And what else a
reader may rely on: no import goes in a circle, and no file is long.
"""

import ast
import functools
import graphlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("kernels/qstar_kernels")
SHARED = ("common", "tools")  # the rooms of kernels/ that are no op's
BACKENDS = ("torch", "triton", "gluon")  # the rooms of an op
CHOOSER = Path("backends.py")
DOOR = "rivals.py"  # of an op, to its kernels in Gluon
LONGEST = 400  # lines of a file
FLOORS = (  # of qstar/, from the ground up: a file imports from its own room, or from a floor below
    ("autocast", "config", "cpu", "grid", "whole_file"),
    ("adapters", "cache", "data", "heads", "quantized"),
    ("layouts",),
    ("drop_in",),
    ("attention",),
    ("model",),
    ("thinking", "reference"),
    ("talking", "experimental"),
    ("learning", "compatibility", "generation"),
    ("classes",),
    ("wrapping", "prompting"),
    ("evaluation",),
    ("inspection",),
    ("training",),
    ("ancestors",),
    ("embedded",),
    ("doctor",),
    ("commands",),
)
ANYWHERE = ("__init__", "__main__")  # the front door names every room


class Import(NamedTuple):
    """Something imported, by its full dotted name: ``from a import b`` is ``a.b``; ``late`` inside a function."""

    line: int
    name: str
    late: bool


def imports(tree: ast.AST, late: bool = False) -> list[Import]:
    """Everything imported, wherever in the file but for the type checker alone."""
    found = []
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Import():
                found += [Import(node.lineno, alias.name, late) for alias in node.names]
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                found += [Import(node.lineno, f"{module}.{alias.name}", late) for alias in node.names]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.append(Import(node.lineno, name, late))
        found += imports(node, late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    return found


def public_ops(root: Path) -> set[str]:
    for node in ast.parse((root / KERNELS / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("qstar_kernels/__init__.py has no __all__")


@functools.cache
def declared_packages() -> set[str]:
    """Import names of the distributions that pyproject.toml lists, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    distributions = {canonicalize_name(Requirement(line).name) for line in lines}
    return distributions | {
        package
        for package, providers in importlib.metadata.packages_distributions().items()
        if not distributions.isdisjoint(map(canonicalize_name, providers))
    }


def complaint_about_op(path: Path, tree: ast.AST, found: Import, ops: set[str]) -> str | None:
    """Why a file of ``kernels/`` must not import this, if so; ``path`` is relative to the package."""
    package, *rest = found.name.split(".")
    if package == "triton" and rest[:1] == ["experimental"]:
        return None if "gluon" in path.parts else "only kernels in Gluon need what is experimental in Triton"
    if package in ("torch", "triton") or package in sys.stdlib_module_names:
        return None
    if package != "qstar_kernels":
        return "the ops import torch and Triton only"
    room, target = path.parts[0], rest[0] if rest else ""
    if target == "testing":
        return "cases and tolerances are for tests and benchmarks"
    if path.name == "testing.py" or path == Path("__init__.py"):
        return None
    if target == "reference":
        chooses = any(isinstance(node, ast.Name) and node.id == "choose" for node in ast.walk(tree))
        return None if chooses else "only a file that chooses a backend knows the reference"
    if room == "common" and target != "common":
        return "what the ops share imports nothing but itself"
    if target == "tools" and room != "tools":
        return "commands are for people"
    if target in ops and target != room:
        if path == CHOOSER and found.late:
            return None
        if room == "tools" and rest[1:2] == ["cases"]:
            return None
        return "ops do not import each other" if room in ops else "what the ops share imports no op"
    return complaint_about_backend(path, rest[1], found.late) if target in ops and rest[1:] else None


def complaint_about_backend(path: Path, target: str, late: bool) -> str | None:
    """Why a file of an op's folder must not import ``target`` of the same folder, if so."""
    backend = path.parts[1] if len(path.parts) > 2 else None
    if target not in BACKENDS or target == backend or path.name == "cases.py":
        return None
    if backend is not None:
        return "backends do not import each other"
    if path.name == DOOR and target == "gluon" and late:
        return None
    return None if target == "torch" else "only backends.py knows what needs Triton"


def floor_of(room: str) -> int:
    """Where a file or folder of ``qstar/`` stands; -1 where nobody has given it a floor."""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), -1)


def complaint_about_floors(path: Path, rooms: list[str]) -> str | None:
    """Why a file of ``qstar/`` must not import from ``rooms``; ``path`` is relative to the package."""
    here = path.with_suffix("").parts[0]
    if here in ANYWHERE or not rooms or rooms[0] == here:
        return None
    if floor_of(here) < 0:
        return "its own room has no floor in FLOORS"
    if rooms[0] == "experimental":
        return "what nobody has measured is off every path"
    return None if 0 <= floor_of(rooms[0]) < floor_of(here) else "arrows go down only"


def complaint_about_model(path: Path, name: str, public: set[str], declared: set[str]) -> str | None:
    """Why a file of ``qstar/`` must not import ``name``, if so; ``path`` is relative to the package."""
    package, *rest = name.split(".")
    if package == "qstar":
        return complaint_about_floors(path, rest)
    if package in sys.stdlib_module_names:
        return None
    if package == "qstar_kernels":
        return None if not rest or (len(rest) == 1 and rest[0] in public) else "qstar calls the public ops only"
    return None if package in declared else "pyproject.toml does not declare it"


def broken_arrows(root: Path) -> list[str]:
    ops = {folder.parent.name for folder in (root / KERNELS).glob("*/__init__.py")} - set(SHARED)
    public, declared = public_ops(root), declared_packages()
    broken = []
    for path in sorted([*(root / KERNELS).rglob("*.py"), *(root / "qstar").rglob("*.py")]):
        tree = ast.parse(path.read_text())
        for found in imports(tree):
            if path.is_relative_to(root / KERNELS):
                complaint = complaint_about_op(path.relative_to(root / KERNELS), tree, found, ops)
            else:
                complaint = complaint_about_model(path.relative_to(root / "qstar"), found.name, public, declared)
            if complaint:
                broken.append(f"{path.relative_to(root)}:{found.line} imports {found.name}: {complaint}")
    return broken


def import_graph(folder: Path) -> dict[str, set[str]]:
    """The modules of a package, and which of them each imports, at once or late."""
    files = {".".join(path.relative_to(folder.parent).with_suffix("").parts): path for path in folder.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {}
    for module, path in modules.items():
        names = [found.name for found in imports(ast.parse(path.read_text()))]
        graph[module] = {x for name in names for x in (name, name.rpartition(".")[0]) if x in modules}
        graph[module] -= {name.rpartition(".")[0] for name in names if name in modules}  # a package that holds it
    return graph


def test_the_arrows_hold():
    assert broken_arrows(ROOT) == []


@pytest.mark.parametrize("package", [KERNELS, Path("qstar")], ids=str)
def test_no_import_goes_in_a_circle(package):
    graph = import_graph(ROOT / package)
    assert len(graph) > 20 and any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()


def test_a_circle_of_imports_is_seen(tmp_path):
    """Also one that a function closes."""
    package = tmp_path / "ring"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from ring.b import x")
    (package / "b.py").write_text("from ring import c")
    (package / "c.py").write_text("def f():\n    import ring.a")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph(package)).prepare()
    (package / "c.py").write_text("def f():\n    import os")
    assert import_graph(package) == {"ring": set(), "ring.a": {"ring.b"}, "ring.b": {"ring.c"}, "ring.c": set()}
    graphlib.TopologicalSorter(import_graph(package)).prepare()


def test_every_file_can_be_read_in_one_sitting():
    files = [
        path
        for room in ("qstar", "kernels", "benchmarks", "experiments", "tests")
        for path in (ROOT / room).rglob("*.py")
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("kernels/qstar_kernels/mix/op.py", "import qstar.grid", "torch and Triton only"),
        ("kernels/qstar_kernels/mix/op.py", "def f():\n    from transformers import Cache", "torch and Triton only"),
        ("kernels/qstar_kernels/mix/op.py", "from . import other", "torch and Triton only"),
        ("kernels/qstar_kernels/mix/op.py", "from qstar_kernels.rotate import op", "import each other"),
        ("kernels/qstar_kernels/mix/op.py", "from qstar_kernels import rotate", "import each other"),
        ("kernels/qstar_kernels/mix/op.py", "import qstar_kernels.testing", "for tests and benchmarks"),
        ("kernels/qstar_kernels/mix/op.py", "from qstar_kernels.tools import tune", "for people"),
        ("kernels/qstar_kernels/mix/op.py", "from qstar_kernels.mix.triton import forward", "only backends.py knows"),
        ("kernels/qstar_kernels/mix/op.py", "def f():\n    import qstar_kernels.mix.gluon", "only backends.py knows"),
        ("kernels/qstar_kernels/mix/torch/mixing.py", "from qstar_kernels import reference", "knows the reference"),
        ("kernels/qstar_kernels/mix/torch/mixing.py", "import qstar_kernels.mix.triton.forward", "backends do not"),
        ("kernels/qstar_kernels/mix/triton/forward.py", "from qstar_kernels.mix import torch", "backends do not"),
        (
            "kernels/qstar_kernels/mix/triton/forward.py",
            "def f():\n    import qstar_kernels.mix.gluon",
            "backends do not",
        ),
        ("kernels/qstar_kernels/mix/gluon/forward.py", "import qstar_kernels.mix.triton.forward", "backends do not"),
        ("kernels/qstar_kernels/common/primitives.py", "import qstar_kernels.mix.op", "nothing but itself"),
        ("kernels/qstar_kernels/common/launch.py", "from triton.experimental import gluon", "only kernels in Gluon"),
        ("kernels/qstar_kernels/common/primitives.py", "import qstar_kernels.backends", "nothing but itself"),
        ("kernels/qstar_kernels/backends.py", "from qstar_kernels.mix import triton", "imports no op"),
        ("kernels/qstar_kernels/reference.py", "from qstar_kernels.mix import mix", "imports no op"),
        ("kernels/qstar_kernels/tools/tune.py", "from qstar_kernels.mix import mix", "imports no op"),
        ("qstar/model.py", "from qstar_kernels.mix.op import mix", "public ops only"),
        ("qstar/model.py", "from qstar_kernels import reference", "public ops only"),
        ("qstar/model.py", "import importlib\nimportlib.import_module('benchmarks.common')", "does not declare"),
        ("qstar/model.py", "from tests.helpers import tiny_model", "does not declare"),
        ("qstar/model.py", "import real_model", "does not declare"),
        ("qstar/training/run.py", "import undeclared_package", "does not declare"),
        ("qstar/model.py", "from qstar.thinking import think", "arrows go down only"),
        ("qstar/model.py", "def f():\n    import qstar.wrapping", "arrows go down only"),
        ("qstar/thinking.py", "from qstar import reference", "arrows go down only"),
        ("qstar/training/run.py", "from qstar.embedded.run import train_embedded", "arrows go down only"),
        ("qstar/training/run.py", "from qstar.experimental import cuda_graph", "off every path"),
        ("qstar/attic.py", "from qstar import grid", "no floor"),
    ],
)
def test_every_broken_arrow_is_seen(tmp_path, path, source, complaint):
    allowed = {
        "kernels/qstar_kernels/__init__.py": "from qstar_kernels.mix import mix\n__all__ = ['mix']",
        "kernels/qstar_kernels/mix/__init__.py": "from qstar_kernels.mix.op import mix",
        "kernels/qstar_kernels/mix/op.py": "import math, torch\nfrom qstar_kernels import reference\n"
        "from qstar_kernels.backends import choose\nfrom qstar_kernels.mix import torch as by_torch\nchoose('auto')",
        "kernels/qstar_kernels/mix/cases.py": "from qstar_kernels.mix.gluon import forward",
        "kernels/qstar_kernels/mix/torch/mixing.py": "from qstar_kernels.mix.rules import Rules",
        "kernels/qstar_kernels/mix/triton/forward.py": "import triton.language as tl\n"
        "from qstar_kernels.mix.rivals import find_gluon\nfrom qstar_kernels.common import primitives",
        "kernels/qstar_kernels/mix/rivals.py": "def find_gluon():\n    from qstar_kernels.mix import gluon",
        "kernels/qstar_kernels/mix/gluon/forward.py": "from triton.experimental import gluon",
        "kernels/qstar_kernels/rotate/__init__.py": "",
        "kernels/qstar_kernels/backends.py": "def load():\n    from qstar_kernels.mix import triton",
        "kernels/qstar_kernels/common/__init__.py": "",
        "kernels/qstar_kernels/common/primitives.py": "import triton",
        "kernels/qstar_kernels/reference.py": "import torch\nfrom qstar_kernels.common import random_bits",
        "kernels/qstar_kernels/tools/__init__.py": "",
        "kernels/qstar_kernels/tools/tune.py": "from qstar_kernels.mix import cases\nimport qstar_kernels.mix.cases",
        "kernels/qstar_kernels/testing.py": "from qstar_kernels import reference\nfrom qstar_kernels.mix import mix",
        "qstar/__init__.py": "from qstar.model import QuietStarModel",
        "qstar/model.py": "import transformers\nfrom qstar_kernels import mix\nfrom qstar import grid",
        "qstar/training/run.py": "from qstar.model import QuietStarModel\nimport qstar.training.fit",
    }
    for name, text in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert broken_arrows(tmp_path) == []

    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    broken = broken_arrows(tmp_path)
    assert len(broken) == 1 and broken[0].startswith(path) and complaint in broken[0], broken
