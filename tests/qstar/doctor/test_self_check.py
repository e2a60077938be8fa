"""The self-check: all is right here, and what is broken is a problem that says what it is."""

from __future__ import annotations

import re

import pytest
import torch

import qstar_kernels
from qstar import generation, reference
from qstar.compatibility import EXACT
from qstar.doctor import self_check
from qstar.doctor.findings import problems
from qstar.doctor.self_check import (
    best_device,
    check_itself,
    check_model,
    op_finding,
    op_inputs,
    op_results,
    worst_error,
)
from qstar.learning import Objective
from qstar_kernels import backends

CPU = torch.device("cpu")


def differences(findings) -> list[float]:
    return [float(re.search(r"differ by (\S+) from", each.found)[1]) for each in findings if "differ" in each.found]


def test_every_op_and_a_model_are_right_here():
    found = check_itself()
    assert problems(found) == []
    ops = [each.op for each in qstar_kernels.explain("cpu")]
    assert [each.what for each in found] == [*(f"{op} checked" for op in ops), "wrapping", "generation", "learning"]
    assert len(differences(found)) == len(ops) + 1 and 0 < max(differences(found)) < EXACT / 5


@pytest.mark.parametrize("name", op_inputs(CPU))
def test_an_op_that_is_wrong_by_a_hair_or_not_a_number_is_a_problem(name):
    op, given = getattr(qstar_kernels, name), op_inputs(CPU)[name]

    def broken(change):
        def run(*args, backend, **options):
            results = op(*args, backend=backend, **options)
            if backend == "reference":
                return results
            several = isinstance(results, tuple)
            changed = [change(x) if x.is_floating_point() else x for x in (results if several else (results,))]
            return tuple(changed) if several else changed[0]

        return op_finding(name, run, given)

    assert broken(lambda x: x).state == "ok"
    assert broken(lambda x: x * 1.001).state == "problem"
    nan = broken(lambda x: x * float("nan"))
    assert nan.state == "problem" and nan.found == "results and gradients differ by nan from the reference"


@pytest.mark.parametrize("name", op_inputs(CPU))
def test_an_op_whose_gradient_is_wrong_is_a_problem(name):
    op, given = getattr(qstar_kernels, name), op_inputs(CPU)[name]
    learned = len(op_results(op, given, torch.float64, "reference")) > 2 or name.startswith("thought")

    def run(first, *args, backend, **options):
        if backend != "reference" and first.requires_grad:
            first.register_hook(lambda gradient: gradient * 1.001)
        return op(first, *args, backend=backend, **options)

    assert op_finding(name, run, given).state == ("problem" if learned else "ok")
    assert learned == (name != "sample_linear")


def test_an_op_that_fails_says_why():
    def run(*args, **options):
        raise RuntimeError("no kernel image is available\nfor this device")

    finding = op_finding("mix_hidden", run, op_inputs(CPU)["mix_hidden"])
    assert (finding.state, finding.what) == ("problem", "mix_hidden checked")
    assert finding.found == "it fails: RuntimeError: no kernel image is available"


def test_a_model_whose_passes_differ_is_a_problem_and_ends_the_check(monkeypatch):
    def wrap(*args, **options):
        raise ValueError("the packed pass differs from the model's own by 1e-1")

    monkeypatch.setattr(self_check, "wrap", wrap)
    [finding] = check_model(CPU)
    assert (finding.state, finding.what) == ("problem", "wrapping")
    assert finding.found == "it fails: ValueError: the packed pass differs from the model's own by 1e-1"


def test_a_generation_that_depends_on_guesses_is_a_problem(monkeypatch):
    whole = generation.model.GeneratingModel.generate

    def generate(self, *args, drafts=None, **options):
        output = whole(self, *args, drafts=drafts, **options)
        if drafts is None:
            output.sequences[0, -1] += 1
        return output

    monkeypatch.setattr(generation.model.GeneratingModel, "generate", generate)
    wrapping, finding = check_model(CPU)
    assert (wrapping.state, finding.state, finding.what) == ("ok", "problem", "generation")
    assert "behind guesses it says another text" in finding.found


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_learning_that_differs_from_plain_loops_is_a_problem(monkeypatch, part):
    whole = Objective.__call__

    def objective(self, *args, **options):
        output = whole(self, *args, **options)
        loss = output.loss * 1.001
        output.loss = loss if part == "loss" else loss - 0.001 * output.loss.detach()
        return output

    monkeypatch.setattr(Objective, "__call__", objective)
    *_, finding = check_model(CPU)
    assert (finding.state, finding.what) == ("problem", "learning")
    assert "loss and gradients differ by 1e-03 from those of plain loops" in finding.found


def test_the_check_leaves_the_process_as_it_was():
    torch.manual_seed(5)
    threads, expected = torch.get_num_threads(), torch.rand(3)
    torch.manual_seed(5)
    check_model(CPU)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads
    assert reference.objective is self_check.reference.objective


@pytest.mark.parametrize("name", backends.OPS)
def test_the_kernels_of_a_gpu_take_the_inputs_and_pass(name):
    """In Triton's interpreter where there is no GPU."""
    op, given = getattr(qstar_kernels, name), op_inputs(best_device())[name]
    ours, exact = op_results(op, given, torch.float32, "triton"), op_results(op, given, torch.float64, "reference")
    assert 0 < worst_error(ours, exact) < EXACT / 5
