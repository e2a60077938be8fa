"""``attn_implementation="qstar"`` without thoughts: what the model had, through the faster of two attentions.

Short texts of every family are in test_models.py; here are those long enough for ours, and what must never reach it.
"""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers import DynamicCache, masking_utils

from qstar import attention, drop_in, layouts

LENGTH = 1030
WINDOW = 100
RULES = {  # of each layer: its window, and whether it has a soft-cap or sinks
    "mistral": [(WINDOW, False), (WINDOW, False)],
    "qwen2": [(WINDOW, False)],
    "gemma2": [(WINDOW, True), (None, True)],
    "gemma3": [(WINDOW, False)],
    "gpt_oss": [(WINDOW, True), (None, True)],
}


def long_model(family: str, **changes):
    """A random model with room for a long text."""
    values = tiny.FAMILIES[family][1]
    room = {name: 2048 for name in ("max_position_embeddings", "n_positions") if name in values}
    window = {"sliding_window": WINDOW} if "sliding_window" in values else {}
    return tiny.plain_model(family, **room, **window, **changes)


@pytest.fixture
def fused(monkeypatch):
    """The calls that reach our op: the window, and whether there is a soft-cap or sinks."""
    calls = []

    def watched(q, k, v, **options):
        calls.append((options["window"], options["softcap"] is not None or options["sinks"] is not None))
        return op(q, k, v, **options)

    op = layouts.thought_attention
    monkeypatch.setattr(layouts, "thought_attention", watched)
    return calls


def gradients(model, tokens, mask):
    """The logits of the text, and every parameter's gradient where text alone predicts and is predicted."""
    model.zero_grad()
    predicted = mask.bool() & mask.roll(1, dims=1).bool()
    output = model(tokens, attention_mask=mask, labels=tokens.masked_fill(~predicted, -100))
    output.loss.backward()
    return output.logits.detach()[mask.bool()], {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(ours, theirs, name: str = "logits"):
    error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-6)
    assert error < 1e-5, f"{name}: {error:.1e}"


def assert_equal_results(ours, theirs):
    assert_close(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert_close(ours[1][name], gradient, name)


def padded(side: str):
    tokens = tiny.text(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 300) if side == "left" else slice(-300, None)] = 0
    return tokens, mask


# Models


@pytest.mark.parametrize("family", ["gpt2", "llama", *RULES])
def test_a_whole_text_equals_eager(family, fused):
    model, tokens = long_model(family), tiny.text(1, LENGTH)
    theirs = gradients(model, tokens, torch.ones_like(tokens))
    model.set_attn_implementation(attention.NAME)
    assert_equal_results(gradients(model, tokens, torch.ones_like(tokens)), theirs)
    assert fused == RULES.get(family, [])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_a_padded_batch_equals_eager(family, side, fused):
    model, (tokens, mask) = long_model(family), padded(side)
    theirs = gradients(model, tokens, mask)
    model.set_attn_implementation(attention.NAME)
    assert_equal_results(gradients(model, tokens, mask), theirs)
    assert not fused


@pytest.mark.parametrize(
    "family, cache", [("llama", "dynamic"), *((family, "dynamic") for family in RULES), ("gpt_oss", "static")]
)
def test_generation_equals_eager(family, cache, fused):
    model, tokens = long_model(family), tiny.text(1, LENGTH)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, cache_implementation=cache, disable_compile=True)
    generated = model.generate(tokens, **options)
    model.set_attn_implementation(attention.NAME)
    assert torch.equal(model.generate(tokens, **options), generated)
    rules = RULES.get(family, [])
    assert fused == ([rule for rule in rules if rule[0]] if cache == "static" else rules)


@pytest.mark.parametrize("family", RULES)
def test_neither_mask_nor_dense_scores_are_made(family, monkeypatch):
    model, tokens = long_model(family), tiny.text(1, LENGTH)
    model.set_attn_implementation(attention.NAME)
    make = drop_in.sdpa_mask

    def never(*args, **kwargs):
        raise AssertionError("a dense mask or dense scores")

    def no_mask(**arguments):
        mask = make(**arguments)
        return mask if mask is None else never()

    monkeypatch.setattr(drop_in, "sdpa_mask", no_mask)
    monkeypatch.setattr(transformers.models.gemma2.modeling_gemma2, "eager_attention_forward", never)
    monkeypatch.setattr(transformers.models.gpt_oss.modeling_gpt_oss, "eager_attention_forward", never)
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant, fused):
    model, tokens = long_model("gemma2").train(), tiny.text(1, LENGTH)
    model.set_attn_implementation(attention.NAME)
    before = gradients(model, tokens, torch.ones_like(tokens))
    tiny.checkpoint_layers(model, use_reentrant=reentrant)
    after = gradients(model, tokens, torch.ones_like(tokens))
    assert len(fused) == 3 * len(RULES["gemma2"])
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())


