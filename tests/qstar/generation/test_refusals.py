"""What ``generate`` cannot do with thoughts is refused with its reason, and what would have no effect as well."""

from __future__ import annotations

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from qstar.generation.naming import CACHE
from qstar.generation.settings import GenerationSettings

MODEL = opinionated("llama")
PROMPT = tiny.text(2, 6)


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(digit) for digit in row] for row in rows])


CANNOT_BE_RIGHT = {
    "a static cache": (
        dict(cache_implementation="static"),
        "cache_implementation is 'static', but thoughts come and go",
    ),
    "an offloaded cache": (dict(cache_implementation="offloaded"), "cache_implementation is 'offloaded'"),
    "a static cache in a config": (
        dict(generation_config=GenerationConfig(cache_implementation="static")),
        "cache_implementation is 'static', but thoughts",
    ),
    "a cache object": (
        dict(past_key_values=DynamicCache()),
        f"{CACHE} is a DynamicCache, but it must be what an",
    ),
    "no cache": (dict(use_cache=False), "use_cache is False, but a model that thinks needs the cache"),
    "a decoding of one's own": (
        dict(custom_generate=print),
        "custom_generate is <built-in function print>, but a model",
    ),
    "embeddings": (
        dict(inputs_embeds=torch.zeros(2, 6, 32)),
        "inputs_embeds is given, .*: a thought reads the text by",
    ),
    "positions": (
        dict(position_ids=PROMPT),
        "position_ids is given, .*: positions are counted from the attention_mask",
    ),
    "guidance": (
        dict(guidance_scale=1.5),
        "guidance_scale is 1.5, .*: it would set a prediction with thoughts against",
    ),
    "hidden states": (dict(output_hidden_states=True), "output_hidden_states is True, .*: states of the thoughts"),
    "attention weights": (dict(output_attentions=True), "output_attentions is True, but a model that thinks"),
    "contrasted layers": (dict(dola_layers="high"), "dola_layers is 'high', .*: it contrasts layers"),
    "contrastive search": (dict(penalty_alpha=0.6), "penalty_alpha is 0.6, .*: contrastive search looks into"),
    "groups of beams": (dict(num_beam_groups=2), "num_beam_groups is 2, .*: it is a decoding of its own"),
    "an early exit": (dict(assistant_early_exit=1), "assistant_early_exit is 1, .* drafts=N"),
    "numbers of an assistant": (dict(num_assistant_tokens=3), "num_assistant_tokens is 3, .* drafts=N"),
    "an assistant that is none": (dict(assistant_model="gpt2"), "assistant_model is a str, but it must be a model"),
    "itself as assistant": (dict(assistant_model=MODEL), "assistant_model is the model itself, which makes guesses"),
    "drafts of beams": (dict(num_beams=2, drafts=4), "drafts is given, but .*: num_beams is 2, and beams part"),
    "an assistant of beams": (
        dict(num_beams=2, assistant_model=tiny.plain_model("gpt2")),
        "assistant_model is given, but no tokens can be guessed: num_beams is 2",
    ),
    "drafts of processes in step": (dict(synced_gpus=True, drafts=4), "drafts is given, but .*: synced_gpus is set"),
    "drafts without thoughts": (dict(think_when="never", drafts=4), "drafts is given, but .*: think_when is 'never'"),
    "an assistant without drafts": (
        dict(drafts=0, assistant_model=tiny.plain_model("gpt2")),
        "assistant_model is given, but drafts is 0",
    ),
    "guesses of two kinds": (
        dict(prompt_lookup_num_tokens=3, assistant_model=tiny.plain_model("gpt2")),
        "assistant_model and prompt_lookup_num_tokens both make guesses",
    ),
    "two numbers of guesses": (dict(prompt_lookup_num_tokens=3, drafts=4), "both say how many tokens are guessed"),
    "thoughts and nothing to hold them": (
        dict(output_thoughts=True),
        "output_thoughts is True, but return_dict_in_gen",
    ),
    "padding on the right": (
        dict(attention_mask=mask("111111", "111100")),
        "a 0 behind text in row 1, but padding must",
    ),
    "a hole": (
        dict(attention_mask=mask("110111", "111111")),
        "attention_mask has a 0 behind text in row 0, but padding",
    ),
    "nothing to go on from": (dict(attention_mask=mask("111111", "000000")), "attention_mask hides all of row 1"),
    "a size of look-ups without them": (
        dict(max_matching_ngram_size=2),
        "max_matching_ngram_size is given, but prompt_l",
    ),
    "a prompt to move away from": (dict(negative_prompt_ids=PROMPT), "negative_prompt_ids is given, .*: there is no"),
    "guidance by a processor": (
        dict(logits_processor=LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, MODEL)])),
        "logits_processor holds a UnbatchedClassifierFreeGuidanceLogitsProcessor, but it would set a prediction with",
    ),
    "a text that outgrows the model": (
        dict(max_new_tokens=119),
        "124 text tokens and 5 tokens of a thought make more than the model's max_position_embeddings = 128",
    ),
}
HAS_NO_EFFECT = {
    "think_when": dict(think_when="every:2"),
    "thought_tokens": dict(thought_tokens=2),
    "thought_temperature": dict(thought_temperature=1.0),
    "thought_seed": dict(thought_seed=1),
    "drafts": dict(drafts=2),
    "output_thoughts": dict(output_thoughts=True, return_dict_in_generate=True),
}
WRONG = {
    "think": (1.5, "think is 1.5, but it must be True, False or None"),
    "think_when": ("sometimes", "think_when is 'sometimes', but it must be 'always', 'never', 'every:N'"),
    "thought_tokens": (0, "thought_tokens is 0, but it must be an integer of at least 1"),
    "drafts": (-1, "drafts is -1, but it must be an integer of at least 0"),
    "thought_temperature": (-0.5, "thought_temperature is -0.5, but it must be a number of at least 0"),
    "thought_seed": (2**64, "thought_seed is 18446744073709551616, but it must be below 2\\^64"),
}


