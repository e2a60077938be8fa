"""Linear layers of any model inside ``faster_linear``: which go to oneDNN, and what keeps to PyTorch's own choice."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from qstar_kernels import cpu_products, current_cpu_products, faster_linear, linear, products
from qstar_kernels.testing import assert_close

pytestmark = [
    pytest.mark.skipif(products.find_refusal() is not None, reason="this PyTorch cannot call oneDNN"),
    pytest.mark.usefixtures("by_onednn"),
]


def layers(kind=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(kind(256, 320), nn.ReLU(), kind(320, 256))


def states(*shape):
    return torch.randn(*shape, 256, generator=torch.Generator().manual_seed(0))


def test_layers_inside_go_to_onednn_and_those_outside_and_elsewhere_do_not(calls):
    model, x = layers(), states(64)
    expected = model(x)
    assert not calls
    with faster_linear(x):
        ours = model(x)
        elsewhere = threading.Thread(target=model, args=(x,))
        elsewhere.start()
        elsewhere.join()
    assert calls == [(64, 256, 320), (64, 320, 256)]
    model(x)
    assert len(calls) == 2
    assert_close(ours, model.double()(x.double()))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_backward_outside_keeps_to_the_library_of_the_forward(calls):
    model, x = layers(), states(64)
    with faster_linear(x):
        loss = model(x).square().sum()
    forward = len(calls)
    with cpu_products("torch"):
        loss.backward()
    assert forward == 2 and len(calls) >= forward + 3  # both weights, and the states between


def test_nothing_is_left_behind_by_an_exception_or_by_contexts_inside_each_other(calls):
    model, x = layers(), states(64)
    with pytest.raises(RuntimeError), faster_linear(x):
        model(x[:, :100])
    with faster_linear(x), faster_linear(x):
        with cpu_products("torch"):
            model(x)
        assert current_cpu_products() == "onednn" and not calls
        model(x)
    assert len(calls) == 2
    model(x)
    assert len(calls) == 2


def test_linear_layers_of_gpt2_are_known(calls):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(320, 256), nn.ReLU(), Conv1D(256, 320))
    x = states(2, 64)
    expected = model(x)
    with faster_linear(x):
        ours = model(x)
    assert len(calls) == 2
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with faster_linear(x):
        torch.addmm(torch.ones(128, 256), x[0, :, :256].repeat(2, 1), torch.ones(256, 256), beta=2.0)
        torch.addmm(torch.ones(128, 256), x[0].repeat(2, 1), torch.ones(256, 256))
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_checkpoint_inside_keeps_to_torch_so_that_its_backward_computes_the_same(calls, reentrant):
    model, x = layers(), states(64).requires_grad_()
    seen = []
    model[1].register_forward_hook(lambda module, given, out: seen.append(out.detach().clone()))
    with faster_linear(x):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    loss.backward()
    assert not calls and len(seen) == 2 and torch.equal(*seen)


def test_a_checkpoint_around_computes_the_same_twice(calls):
    model, x = layers(), states(64).requires_grad_()
    seen = []
    model[1].register_forward_hook(lambda module, given, out: seen.append(out.detach().clone()))

    def run(x):
        with faster_linear(x):
            return model(x)

    checkpoint(run, x, use_reentrant=False).square().sum().backward()
    assert len(calls) > 4 and len(seen) == 2 and torch.equal(*seen)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def compiled(model, x):
    return torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def compiled_alone(model, x):
    layer = model[0]
    return torch.compile(lambda x: linear(x, layer.weight, layer.bias), backend="aot_eager", fullgraph=True)(x)


def vmapped(model, x):
    return torch.func.vmap(model)(x[None])[0]


def differentiated(model, x):
    return torch.func.grad(lambda each: model(each).square().sum())(x)


def forward_differentiated(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def on_meta(model, x):
    return torch.zeros(model.to("meta")(x.to("meta")).shape)


def of_a_class(model, x):
    class Own(torch.Tensor):
        pass

    return model(x.as_subclass(Own)).as_subclass(torch.Tensor)


def quantised(model, x):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x)


def sparse(model, x):
    return F.linear(x.to_sparse(), model[0].weight.detach())


def packed(model, x):
    return F.linear(x.to_mkldnn(), model[0].weight.detach(), model[0].bias.detach()).to_dense()


def without_onednn(model, x):
    with torch.backends.mkldnn.flags(enabled=False):
        return model(x)


@pytest.mark.filterwarnings("ignore")  # what is deprecated of the quantisation in PyTorch
@pytest.mark.parametrize(
    "run",
    [
        *(autocast, compiled, compiled_alone, vmapped, differentiated, forward_differentiated),
        *(on_meta, of_a_class, quantised, sparse, packed, without_onednn),
    ],
)
def test_what_onednn_does_not_take_stays_as_it_is(calls, run):
    model, x = layers(), states(64)
    expected = run(model, x)
    with faster_linear(x):
        ours = run(model, x)
    assert not calls and torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_stay_as_they_are(calls, dtype):
    model, x = layers().to(dtype), states(64).to(dtype)
    with faster_linear(states(64)):
        ours = model(x)
    assert not calls and torch.equal(ours, model(x))