@torch.no_grad()
def test_autocast_rounds_no_more_than_eager(fused):
    model, tokens = long_model("gemma2"), tiny.text(1, 300)
    exact = model(tokens).logits

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            return (model(tokens, use_cache=False).logits.float() - exact).norm()

    theirs = error()
    model.set_attn_implementation(attention.NAME)
    assert error() < 1.2 * theirs
    assert fused == RULES["gemma2"]


@torch.no_grad()
def test_compiled_layers_read_the_mask(fused):
    model, tokens = long_model("mistral", num_hidden_layers=1), tiny.text(1, LENGTH)
    expected = model(tokens).logits
    model.set_attn_implementation(attention.NAME)
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
    assert_close(model(tokens, use_cache=False).logits, expected)
    assert not fused


# Masks


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 7, 4), torch.zeros(2, 1, 7, 4), 0)
    return cache


def padding(start: int, stop: int, length: int = 130) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, start:stop] = 0
    return mask


def sees_the_first(batch, head, query, key):
    return key == 0


WINDOW_ALONE = {
    "nothing": dict,
    "no padding": lambda: dict(attention_mask=padding(0, 0)),
    "one document": lambda: dict(position_ids=torch.arange(130)[None]),
    "an empty cache": lambda: dict(past_key_values=DynamicCache()),
}
MORE_THAN_A_WINDOW = {
    "padding on the left": lambda: dict(attention_mask=padding(0, 9)),
    "padding on the right": lambda: dict(attention_mask=padding(120, 130)),
    "a longer mask": lambda: dict(attention_mask=padding(0, 0, length=140)),
    "documents": lambda: dict(position_ids=torch.cat([torch.arange(110), torch.arange(20)])[None]),
    "a cache": lambda: dict(past_key_values=filled_cache()),
    "a function that adds": lambda: dict(or_mask_function=sees_the_first),
    "a function that hides": lambda: dict(and_mask_function=sees_the_first),
    "blocks": lambda: dict(block_sequence_ids=torch.arange(130).expand(2, -1) // 20),
    "no skipping": lambda: dict(allow_is_causal_skip=False),
}


def mask_of(implementation: str, arguments: dict, create=masking_utils.create_sliding_window_causal_mask, **config):
    config = transformers.MistralConfig(sliding_window=WINDOW, **config)
    config._attn_implementation = implementation
    defaults = dict(inputs_embeds=torch.zeros(2, 130, 8), attention_mask=None, past_key_values=None)
    return create(config, **defaults | arguments)


@pytest.mark.parametrize("case", WINDOW_ALONE)
def test_a_window_alone_makes_no_mask(case):
    ours = mask_of(attention.NAME, WINDOW_ALONE[case]())
    theirs = mask_of("sdpa", WINDOW_ALONE[case]())
    assert ours.window == WINDOW
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert torch.equal(ours.dense(), theirs)


@pytest.mark.parametrize("case", MORE_THAN_A_WINDOW)
def test_no_other_mask_is_lost(case):
    ours = mask_of(attention.NAME, MORE_THAN_A_WINDOW[case]())
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, mask_of("sdpa", MORE_THAN_A_WINDOW[case]()))


def test_a_chunk_is_no_window():
    options = dict(create=masking_utils.create_chunked_causal_mask, attention_chunk_size=WINDOW)
    ours = mask_of(attention.NAME, {}, **options)
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, mask_of("sdpa", {}, **options))


def test_a_window_in_both_directions_is_another():
    ours = mask_of(attention.NAME, {}, is_causal=False)
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, mask_of("sdpa", {}, is_causal=False))


def test_a_mask_of_four_dimensions_is_kept():
    mask = torch.zeros(2, 1, 130, 130)
    assert mask_of(attention.NAME, dict(attention_mask=mask)) is mask


def test_a_model_may_read_the_mask():
    mask, dense = mask_of(attention.NAME, {}), mask_of("sdpa", {})
    assert torch.equal(mask[:, :, 3:7, ::2], dense[:, :, 3:7, ::2])
    scores = torch.randn(2, 3, 130, 130)
    assert torch.equal(scores.masked_fill(~mask, 0), scores.masked_fill(~dense, 0))
    assert torch.equal(torch.cat([mask, dense], dim=-1), torch.cat([dense, dense], dim=-1))


# The attention function


@pytest.fixture
def layer() -> nn.Module:
    """A layer of Gemma 2, whose eager attention knows a soft-cap."""
    return tiny.plain_model("gemma2").model.layers[1].self_attn


def inputs(queries: int, keys: int):
    torch.manual_seed(0)
    return torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)


