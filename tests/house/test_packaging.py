"""The distribution: what it installs, what importing it costs, and the promises that README and .ci/run share."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    """What this interpreter prints in a process of its own, with nothing but ``path`` in PYTHONPATH."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**ours, "PYTHONPATH": str(path or ""), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


# What is installed


@pytest.mark.parametrize("package, folder", [("qstar", "qstar"), ("qstar_kernels", "kernels/qstar_kernels")])
def test_the_installed_distribution_is_this_checkout(tmp_path, package, folder):
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}).origin)"
    assert Path(python("-c", code, cwd=tmp_path)) == ROOT / folder / "__init__.py"
    code = "from importlib.metadata import distribution; print(distribution('quiet-star').version)"
    assert python("-c", code, cwd=tmp_path) == PROJECT["version"], "install again: the checkout's version has changed"


def test_the_wheel_holds_every_file_of_both_packages(tmp_path):
    source = tmp_path / "source"
    expected = set()
    for package, folder in {"qstar": "qstar", "qstar_kernels": "kernels/qstar_kernels"}.items():
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__"))
        files = [file for file in (source / folder).rglob("*") if file.is_file()]
        expected |= {(package / file.relative_to(source / folder)).as_posix() for file in files}
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    arguments = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source)
    python("-m", "pip", "wheel", *arguments, cwd=tmp_path)

    [wheel] = tmp_path.glob("quiet_star-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [information] = {name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA")}
        entry_points = archive.read(f"{information}/entry_points.txt").decode()
        licence = archive.read(f"{information}/licenses/LICENSE")
    assert {name for name in names if not name.startswith(information)} == expected
    assert "qstar = qstar.commands.main:main" in entry_points
    assert licence == (ROOT / "LICENSE").read_bytes()


def pins() -> dict[str, str]:
    """Version of each distribution in constraints.txt, which may hold exact versions only."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    assert all([clause.operator for clause in each.specifier] == ["=="] for each in requirements)
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in requirements}


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_constraints_pin_what_is_required_within_its_range(extra):
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    required = {canonicalize_name(each.name): each.specifier for each in map(Requirement, lines)}
    required.pop(PROJECT["name"], None)  # an extra that includes another
    pinned = pins()
    assert required.keys() <= pinned.keys()
    assert [name for name, versions in required.items() if pinned[name] not in versions] == []


def test_the_readme_has_two_commands_that_ci_can_run_as_they_stand():
    """Each sets up all that it needs, in one line; ``.ci/run`` finds them by how they begin."""
    setup = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e"
    found = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    tests = ".venv/bin/pytest tests/ -n auto --maxprocesses 4"
    assert found == [f"{setup} . && .venv/bin/qstar train", f'{setup} ".[test]" && {tests}']
    assert "grep '^python3 -m venv' README.md" in (ROOT / ".ci" / "run").read_text()


# What an import costs and hides


def test_importing_qstar_imports_no_heavy_package(tmp_path):
    heavy = {"torch", "triton", "transformers", "datasets", "accelerate", "numpy"}
    assert python("-c", f"import sys, qstar; print({heavy} & set(sys.modules))", cwd=tmp_path) == "set()"


def test_train_is_a_function_that_no_module_can_shadow(tmp_path):
    code = """
import importlib.util
from qstar import train
print(callable(train), importlib.util.find_spec("qstar.train"))
"""
    assert python("-c", code, cwd=tmp_path) == "True None"


def test_only_the_kernels_need_triton(tmp_path):
    code = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch, qstar, qstar_kernels
for package in (qstar, qstar_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(".__main__"):
            try:
                importlib.import_module(module.name)
                print("runs", module.name)
            except ModuleNotFoundError as error:
                assert error.name.split(".")[0] == "triton" and package is qstar_kernels, module.name
                print("needs Triton", module.name)
x = torch.ones(1, 1, 2, 3, 16)
print(qstar_kernels.thought_attention(x, x, x).sum().item())
try:
    qstar_kernels.thought_attention(x, x, x, backend="triton")
except ValueError as error:
    print(error)
"""
    *modules, result, message = python("-c", code, cwd=tmp_path).splitlines()
    assert {"runs qstar_kernels.reference", "needs Triton qstar_kernels.common.primitives"} <= set(modules)
    assert float(result) == 96
    assert re.search("backend is 'triton'.*not installed", message)


@pytest.fixture
def other_kernels(tmp_path) -> Path:
    """A folder with a regular package ``kernels``, as the one of that name that transformers imports."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n")
    return tmp_path


def test_our_folder_kernels_hides_no_package_of_that_name(other_kernels):
    code = "import sys, kernels; print(sys.path[0] == '', kernels.owner)"
    assert python("-c", code, cwd=ROOT, path=other_kernels) == "True somebody else"


def test_our_folder_kernels_hides_no_package_of_that_name_under_pytest(other_kernels, tmp_path):
    test = tmp_path / "suite" / "test_kernels.py"
    test.parent.mkdir()
    test.write_text(
        f"""
import sys

def test_owner():
    import kernels
    assert sys.path.index({str(ROOT)!r}) < sys.path.index({str(other_kernels)!r})
    assert kernels.owner == "somebody else"
"""
    )
    arguments = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}", test)
    assert "1 passed" in python("-m", "pytest", *arguments, cwd=ROOT, path=other_kernels)


# Commands


def test_the_command_and_the_module_are_the_same(tmp_path):
    module = python("-m", "qstar", "--help", cwd=tmp_path)
    code = """
import sys
from importlib.metadata import entry_points
[command] = entry_points(group="console_scripts", name="qstar")
sys.argv = ["qstar", "--help"]
sys.exit(command.load()())
"""
    assert python("-c", code, cwd=tmp_path) == module
    assert {"train", "eval"} <= set(module.replace(",", " ").replace("{", " ").replace("}", " ").split())


def test_benchmarks_are_collected_by_their_name(tmp_path):
    (tmp_path / "bench_sum.py").write_text("def test_sum(benchmark):\n    assert benchmark(sum, [1, 2]) == 3\n")
    arguments = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--benchmark-only", tmp_path)
    assert "1 passed" in python("-m", "pytest", *arguments, cwd=tmp_path)
