"""What only a GPU can show: offsets beyond 2^31, repeats at full size, graphs, no waiting for the device, a whole step.

The kernels' other tests run there as well: each takes a GPU where there is one.
"""

import contextlib
from importlib import import_module

import pytest
import tiny
import torch

from qstar.experimental import cuda_graph
from qstar.grid import Text
from qstar.learning import Objective
from qstar.thinking import Thinking, read_text, think
from qstar_kernels import sample_linear, thought_attention, thought_attention_part, thought_attention_step
from qstar_kernels.testing import AttentionCase, attention_inputs, relative_error

pytest.importorskip("triton")
attention = import_module("qstar_kernels.thought_attention.triton.attention")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LLAMA_LIKE = AttentionCase(batch=2, heads=32, kv_heads=8, positions=512, tokens=16, width=128, value_width=128)


def states(case: AttentionCase, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator("cuda").manual_seed(0)

    def make(heads):
        shape = (case.batch, case.positions, case.slots, heads, case.width)
        return torch.randn(shape, generator=generator, dtype=dtype, device="cuda").permute(0, 3, 1, 2, 4)

    return [make(heads) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]


def run(q, k, v, do, backend="auto"):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = thought_attention(*leaves, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, do)]


def step_inputs(case: AttentionCase) -> list[torch.Tensor]:
    q, k, v, _ = states(case)
    return [q[:, :, :, :1].contiguous(), *(x[:, :, :, 0] for x in (k, v)), *(x[:, :, :, None, 1:] for x in (k, v))]


@contextlib.contextmanager
def refused_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_bit_for_bit():
    inputs = states(LLAMA_LIKE)
    first = run(*inputs)
    for _ in range(249):
        assert all(torch.equal(x, y) for x, y in zip(run(*inputs), first, strict=True))


def test_more_than_two_to_the_31_elements(monkeypatch):
    """The last sequence of the last heads, far beyond what 32 bits address, is bit for bit what it is alone."""
    monkeypatch.setattr(attention, "MOST_SPLITS", 1)  # else the rows of the small one's text keys are shared out
    case = LLAMA_LIKE._replace(batch=4, positions=4096, width=256, value_width=256)
    q, k, v, do = states(case)
    assert q.numel() > 2**31
    group = case.heads // case.kv_heads
    small = [x[-1:, -heads:].clone() for x, heads in ((q, group), (k, 1), (v, 1), (do, group))]
    for x, y, heads in zip(run(q, k, v, do), run(*small), (group, group, 1, 1), strict=True):
        assert torch.equal(x[-1:, -heads:], y)


def test_torchs_backward_beyond_32_bits():
    """Torch's flash attention cannot address the sums that the thoughts of 8192 positions take at once."""
    inputs = states(LLAMA_LIKE._replace(batch=16))
    for x, y in zip(run(*inputs, backend="torch"), run(*inputs), strict=True):
        assert relative_error(x, y) < 5e-3