def window_mask(length: int) -> drop_in.WindowMask:
    return attention.qstar_mask(
        local_size=WINDOW,
        batch_size=1,
        q_length=length,
        kv_length=length,
        mask_function=masking_utils.sliding_window_causal_mask_function(WINDOW),
        allow_is_causal_skip=True,
        config=transformers.MistralConfig(sliding_window=WINDOW),
        device="cpu",
    )


def in_window(length: int) -> torch.Tensor:
    age = torch.arange(length)[:, None] - torch.arange(length)
    return (age >= 0) & (age < WINDOW)


def plain_attention(q, k, v, visible, softcap=None, bias=0):
    """Written out: ``visible`` ``[N, S]`` says which keys a query sees."""
    scores = q @ k.repeat_interleave(2, dim=1).mT * 8**-0.5 + bias
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(2, dim=1)).transpose(1, 2)


def test_a_mask_changed_in_place_is_not_lost(layer, fused):
    (q, k, v), mask, visible = inputs(1100, 1100), window_mask(1100), in_window(1100)
    out, _ = attention.qstar_attention(layer, q, k, v, mask)
    torch.testing.assert_close(out, plain_attention(q, k, v, visible), rtol=1e-5, atol=1e-5)
    assert fused == [(WINDOW, False)]
    mask[..., 0] = True
    visible[:, 0] = True
    out, _ = attention.qstar_attention(layer, q, k, v, mask)
    torch.testing.assert_close(out, plain_attention(q, k, v, visible), rtol=1e-5, atol=1e-5)
    assert len(fused) == 1


MORE_THAN_CAUSAL = {  # keys, by how many a query sees past the diagonal, whether a mask says so, options
    "keys before the text": (527, 7, True, {}),
    "a mask": (520, 5, True, {}),
    "both directions": (520, 520, False, {"is_causal": False}),
    "weights are asked for": (520, 0, False, {"output_attentions": True}),
}


@pytest.mark.parametrize("case", MORE_THAN_CAUSAL)
def test_only_causal_attention_of_a_whole_text_is_ours(case, layer, fused):
    keys, past, masked, options = MORE_THAN_CAUSAL[case]
    q, k, v = inputs(520, keys)
    visible = torch.ones(520, keys, dtype=torch.bool).tril(past)
    mask = visible[None, None] if masked else None
    out, _ = attention.qstar_attention(layer, q, k, v, mask, softcap=0.5, **options)
    torch.testing.assert_close(out, plain_attention(q, k, v, visible, softcap=0.5), rtol=1e-5, atol=1e-5)
    assert not fused


def test_a_position_bias_is_not_lost(layer, fused):
    (q, k, v), bias = inputs(1100, 1100), torch.randn(1, 1, 1100, 1100)
    out, _ = attention.qstar_attention(layer, q, k, v, window_mask(1100), position_bias=bias)
    torch.testing.assert_close(out, plain_attention(q, k, v, in_window(1100), bias=bias), rtol=1e-5, atol=1e-5)
    assert not fused


def test_dropout_is_not_lost(layer, fused):
    out, _ = attention.qstar_attention(layer.train(), *inputs(520, 520), None, dropout=1.0, softcap=0.5)
    assert not out.any()
    assert not fused


@pytest.mark.parametrize(
    "dtype, positions, window, softcap, expected",
    [
        (torch.float32, 4096, None, None, False),
        (torch.float32, 1024, 100, None, True),
        (torch.float32, 1023, 100, None, False),
        (torch.bfloat16, 512, 100, None, True),
        (torch.bfloat16, 511, 100, None, False),
        (torch.float32, 512, None, 50.0, True),
        (torch.float32, 511, 100, 50.0, False),
        (torch.float16, 64, None, 50.0, True),
        (torch.float16, 63, None, 50.0, False),
    ],
)
def test_the_rule(dtype, positions, window, softcap, expected):
    assert drop_in.fused_is_better(torch.empty(1, 1, positions, 8, dtype=dtype), window, softcap, None) is expected


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "anything"])
def test_an_unknown_argument_is_refused(name, layer):
    with pytest.raises(ValueError, match=f"Gemma2Attention passes {name}, which attn_implementation='qstar' does not"):
        attention.qstar_attention(layer, *inputs(7, 7), None, **{name: torch.zeros(1)})


def test_arguments_of_other_parts_of_a_model_are_not_refused(layer):
    others = dict(num_items_in_batch=torch.tensor(3), use_cache=True, position_ids=torch.arange(7)[None], indices=None)
    plain, _ = attention.qstar_attention(layer, *inputs(7, 7), None)
    assert torch.equal(attention.qstar_attention(layer, *inputs(7, 7), None, **others)[0], plain)
