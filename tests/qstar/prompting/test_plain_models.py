"""Prompts are continued by a plain model of transformers as by one that thinks: what its own ``generate`` says."""

from __future__ import annotations

import pytest
import tiny

from qstar.generation.settings import GenerationSettings
from qstar.prompting.continuations import Continuations
from qstar.prompting.prompts import Prompt
from qstar.prompting.settings import SearchSettings

PROMPTS = ["c a b d e", "a", "h i j k l m"]


def continued(model, prompts, settings=None, batch_size=2, **search):
    continuations = Continuations(
        model, tiny.tokenizer(), settings or GenerationSettings(), SearchSettings(max_new_tokens=5, **search)
    )
    found = list(continuations.of([Prompt(text) for text in prompts], batch_size))
    return continuations, [each.text for each in found]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [GenerationSettings(), GenerationSettings(think=False)], ids=["own", "no-think"])
def test_a_plain_model_says_what_its_own_generate_says(family, settings):
    model, tokenizer = tiny.plain_model(family), tiny.tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        whole = tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
        expected.append(whole.removeprefix(prompt))
    continuations, said = continued(model, PROMPTS, settings, do_sample=False)
    assert said == expected
    assert continuations.report().endswith("tokens without thoughts")


def test_stop_texts_end_what_a_plain_model_says():
    model = tiny.plain_model("llama")
    _, [said] = continued(model, PROMPTS[:1], do_sample=False)
    _, [stopped] = continued(model, PROMPTS[:1], do_sample=False, stop=(said.split()[1],))
    assert stopped.split() == said.split()[:2]


def test_settings_of_thoughts_are_refused_for_a_plain_model():
    model = tiny.plain_model("llama")
    with pytest.raises(ValueError, match=r"thought_seed=3.*, but the model is a plain one, which has no thoughts"):
        continued(model, PROMPTS, GenerationSettings(thought_seed=3))
    with pytest.raises(ValueError, match="the model is a plain one"):
        continued(model, PROMPTS, GenerationSettings(think=True))
    with pytest.raises(ValueError, match="show_thoughts is given, but the model is a plain one"):
        Continuations(model, tiny.tokenizer(), GenerationSettings(), SearchSettings(), show_thoughts=True)


def test_a_prompt_that_a_plain_model_has_no_room_for_is_named():
    with pytest.raises(ValueError, match=r"prompt 2: 125 tokens are given and max_new_tokens is 5, .*embeddings = 128"):
        continued(tiny.plain_model("llama"), ["a", "a " * 125])