def test_the_step_goes_into_a_graph():
    """Captured once, with the step's number on the device, and replayed for every token."""
    inputs = step_inputs(LLAMA_LIKE)
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # else the kernel may meet a step that is not yet 0
        with torch.cuda.stream(stream):
            thought_attention_step(*inputs, step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = thought_attention_step(*inputs, step)
        for token in range(LLAMA_LIKE.tokens):
            step.fill_(token)
            graph.replay()
            assert torch.equal(out, thought_attention_step(*inputs, token))


def test_the_host_never_waits():
    inputs, step = states(LLAMA_LIKE), step_inputs(LLAMA_LIKE)
    run(*inputs)
    thought_attention_step(*step, 3)
    with refused_waits():
        run(*inputs)
        thought_attention_step(*step, 3)


def thinking_case(family="llama", **settings):
    """A model whose kernels and products are of some size, a text with padding on its left, and its grid."""
    sizes = dict(n_embd=128) if family == "gpt2" else dict(hidden_size=128, head_dim=32)
    settings = dict(thought_tokens=6, ahead_tokens=2) | settings
    model = tiny.thinking_model(family, changes=sizes, **settings).cuda()
    padding = torch.ones(3, 50, dtype=torch.int64)
    padding[1, :7] = 0
    return model, Text.from_inputs(tiny.text(3, 50).cuda(), padding.cuda()), model.grid(50)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi3"])
def test_thoughts_from_a_graph_are_those_of_every_token_in_turn(family, autocast):
    model, text, grid = thinking_case(family)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for seed in range(3):  # each captures anew, in memory that others have left
            options = dict(temperature=1.0, seed=seed, row_offset=2**33, last=None if seed else 9)
            expected = think(model, text, grid, **options)
            cuda_graph.enable(model)
            assert torch.equal(think(model, text, grid, **options), expected)
            cuda_graph.disable(model)
    assert expected.unique().numel() > 5


def test_a_training_step_repeats_bit_for_bit_with_a_graph_and_without():
    """Gradients have one order, and what autocast keeps of the weights is not lost to the memory of the graph."""
    results = []
    for replayed in (False, False, True):
        model, text, _ = thinking_case()
        if replayed:
            cuda_graph.enable(model)
        for seed in range(3):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                output = Objective(seed=seed)(model, text.tokens)
            output.loss.backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        results.append((output.thoughts, output.loss, gradients))
    thoughts, loss, gradients = results[0]
    for other_thoughts, other_loss, other_gradients in results[1:]:
        assert torch.equal(thoughts, other_thoughts)
        assert torch.equal(loss, other_loss)
        assert gradients.keys() == other_gradients.keys()
        for name, x in gradients.items():
            assert torch.equal(other_gradients[name], x), name


@pytest.mark.parametrize("replayed", [False, True], ids=["every token", "graph"])
def test_the_host_never_waits_while_thinking(replayed):
    model, text, grid = thinking_case()
    if replayed:
        cuda_graph.enable(model)
    options = dict(temperature=1.0)
    expected = think(model, text, grid, **options)  # which compiles kernels, and checks ids that are new
    with refused_waits():
        thoughts = think(model, text, grid, **options)
    assert torch.equal(thoughts, expected)


def test_a_model_s_graphs_share_their_memory():
    model, text, grid = thinking_case()
    cuda_graph.enable(model)
    reserved = []
    for seed in range(6):
        think(model, text, grid, temperature=1.0, seed=seed)
        reserved.append(torch.cuda.memory_reserved())
    assert len(set(reserved[1:])) == 1


def test_what_waits_cannot_be_captured():
    """It is refused with a reason, and the GPU works on."""
    model, text, grid = thinking_case()
    with torch.no_grad():
        say_next = Thinking(model, read_text(model, text, grid), grid, 50, temperature=1.0, seed=0, row_offset=0)
        say_next()
        with pytest.raises(ValueError, match="cuda_graph is enabled, but thinking cannot be captured: the model waits"):
            cuda_graph.capture(lambda: (say_next(), say_next.tokens.tolist()), model, text.tokens.device)
    expected = think(model, text, grid, temperature=1.0)
    cuda_graph.enable(model)
    assert torch.equal(think(model, text, grid, temperature=1.0), expected)


def test_compiled_by_inductor():
    inputs = states(LLAMA_LIKE)
    expected = run(*inputs)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: thought_attention(q, k, v) * 2, fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = compiled(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs[3] / 2)
    for x, y in zip((out / 2, *grads), expected, strict=True):
        assert relative_error(x, y) < 1e-2


def test_every_rule_at_full_size():
    case = LLAMA_LIKE._replace(
        batch=1, heads=8, kv_heads=2, positions=200, rationales=2, window=70, softcap=5.0, sinks=True, text_start=True
    )
    inputs = attention_inputs(case, torch.bfloat16)
    rules = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.rules.items()}
    results = {}
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float64)):
        leaves = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs.leaves]
        out = thought_attention(*leaves[:3], sinks=leaves[3], **rules, backend=backend)
        results[backend] = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    for mine, exact in zip(*results.values(), strict=True):
        assert relative_error(mine, exact) < 2e-2


