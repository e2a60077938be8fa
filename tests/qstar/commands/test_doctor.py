"""``qstar doctor``: a line for each finding, and an exit code that says whether there is a problem."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qstar.commands import doctor
from qstar.commands.main import main
from qstar.doctor import versions
from qstar.doctor.findings import Finding

OK = Finding("ok", "torch", "2.13.0, as tested")
NOTE = Finding("note", "threads", "torch computes with 1, on 8 cores", "unset it")
PROBLEM = Finding("problem", "mix_hidden checked", "it fails", "report it")


def test_every_finding_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_all", lambda: iter([OK, NOTE]))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      torch                           2.13.0, as tested",
        "note    threads                         torch computes with 1, on 8 cores -> unset it",
        "",
        "no problems",
    ]


def test_a_problem_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_all", lambda: iter([OK, PROBLEM, NOTE]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "problem mix_hidden checked              it fails -> report it"
    assert out[-1] == "1 of 3 findings are problems"


def test_a_missing_package_is_said_without_what_needs_it(monkeypatch, capsys):
    found = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda name: None if name == "accelerate" else found(name))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem accelerate                      not installed -> pip install 'accelerate>=" in out
    assert out.splitlines()[-1].startswith("1 of ") and "working folder" not in out


def test_a_package_that_cannot_be_imported_is_a_problem_and_no_traceback(monkeypatch, capsys):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "check_versions", lambda: [OK])
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: broken() if "qstar.doctor" in name else doctor)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("problem machine ") and "ImportError: libcudart.so.13" in out[1]
    assert out[2].startswith("problem self-check ")


def test_it_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "runs"])
    assert stopped.value.code == 2


def test_it_runs_without_network_and_writes_nothing(tmp_path):
    code = """
import socket, sys
def refuse(*args):
    raise AssertionError("the network is asked")
socket.socket.connect = socket.getaddrinfo = refuse
from qstar.commands.main import main
code = main(["doctor"])
print("exit", code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    *lines, last = done.stdout.splitlines()
    assert lines, done.stderr
    assert last == f"exit {int(any(line.startswith('problem') for line in lines))}"
    assert any(line.startswith("ok      learning ") for line in lines)
    assert f"working folder                  {tmp_path}, " in done.stdout
    assert list(tmp_path.iterdir()) == []
