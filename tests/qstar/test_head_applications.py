"""How often a training step applies the language-model head: to every row that needs it, once in each phase."""

from itertools import accumulate

import pytest
import torch
from storage_watch import StorageWatch
from transformers import LlamaConfig, LlamaForCausalLM

from qstar.config import QuietStarConfig
from qstar.embedded import run
from qstar.embedded.pretrain import PretrainSettings, decoder_config
from qstar.embedded.task import build_tokenizer
from qstar.grid import IGNORED
from qstar.learning import PAPER, Objective
from qstar.talking import read_batch
from qstar.thinking import think
from qstar.wrapping import attach

pytestmark = pytest.mark.slow


def embedded_default():
    """The embedded default's decoder, before its pre-training."""
    tokenizer = build_tokenizer()
    config = decoder_config(tokenizer, PretrainSettings())
    return LlamaForCausalLM(config), len(tokenizer), run.SIZES


def llama_135m():
    shape = dict(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, **shape)
    return LlamaForCausalLM(config), config.vocab_size, dict(thought_tokens=2, ahead_tokens=2, rationales=2)


class WatchedObjective(Objective):
    def policy_loss(self, model, policy, thoughts, advantage, whole):
        self.learned = int((advantage != 0).sum())
        return super().policy_loss(model, policy, thoughts, advantage, whole)


def rows_of_products(watch: StorageWatch, width: int, vocabulary: int) -> dict[str, list[int]]:
    """How many rows went into each product with the head or with its logits' gradient, by what came out."""
    rows = {"logits": [], "gradient of the states": [], "gradient of the weight": []}
    for left, inner, right in watch.products:
        if (inner, right) == (width, vocabulary):
            rows["logits"].append(left)
        elif (inner, right) == (vocabulary, width):
            rows["gradient of the states"].append(left)
        elif {left, right} == {vocabulary, width}:  # or its transpose
            rows["gradient of the weight"].append(inner)
    return rows


@pytest.mark.parametrize("make", [embedded_default, llama_135m])
@pytest.mark.parametrize("mixing", [True, False], ids=["rewarded", "nothing to reward"])
@pytest.mark.parametrize("rule", [{}, PAPER], ids=["default", "paper"])
def test_every_row_meets_the_head_once_in_each_phase(make, mixing, rule):
    torch.manual_seed(0)
    model, vocabulary, sizes = make()
    model.resize_token_embeddings(vocabulary := vocabulary + 2, mean_resizing=False)
    attach(model, QuietStarConfig(start_token_id=vocabulary - 2, end_token_id=vocabulary - 1, **sizes))
    with torch.no_grad():
        for vector in (model.qstar_start, model.qstar_end):
            vector.normal_()
        if mixing:
            model.qstar_mixing_head.output.weight.normal_()
    width = model.config.hidden_size
    batch, positions = 2, 7
    tokens = torch.randint(4, vocabulary - 2, (batch, positions))
    text, grid = read_batch(model, tokens), model.grid(positions)
    thinking_rows = batch * positions * grid.rationales

    with StorageWatch(at_least=1) as watch:
        thoughts = think(model, text, grid, temperature=1.0)
    steps = [thinking_rows] * grid.thought_tokens
    assert list(rows_of_products(watch, width, vocabulary).values()) == [steps, [], []]

    objective = WatchedObjective(**rule)
    with StorageWatch(at_least=1) as watch:
        objective(model, tokens, thoughts=thoughts).loss.backward()
    scored = int((text.targets != IGNORED).sum())
    scored += grid.rationales * int((text.talk_targets(grid) != IGNORED).sum())
    learned = objective.learned * grid.thought_tokens
    whole = grid.rationales * int((text.talk_targets(grid) != IGNORED).all(-1).sum())
    share = 1 if rule == {} else 0.9  # of clamped advantages some are 0
    assert bool(learned) == mixing and learned <= share * whole * grid.thought_tokens
    wanted = [scored, learned] if learned else [scored]
    for rows in rows_of_products(watch, width, vocabulary).values():
        assert sum(rows) == sum(wanted)
        assert set(accumulate(wanted)) <= set(accumulate(rows))