@pytest.mark.parametrize("what", CANNOT_BE_RIGHT)
def test_what_cannot_be_right_is_refused(what):
    options, message = CANNOT_BE_RIGHT[what]
    prompt = None if "inputs_embeds" in options else PROMPT
    with pytest.raises(ValueError, match=message):
        MODEL.generate(prompt, **(dict(max_new_tokens=4) | options))
    expected = MODEL.generate(PROMPT, max_new_tokens=2)  # and the next call is none the worse for it
    assert torch.equal(expected, opinionated("llama").generate(PROMPT, max_new_tokens=2))


@pytest.mark.parametrize("name", HAS_NO_EFFECT)
def test_what_has_no_effect_without_thoughts_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is given, but think is False, so that no thoughts are made"):
        MODEL.generate(PROMPT, max_new_tokens=2, think=False, **HAS_NO_EFFECT[name])
    untrained = opinionated("llama")
    with torch.no_grad():
        untrained.qstar_mixing_head.output.weight.zero_()
    with pytest.raises(ValueError, match=f"{name} is given, but the mixing head has not been trained"):
        untrained.generate(PROMPT, max_new_tokens=2, **HAS_NO_EFFECT[name])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_refused(name):
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**{name: value})
    with pytest.raises(ValueError, match=message):
        MODEL.generate(PROMPT, **{name: value})


def test_a_cache_that_does_not_fit_is_refused():
    output = generate(MODEL, PROMPT, max_new_tokens=4)
    cache, longer = output.past_key_values, torch.cat([output.sequences, PROMPT], dim=1)
    with pytest.raises(ValueError, match=f"inputs has 1 rows, but {CACHE} holds 2"):
        MODEL.generate(longer[:1], past_key_values=cache)
    for wrong in (longer[:, :9], longer + 1, PROMPT):
        with pytest.raises(
            ValueError, match=f"inputs has {wrong.shape[1]} tokens, but they must begin with the 9 that"
        ):
            MODEL.generate(wrong % 30, past_key_values=cache)
    hidden = torch.ones_like(longer)
    hidden[0, 0] = 0
    with pytest.raises(ValueError, match=f"attention_mask must have the padding of the text that {CACHE} holds"):
        MODEL.generate(longer, past_key_values=cache, attention_mask=hidden)
    with pytest.raises(ValueError, match=f"{CACHE} is from a generation with thoughts, but think is False"):
        MODEL.generate(longer, past_key_values=cache, think=False)
    with pytest.raises(ValueError, match=r"ThinkingCache, which model.generate\(think=True\) reads alone"):
        MODEL(longer, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match=r"ThinkingCache, which model.generate\(think=True\) reads alone"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize("name, value", [("cache_implementation", "static"), ("use_cache", False)])
def test_what_a_published_config_says_of_the_cache_gives_way(name, value):
    model = opinionated("llama")
    expected = model.generate(PROMPT, max_new_tokens=4)
    setattr(model.generation_config, name, value)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=4), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_whose_generation_was_broken_off_reads_its_text_afresh(layer):
    model = opinionated("llama")
    first = generate(model, PROMPT, max_new_tokens=4)
    longer = torch.cat([first.sequences, PROMPT], dim=1)
    expected = generate(model, longer)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[layer].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, longer, past_key_values=first.past_key_values)
    hook.remove()
    assert first.past_key_values.get_seq_length() == 0
    output = generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.thoughts, expected.thoughts)


def test_a_text_may_grow_to_the_last_position_that_the_model_knows():
    model = opinionated("gpt2")
    for drafts in (0, 8):
        output = generate(model, PROMPT[:1], max_new_tokens=118, drafts=drafts)  # 123 tokens and 5 of a thought
        assert output.sequences.shape[1] == 124
    with pytest.raises(ValueError, match="124 text tokens and 5 tokens of a thought make more than"):
        generate(model, PROMPT[:1], max_new_tokens=119)


