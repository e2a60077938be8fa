"""The arrows between the rooms: benchmarks, tests -> qstar -> public ops -> one op's folder -> shared words.

ruff's banned-api holds those that it can express; here all of them are read from the syntax trees.
"""

import ast
import functools
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("kernels/qstar_kernels")
COMMANDS = (Path("resources.py"), Path("tune.py"))  # what a developer runs on the kernels of every op


def imported_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and full dotted name of everything imported, wherever in the file: ``from a import b`` is ``a.b``."""
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names += [(node.lineno, alias.name) for alias in node.names]
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.append((node.lineno, name))
    return names


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


def complaint_about_op(path: Path, tree: ast.AST, name: str, ops: set[str]) -> str | None:
    """Why a file of ``kernels/`` must not import ``name``, if so; ``path`` is relative to the package."""
    package, *rest = name.split(".")
    if package in ("torch", "triton") or package in sys.stdlib_module_names:
        return None
    if package != "qstar_kernels":
        return "the ops import torch and Triton only"
    target = rest[0] if rest else ""
    own_op = path.parts[0] if path.parts[0] in ops else None
    for_tests = path.name == "testing.py"
    if path in COMMANDS and rest[1:2] == ["cases"]:
        return None
    if target == "testing":
        return "cases and tolerances are for tests and benchmarks"
    if target == "reference" and not for_tests:
        chooses = any(isinstance(node, ast.Name) and node.id == "choose_backend" for node in ast.walk(tree))
        return None if chooses else "only the file that chooses the backend knows the reference"
    if target in ops and target != own_op and path != Path("__init__.py") and not for_tests:
        return "ops do not import each other" if own_op else "what the ops share imports no op"
    return None


def complaint_about_model(name: str, public: set[str], declared: set[str]) -> str | None:
    """Why a file of ``qstar/`` must not import ``name``, if so."""
    package, *rest = name.split(".")
    if package == "qstar" or package in sys.stdlib_module_names:
        return None
    if package == "qstar_kernels":
        return None if not rest or (len(rest) == 1 and rest[0] in public) else "qstar calls the public ops only"
    return None if package in declared else "pyproject.toml does not declare it"


def broken_arrows(root: Path) -> list[str]:
    ops = {folder.parent.name for folder in (root / KERNELS).glob("*/__init__.py")}
    public, declared = public_ops(root), declared_packages()
    broken = []
    for path in sorted([*(root / KERNELS).rglob("*.py"), *(root / "qstar").rglob("*.py")]):
        tree = ast.parse(path.read_text())
        for line, name in imported_names(tree):
            if path.is_relative_to(root / KERNELS):
                complaint = complaint_about_op(path.relative_to(root / KERNELS), tree, name, ops)
            else:
                complaint = complaint_about_model(name, public, declared)
            if complaint:
                broken.append(f"{path.relative_to(root)}:{line} imports {name}: {complaint}")
    return broken


def test_the_arrows_hold():
    assert broken_arrows(ROOT) == []


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("kernels/qstar_kernels/mix/op.py", "import qstar.grid", "torch and Triton only"),
        ("kernels/qstar_kernels/mix/op.py", "def f():\n    from transformers import Cache", "torch and Triton only"),
        ("kernels/qstar_kernels/mix/op.py", "from . import other", "torch and Triton only"),
        ("kernels/qstar_kernels/mix/op.py", "from qstar_kernels.rotate import op", "import each other"),
        ("kernels/qstar_kernels/mix/op.py", "from qstar_kernels import rotate", "import each other"),
        ("kernels/qstar_kernels/mix/op.py", "import qstar_kernels.testing", "for tests and benchmarks"),
        ("kernels/qstar_kernels/mix/forward.py", "from qstar_kernels import reference", "knows the reference"),
        ("kernels/qstar_kernels/primitives.py", "import qstar_kernels.mix.op", "imports no op"),
        ("kernels/qstar_kernels/reference.py", "from qstar_kernels.mix import mix", "imports no op"),
        ("kernels/qstar_kernels/tune.py", "from qstar_kernels.mix import mix", "imports no op"),
        ("qstar/model.py", "from qstar_kernels.mix.op import mix", "public ops only"),
        ("qstar/model.py", "from qstar_kernels import reference", "public ops only"),
        ("qstar/model.py", "import importlib\nimportlib.import_module('benchmarks.common')", "does not declare"),
        ("qstar/model.py", "from tests.helpers import tiny_model", "does not declare"),
        ("qstar/deep/er.py", "import undeclared_package", "does not declare"),
    ],
)
def test_every_broken_arrow_is_seen(tmp_path, path, source, complaint):
    allowed = {
        "kernels/qstar_kernels/__init__.py": "from qstar_kernels.mix import mix\n__all__ = ['mix']",
        "kernels/qstar_kernels/mix/__init__.py": "from qstar_kernels.mix.op import mix",
        "kernels/qstar_kernels/mix/op.py": "import math, torch\nfrom qstar_kernels import primitives, reference\n"
        "from qstar_kernels.arguments import choose_backend\nchoose_backend('auto')",
        "kernels/qstar_kernels/mix/forward.py": "import triton.language as tl",
        "kernels/qstar_kernels/rotate/__init__.py": "",
        "kernels/qstar_kernels/primitives.py": "import triton",
        "kernels/qstar_kernels/reference.py": "import torch",
        "kernels/qstar_kernels/resources.py": "from qstar_kernels.mix import cases\nimport qstar_kernels.mix.cases",
        "kernels/qstar_kernels/testing.py": "from qstar_kernels import reference\nfrom qstar_kernels.mix import mix",
        "qstar/model.py": "import transformers\nfrom qstar_kernels import mix\nfrom qstar import grid",
    }
    for name, text in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert broken_arrows(tmp_path) == []

    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    broken = broken_arrows(tmp_path)
    assert len(broken) == 1 and broken[0].startswith(path) and complaint in broken[0], broken
