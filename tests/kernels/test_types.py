"""What a type checker is told of the public ops."""

import inspect
from pathlib import Path
from typing import get_overloads

import pytest

import qstar_kernels

SWITCHES = {
    "thought_attention": "return_lse",
    "thought_attention_step": "return_lse",
    "linear_log_prob": "return_entropy",
}


def test_the_package_says_that_it_has_types():
    assert (Path(qstar_kernels.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(("op", "switch"), SWITCHES.items())
def test_every_overload_has_the_op_s_own_parameters(op, switch):
    """All that differs is the type of the switch and of the result."""
    function = getattr(qstar_kernels, op)
    own = inspect.signature(function)
    overloads = [inspect.signature(each) for each in get_overloads(function)]
    assert [each.parameters[switch].annotation for each in overloads] == ["Literal[False]", "Literal[True]", "bool"]
    assert [each.return_annotation for each in overloads] == [
        "Tensor",
        "tuple[Tensor, Tensor]",
        "Tensor | tuple[Tensor, Tensor]",
    ]
    for each in overloads:
        assert list(each.parameters) == list(own.parameters)
        for name, parameter in own.parameters.items():
            found = each.parameters[name]
            assert found.kind == parameter.kind
            if name != switch:
                assert found.annotation == parameter.annotation
                assert (found.default is inspect.Parameter.empty) == (parameter.default is inspect.Parameter.empty)