@pytest.mark.parametrize("window", [None, 70])
def test_parts_are_the_packed_op(window):
    """Three parts of 170, 170 and 172 positions, with the gradients of the text's keys from all of them."""
    leaves = [x.requires_grad_() for x in states(LLAMA_LIKE)[:3]]
    expected = thought_attention(*leaves, window=window)[:, :, :, 1:]
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, weights)
    q, k, v = leaves
    parts = []
    for start, stop in ((0, 170), (170, 340), (340, 512)):
        thoughts = [x[:, :, start:stop, None, 1:] for x in (q, k, v)]
        text = [x[:, :, :stop, 0] for x in (k, v)]
        parts.append(thought_attention_part(thoughts[0], *text, *thoughts[1:], window=window))
    out = torch.cat(parts, dim=2).flatten(3, 4)
    for x, y in zip((out, *torch.autograd.grad(out, leaves, weights)), (expected, *expected_gradients), strict=True):
        assert relative_error(x, y) < 1e-2


@pytest.mark.parametrize("window", [None, 70])
def test_a_part_at_given_positions_is_those_rows_of_the_packed_op(window):
    """Other positions in each sequence, with the gradients of the text's keys."""
    leaves = [x.requires_grad_() for x in states(LLAMA_LIKE)[:3]]
    positions = torch.rand(2, 512, device="cuda").argsort(1)[:, :128].sort(1).values
    rows = torch.arange(2, device="cuda")[:, None], slice(None), positions

    def taken(x):
        return x[rows].transpose(1, 2)[:, :, :, 1:]

    expected = taken(thought_attention(*leaves, window=window))
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, weights)
    q, k, v = leaves
    thoughts = [taken(x)[:, :, :, None] for x in (q, k, v)]
    text = [x[:, :, :, 0] for x in (k, v)]
    out = thought_attention_part(thoughts[0], *text, *thoughts[1:], window=window, positions=positions).flatten(3, 4)
    for x, y in zip((out, *torch.autograd.grad(out, leaves, weights)), (expected, *expected_gradients), strict=True):
        assert relative_error(x, y) < 1e-2


def test_a_training_step_in_parts_is_that_of_one_piece():
    results = []
    for most in (None, 400):
        model, text, _ = thinking_case()
        output = Objective(policy_weight=1.0, max_grid_tokens=most)(model, text.tokens)
        output.loss.backward()
        results.append((output, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}))
    (whole, gradients), (parts, gradients_of_parts) = results
    assert torch.equal(parts.thoughts, whole.thoughts)
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert gradients_of_parts.keys() == gradients.keys()
    for name, x in gradients.items():
        assert relative_error(gradients_of_parts[name], x) < 1e-3, name


def test_draws_are_those_of_a_cpu():
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 64), torch.randn(5000, 64) * 0.2
    expected, expected_log_prob = sample_linear(hidden, weight, seed=1)
    tokens, log_prob = (x.cpu() for x in sample_linear(hidden.cuda(), weight.cuda(), seed=1))
    same = tokens == expected
    assert same.float().mean() > 0.995
    torch.testing.assert_close(log_prob[same], expected_log_prob[same], rtol=0, atol=2e-5)


@pytest.mark.parametrize("chosen", [None, [[0, 3, 4, 20, 29], [1, 2, 11, 12, 30]]], ids=["all positions", "some"])
def test_a_training_step_is_that_of_a_cpu(chosen):
    """With the same thoughts: loss, reward and every gradient, in float32."""
    results = []
    for device in ("cpu", "cuda"):
        model = tiny.thinking_model("llama", changes=dict(hidden_size=64, head_dim=16)).to(device)
        tokens, thoughts = tiny.text(2, 33), tiny.random_thoughts(model, 2, 33 if chosen is None else 5)
        given = dict(thoughts=thoughts) | ({} if chosen is None else dict(positions=torch.tensor(chosen)))
        given = {name: x.to(device) for name, x in given.items()}
        output = Objective(policy_weight=1.0)(model, tokens.to(device), **given)
        output.loss.backward()
        assert output.rewarded > 0
        gradients = {name: x.grad.cpu() for name, x in model.named_parameters() if x.grad is not None}
        results.append((output.loss.item(), output.reward.item(), gradients))
    (loss, reward, gradients), (loss_there, reward_there, gradients_there) = results
    assert loss_there == pytest.approx(loss, rel=1e-5)
    assert reward_there == pytest.approx(reward, rel=1e-4)
    assert gradients.keys() == gradients_there.keys()
    for name, x in gradients.items():
        assert relative_error(gradients_there[name], x) < 1e-3, name
