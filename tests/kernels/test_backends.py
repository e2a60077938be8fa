"""The choice of a backend: what is chosen, what is said of it, and what runs."""

from contextlib import ExitStack
from importlib import import_module

import fresh_python
import pytest
import torch

import qstar_kernels
from qstar_kernels import backends
from qstar_kernels.backends import Facts, choose, decide

OPS = list(backends.OPS)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def call(op: str, dtype: torch.dtype, width: int, **options) -> None:
    """An op forward and, where it has one, backward, on a small case of ``width`` values a row."""
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, width, generator=generator).to(DEVICE, dtype).requires_grad_()

    targets = torch.arange(3, device=DEVICE)
    row_weight = torch.tensor([1, 0, 1], dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    leaves, others = {
        "thought_attention": ([states(1, 2, 3, 3) for _ in range(3)], ()),
        "thought_attention_step": (
            [states(1, 2, 3, 1), states(1, 2, 3), states(1, 2, 3), states(1, 2, 3, 1, 2), states(1, 2, 3, 1, 2)],
            (1,),
        ),
        "thought_attention_part": (
            [states(1, 2, 2, 1, 2), states(1, 2, 3), states(1, 2, 3), states(1, 2, 2, 1, 2), states(1, 2, 2, 1, 2)],
            (),
        ),
        "mix_hidden": ([states(3), states(3), states(3), states()], ()),
        "linear_log_prob": ([states(3), states(5)], (targets,)),
        "linear_log_prob_sum": ([states(3), states(5)], (targets, row_weight)),
        "sample_linear": ([states(3), states(5)], ()),
    }[op]
    if op == "sample_linear":
        options["seed"] = 0
    result = getattr(qstar_kernels, op)(*leaves, *others, **options)
    result = result[0] if isinstance(result, tuple) else result
    if result.requires_grad:
        torch.autograd.grad(result.sum(), leaves)


@pytest.fixture
def card(monkeypatch):
    """Stands for a GPU: ``card(9, 0)`` sets its compute capability."""

    def set_capability(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(torch.version, "hip", None)
    set_capability(9, 0)
    return set_capability


def facts(op: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 64) -> dict[str, Facts]:
    return dict.fromkeys(backends.OPS[op].arguments, Facts(torch.device(device), dtype, (width,)))


@pytest.mark.parametrize("op", OPS)
def test_what_auto_is_on_a_card_and_why(card, op):
    pytest.importorskip("triton")
    first = backends.OPS[op].arguments[0]
    assert decide(op, "auto", facts(op)).backend == "triton"
    assert decide(op, "auto", facts(op, dtype=torch.float64))[:2] == ("torch", f"{first} has dtype torch.float64")
    assert decide(op, "torch", facts(op)).backend == "torch"
    assert decide(op, "reference", facts(op)).backend == "reference"
    card(7, 5)
    assert decide(op, "auto", facts(op))[:2] == ("torch", "a card is older than compute capability 8.0")
    for device in ("cpu", "mps"):
        reason = f"device is {device}: the Triton kernels run on GPUs"
        assert decide(op, "auto", facts(op, device=device))[:2] == ("torch", reason)


@pytest.mark.parametrize(("width", "taken"), [(15, False), (16, True), (256, True), (257, False)])
def test_rows_that_the_attention_kernels_do_not_take(card, width, taken):
    pytest.importorskip("triton")
    for op, last in (("thought_attention", "v"), ("thought_attention_step", "v_text")):
        given = facts(op) | {last: facts(op, width=width)[last]}
        found = decide(op, "auto", given)
        assert found.backend == ("triton" if taken else "torch")
        assert taken or found.reason == f"{last} has rows of {width} values, not 16 to 256"
    assert decide("sample_linear", "auto", facts("sample_linear", width=width)).backend == "triton"


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_that_cannot_run_is_refused(card, op):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"^backend is 'triton', but it cannot run: \w+ has dtype torch.float64$"):
        decide(op, "triton", facts(op, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^backend is 'triton', but it cannot run: \w+ is on mps$"):
        decide(op, "triton", facts(op, device="mps"))
    with pytest.raises(ValueError, match=r"^backend is 'cuda', but .* 'auto', 'reference', 'torch', 'triton'$"):
        decide(op, "cuda", facts(op))
    with pytest.raises(ValueError, match="backend is 'dense'"):
        call(op, torch.float32, 16, backend="dense")


def test_only_gpus_that_torch_finds_are_explained():
    if not ON_GPU:
        with pytest.raises(ValueError, match="device is cuda, but it must be one that torch finds"):
            qstar_kernels.explain("cuda")
    lines = str(qstar_kernels.explain("cpu")[0])
    assert lines == "thought_attention: torch (device is cpu: the Triton kernels run on GPUs)"


@pytest.fixture
def ran(monkeypatch):
    """The languages of the kernels that were launched, and their names in the table; all run but those in Gluon."""
    launch = pytest.importorskip("qstar_kernels.common.launch")
    table = import_module("qstar_kernels.common.tile_table").TileTable
    languages, names = set(), set()
    run, find = launch.Launch.run, table.find

    def recorded_run(self):
        languages.add(self.language)
        if self.language == "triton":
            run(self)

    def recorded_find(self, kernel, *of):
        names.add(kernel)
        return find(self, kernel, *of)

    monkeypatch.setattr(launch.Launch, "run", recorded_run)
    monkeypatch.setattr(table, "find", recorded_find)
    return languages, names


@pytest.mark.parametrize("as_gpu", [False, True], ids=["on a cpu", "as on a gpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("op", OPS)
def test_what_is_explained_is_what_runs(monkeypatch, ran, op, dtype, width, as_gpu):
    if as_gpu:  # where there is none, the interpreter stands for it
        monkeypatch.setattr(backends, "is_gpu", lambda device: True)
    elif ON_GPU:
        monkeypatch.setattr(backends, "is_gpu", lambda device: False)
    [choice] = [x for x in qstar_kernels.explain(DEVICE, dtype, width=width) if x.op == op]
    call(op, dtype, width)
    languages, names = ran
    assert choice.backend == ("triton" if languages else "torch")
    assert {choice.kernels} - {None} == languages
    assert names == (set(backends.OPS[op].names) if languages else set())
    expected = as_gpu and dtype != torch.float64 and (width >= 16 or "attention" not in op)
    assert (choice.backend == "triton") == expected
    if languages and not ON_GPU:
        assert choice.tiles.startswith("set by hand")
        assert str(choice) == f"{op}: triton ({choice.reason}; kernels in triton; tiles {choice.tiles})"


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's, of what the kernels in Gluon have left unwritten
def test_kernels_in_gluon_are_explained_where_the_table_asks_for_them(monkeypatch, ran):
    cases = import_module("qstar_kernels.thought_attention.cases")
    monkeypatch.setattr(backends, "is_gpu", lambda device: True)
    with cases.all_for_hopper(64):
        choices = {x.op: x for x in qstar_kernels.explain(DEVICE, torch.bfloat16, width=64)}
        call("thought_attention", torch.bfloat16, 64)
    assert "gluon" in ran[0] and choices["thought_attention"].kernels == "gluon"
    assert "on trial" in choices["thought_attention"].tiles
    assert {x.kernels for op, x in choices.items() if op != "thought_attention"} == {"triton"}
    with ExitStack() as stack:
        stack.enter_context(cases.otherwise_plain(""))
        assert qstar_kernels.explain(DEVICE, torch.bfloat16, width=64)[0].kernels == "triton"


PREPARE = """
import importlib.abc, os, sys, warnings
os.environ["TRITON_INTERPRET"] = "1"

class Failing(importlib.abc.MetaPathFinder):
    "Fails the import of one module."
    def __init__(self, name, error):
        self.name, self.error = name, error
    def find_spec(self, name, path, target=None):
        if name == self.name:
            raise self.error
"""
ON_A_GPU = """
import torch, qstar_kernels
from qstar_kernels import backends
backends.is_gpu = lambda device: True
x = torch.randn(1, 2, 3, 3, 16)
hidden, weight = torch.randn(3, 16), torch.randn(5, 16)

def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error} <- {error.__cause__!r}"
    return "runs"

def everything(backend):
    return [
        outcome(lambda: qstar_kernels.thought_attention(x, x, x, backend=backend)),
        outcome(lambda: qstar_kernels.sample_linear(hidden, weight, seed=0, backend=backend)),
    ]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    reasons = [(choice.backend, choice.reason) for choice in qstar_kernels.explain()]
    said_by_explain = len(caught)
    auto = everything("auto") + everything("auto")
named = everything("triton")
warned = [(warning.category.__name__, str(warning.message)) for warning in caught]
print(repr((reasons[0], reasons[-1], said_by_explain, auto, named, warned)))
"""


def on_a_gpu(prepared: str) -> tuple:
    return eval(fresh_python.run(PREPARE + prepared + ON_A_GPU))


def test_without_triton_torch_runs_quietly_and_triton_is_refused_by_name():
    first, last, _, auto, named, warned = on_a_gpu("sys.modules['triton'] = None")
    assert first == last == ("torch", "triton is not installed")
    assert auto == ["runs"] * 4 and warned == []
    assert named == ["ValueError: backend is 'triton', but it cannot run: triton is not installed <- None"] * 2


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("triton", "ImportError('a version of something')"),
        ("triton.language", "OSError('libcuda.so.1: no such file')"),
        ("triton.language", "ModuleNotFoundError('no parser', name='parser')"),
        ("qstar_kernels.common.primitives", "AttributeError('tl has no such thing')"),
    ],
)
def test_a_broken_triton_is_told_once_and_raises_by_name(module, error):
    first, last, said_by_explain, auto, named, warned = on_a_gpu(
        f"sys.meta_path.insert(0, Failing({module!r}, {error}))"
    )
    cause = repr(eval(error))
    for backend, reason in (first, last):
        assert backend == "torch" and "is installed, but" in reason and cause in reason
    assert said_by_explain == 0 and auto == ["runs"] * 4
    [(category, message)] = warned
    assert category == "RuntimeWarning" and "torch runs in the place" in message and cause in message
    assert all(line.startswith("RuntimeError: backend is 'triton'") and line.endswith(f"<- {cause}") for line in named)


def test_one_op_s_broken_kernels_leave_the_other_s_alone():
    failing = "sys.meta_path.insert(0, Failing('qstar_kernels.lm_head.triton.row_kernels', ValueError('a kernel')))"
    first, last, _, auto, named, warned = on_a_gpu(failing)
    assert (first[0], last[0]) == ("triton", "torch") and "ValueError('a kernel')" in last[1]
    assert auto == ["runs"] * 4 and len(warned) == 1
    assert named[0] == "runs" and named[1].startswith("RuntimeError") and named[1].endswith("<- ValueError('a kernel')")


# Triton itself asks for these when it looks at a launch's arguments.
WITHOUT_GLUON = """
import importlib.abc, importlib.machinery, os, sys
from types import ModuleType
os.environ["TRITON_INTERPRET"] = "1"
ASKED_FOR = {"", ".gluon", ".gluon.language", ".gluon.language._layouts", ".gluon.language.amd",
             ".gluon.language.amd._layouts", ".gluon.language.nvidia", ".gluon.language.nvidia.blackwell",
             ".gluon.nvidia", ".gluon.nvidia.hopper", ".gluon.amd", ".gluon.amd.gfx1250", ".gluon.amd.cdna5"}

class Empty(ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__") or not name[0].isupper():
            raise AttributeError(name)
        return type(name, (), {})

class NoGluon(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith("triton.experimental"):
            if name.removeprefix("triton.experimental") not in ASKED_FOR:
                raise ModuleNotFoundError(f"no {name}", name=name)
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Empty(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, NoGluon())

import torch
from qstar_kernels import *
from qstar_kernels.testing import AttentionCase, assert_close, attention_inputs

def check(function, leaves, differentiable=True):
    "Values, and where there are any gradients, of the Triton kernels and of the specification."
    results = []
    for backend, wide in (("triton", False), ("reference", True)):
        given = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        out = function(*given, backend=backend)
        out = out if isinstance(out, tuple) else (out,)
        if differentiable:
            out += torch.autograd.grad(out[0].square().sum(), given)
        results.append(out)
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, gradient=True)

case = AttentionCase(positions=5, width=16, value_width=16)
inputs = attention_inputs(case, torch.float32)
check(thought_attention, inputs.leaves)
k, v = inputs.k.detach(), inputs.v.detach()
thoughts = [x[:, :, :, 1:].unflatten(3, (1, case.tokens)) for x in (k, v)]
step = [inputs.q.detach()[:, :, :, 2:3], k[:, :, :, 0], v[:, :, :, 0], *thoughts]
check(lambda *x, backend: thought_attention_step(*x, 1, backend=backend), step, differentiable=False)
torch.manual_seed(0)
rows = [torch.randn(4, 24) for _ in range(3)]
check(mix_hidden, [*rows, torch.randn(24)])
hidden, weight, targets = torch.randn(4, 24), torch.randn(140, 24), torch.arange(4)
check(lambda *x, backend: linear_log_prob(*x, targets, backend=backend), [hidden, weight])
total = lambda h, w, backend: linear_log_prob_sum(h, w, targets, torch.ones(4, dtype=h.dtype), backend=backend)[0]
check(total, [hidden, weight])
check(lambda *x, backend: sample_linear(*x, seed=1, backend=backend)[1], [hidden, weight], differentiable=False)
tokens = [sample_linear(hidden, weight, seed=1, backend=backend)[0] for backend in ("triton", "torch")]
assert torch.equal(*tokens)
print(sorted(name for name in sys.modules if "gluon" in name and name.startswith("qstar")))
try:
    import qstar_kernels.thought_attention.gluon.launches
except ImportError:
    print("no Gluon")
"""


def test_no_op_needs_gluon_or_imports_ours():
    pytest.importorskip("triton")
    assert fresh_python.run(WITHOUT_GLUON).splitlines() == ["[]", "no Gluon"]


def test_a_table_that_asks_for_gluon_where_it_is_broken_gets_triton(monkeypatch):
    pytest.importorskip("triton")
    table = import_module("qstar_kernels.thought_attention.triton.tiles").TABLE
    tile = import_module("qstar_kernels.common.launch").Tile(128, 64, 4, 2)
    rivals = import_module("qstar_kernels.thought_attention.rivals")
    monkeypatch.setattr(rivals, "_gluon_launches", lambda: ImportError("no Gluon"))
    with table.trying("hopper_forward", tile):
        with pytest.warns(RuntimeWarning, match="kernels in Triton run in the place of .*no Gluon"):
            assert rivals.find_gluon(table, "forward", "sm_90", torch.bfloat16, 64) is None
        assert rivals.find_gluon(table, "forward", "sm_90", torch.bfloat16, 64) is None
    assert rivals.find_gluon(table, "forward", "sm_90", torch.bfloat16, 64) is None


def test_choose_looks_at_tensors():
    x = torch.zeros(2, 3)
    assert choose("mix_hidden", "torch", thought=x) == "torch"
    with pytest.raises(ValueError, match="backend is 7, but it must be one of 'auto'"):
        choose("mix_hidden", 7, thought=x)