def test_rotary_factors_that_change_on_the_way_are_refused():
    model = opinionated("phi3", changes=tiny.LONG_ROPE)
    with pytest.raises(ValueError, match="cross original_max_position_embeddings = 16"):
        generate(model, PROMPT, max_new_tokens=8)
    crosses = "cross original_max_position_embeddings = 16"
    tokens, mask = tiny.text(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :8] = 0
    refused = {
        "a short row beside a long one": dict(inputs=tokens, attention_mask=mask, max_new_tokens=4),
        "a first pass up to the limit": dict(inputs=tiny.text(2, 17), max_new_tokens=4),
        "a prompt in chunks": dict(inputs=tiny.text(2, 30), prefill_chunk_size=8, max_new_tokens=4),
    }
    for options in refused.values():
        with pytest.raises(ValueError, match=crosses):
            model.generate(**options)
    short = generate(model, PROMPT, max_new_tokens=4)
    with pytest.raises(ValueError, match=crosses):
        longer = torch.cat([short.sequences, tiny.text(2, 12)], dim=1)
        model.generate(longer, past_key_values=short.past_key_values, max_new_tokens=4)
    for tokens, mask in ((PROMPT, None), (tiny.text(2, 20), None), padded(2, 20)):
        output = generate(model, tokens, mask, max_new_tokens=4)
        expected, _ = packed_log_probs(model, output, mask)
        torch.testing.assert_close(output.logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)


def test_another_attention_is_refused():
    model = opinionated("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="the model's attention is 'sdpa', but thoughts need 'qstar'"):
        model.generate(PROMPT)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="continuous batching makes no thoughts, and this model has learned to think"):
        MODEL.generate_batch([[5, 6, 7]])


def test_a_model_with_a_cache_of_its_own_kind_has_no_beams():
    model = opinionated("llama")
    model._reorder_cache = lambda *_: None
    with pytest.raises(ValueError, match="num_beams is 2, but LlamaForCausalLM reorders a cache of its own kind"):
        model.generate(PROMPT, num_beams=2)


def test_an_assistant_that_cannot_take_a_token_back_is_refused():
    assistant = tiny.plain_model("gpt2")
    assistant._is_stateful = True
    with pytest.raises(ValueError, match="assistant_model is a GPT2LMHeadModel, which cannot take back a token"):
        MODEL.generate(PROMPT, assistant_model=assistant)


def test_looking_up_the_prompt_is_for_a_call_to_ask():
    model = opinionated("llama")
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(ValueError, match=r"model.generation_config.prompt_lookup_num_tokens is set, .* from a call"):
        model.generate(PROMPT)


def test_without_thoughts_no_token_of_one_is_said():
    model = opinionated("llama")
    tokens = model.qstar.start_token_id, model.qstar.end_token_id
    bias = [[[token], 100.0] for token in tokens]
    said = model.generate(PROMPT, think=False, suppress_tokens=[5], sequence_bias=bias, max_new_tokens=6)
    assert not torch.isin(said, torch.tensor([5, *tokens])[1:]).any() and not (said[:, 6:] == 5).any()


def test_the_end_may_be_given_as_a_tensor_or_a_list_and_padding_left_to_it():
    model = opinionated("llama")
    model.generation_config.pad_token_id = None
    free = generate(model, PROMPT, max_new_tokens=12).sequences
    eos = int(free[0, 8])
    outputs = [
        generate(model, PROMPT, max_new_tokens=12, eos_token_id=given, drafts=4)
        for given in (eos, [eos], torch.tensor([eos]))
    ]
    assert all(torch.equal(output.sequences, outputs[0].sequences) for output in outputs)
    rows = [(row == eos).nonzero().flatten().tolist() for row in free[:, 6:]]
    ends = [row[0] + 1 if row else outputs[0].sequences.shape[1] - 6 for row in rows]
    assert outputs[0].thought_at.sum(1).tolist() == ends


def test_padding_that_all_rows_share_takes_no_position():
    model = opinionated("llama")
    tokens = torch.cat([torch.zeros(1, 90, dtype=torch.int64), tiny.text(1, 10)], dim=1)
    mask = (torch.arange(100) >= 90).long()[None]
    output = generate(model, tokens, mask, max_new_tokens=40)
    assert torch.equal(output.sequences[:, 90:], generate(model, tokens[:, 90:], max_new_tokens=40).sequences)


def test_token_types_are_refused_with_the_way_to_do_without():
    model = opinionated("gpt2")
    with pytest.raises(ValueError, match=r"token_type_ids is given, .*return_token_type_ids=False"):
        model.generate(PROMPT, token_type_ids=PROMPT)
