"""What a person sees while a model trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from qstar.training.callbacks import ProgressLine, decoded, show_thoughts


def test_thoughts_are_shown_between_the_text_before_and_after_them(capsys):
    tokenizer = tiny.tokenizer()
    tokens = torch.tensor([tokenizer.convert_tokens_to_ids([*"abcdefgh"])])
    thoughts = torch.full((1, 8, 2, 3), tokenizer.convert_tokens_to_ids("z"))
    thoughts[0, 4, 0] = torch.tensor(tokenizer.convert_tokens_to_ids([*"xyx"]))
    shown = show_thoughts(tokenizer, tokens, thoughts, samples=1, context=2)
    assert shown == [{"before": "d e", "thought": "x y x", "after": "f g h"}]
    assert capsys.readouterr().out.strip() == "'d e' ['x y x'] 'f g h'"
    assert show_thoughts(None, tokens, thoughts) == []


@pytest.mark.parametrize("error", [IndexError, KeyError, TypeError])
def test_ids_that_are_no_token_are_shown_as_numbers(error):
    """As tokenizers in Python have it, where a vocabulary was padded."""

    def decode(ids):
        raise error("no such token")

    assert decoded(SimpleNamespace(decode=decode), [7, 50]) == "<7> <50>"
    assert decoded(tiny.tokenizer(), [4, 5]) == "a b"


def test_the_progress_line_shows_what_matters():
    written = []
    line = ProgressLine()
    line.training_bar = SimpleNamespace(write=written.append)
    state = SimpleNamespace(global_step=12)
    line.on_log(None, state, None, logs={"loss": 2.5, "nll_talk": 1.25, "learning_rate": 1e-3, "mixing_weight": 0.5})
    line.on_log(None, state, None, logs={"learning_rate": 1e-3})
    assert written == ["step    12  loss 2.5000  with 1.2500  mixing weight 0.500"]
