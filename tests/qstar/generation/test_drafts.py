"""Guesses: what is guessed, how many, and what is taken note of."""

from __future__ import annotations

import pytest
import tiny
import torch
from spoken import generate, opinionated
from transformers import LogitsProcessorList, SynthIDTextWatermarkingConfig, TemperatureLogitsWarper

from qstar.generation.drafts import Choice, DraftLength, FromAssistant, FromText, random_numbers_put_back, what_followed
from qstar.generation.text import TextSoFar

NO_END = dict(eos=torch.tensor([], dtype=torch.int64), pad=None)
GREEDY = Choice(LogitsProcessorList(), do_sample=False, **NO_END)


@pytest.mark.parametrize(
    "text, longest, count, expected",
    [
        ("abcabc", 3, 2, "ab"),
        ("abcxabdab", 2, 3, "dab"),
        ("abcxabcyab", 2, 2, "cy"),
        ("abcd", 3, 4, ""),
        ("aaaa", 3, 4, "a"),
        ("a", 3, 4, ""),
        ("xyzaxqa", 1, 9, "xqa"),
    ],
)
def test_what_followed_the_last_tokens_before(text, longest, count, expected):
    assert "".join(map(chr, what_followed(list(map(ord, text)), longest, count))) == expected


def test_rows_of_a_text_are_looked_up_each_for_itself_and_without_padding():
    tokens = torch.tensor([[0, 0, 5, 6, 7, 5, 6], [0, 9, 4, 8, 0, 0, 9]])
    guesses, states = FromText(2).draft(None, TextSoFar(tokens, torch.tensor([[2], [0]])), 3, GREEDY)
    assert guesses.tolist() == [[7, 5, 6], [4, 8, 0]] and states is None
    nothing, _ = FromText().draft(None, TextSoFar(torch.tensor([[4, 5, 6]])), 3, GREEDY)
    assert nothing.shape == (1, 0)
    shorter, _ = FromText().draft(None, TextSoFar(torch.tensor([[4, 5, 4], [4, 5, 6]])), 3, GREEDY)
    assert shorter[0].tolist() == [5, 4]


@torch.no_grad()
def test_an_assistant_reads_no_token_twice_and_says_what_it_says_alone():
    model, assistant = opinionated("llama"), tiny.plain_model("mistral", seed=3)
    read = []
    assistant.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)

    class Reader:
        head = model.language_head()

    drafter, text = FromAssistant(assistant, 0.5), TextSoFar(tiny.text(2, 9), torch.tensor([[0], [2]]))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :2] = 0
    expected = assistant.generate(
        text.tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    read.clear()
    guesses, _ = drafter.draft(Reader, text, 4, GREEDY)
    assert torch.equal(guesses, expected[:, 9:13]) and read == [9, 1, 1, 1]
    read.clear()
    again, _ = drafter.draft(Reader, TextSoFar(expected[:, :14], text.padding), 3, GREEDY)
    assert torch.equal(again, expected[:, 14:17]) and read == [2, 1, 1]
    read.clear()
    other = torch.cat([expected[:, :11], tiny.text(2, 1, seed=4)], dim=1)
    drafter.draft(Reader, TextSoFar(other, text.padding), 1, GREEDY)
    assert read == [1]


def test_a_choice_is_that_of_generate():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    assert GREEDY(tokens, logits).tolist() == [1, 0]
    ends = Choice(LogitsProcessorList(), do_sample=False, eos=torch.tensor([2]), pad=1)
    assert ends(torch.tensor([[0, 2], [0, 0]]), logits).tolist() == [1, 0]  # a row that has ended is filled
    warm = Choice(LogitsProcessorList([TemperatureLogitsWarper(0.5)]), do_sample=True, **NO_END)
    torch.manual_seed(3)
    ours = warm(tokens, logits)
    torch.manual_seed(3)
    assert torch.equal(ours, torch.multinomial((logits / 0.5).softmax(-1), 1)[:, 0])


def test_random_numbers_are_put_back():
    torch.manual_seed(3)
    with random_numbers_put_back(torch.device("cpu")):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), first)


def test_as_many_guesses_are_made_as_make_a_token_cheapest():
    """By Leviathan et al., section 3.5: the argument of the greatest (1 - a^(d+1)) / (1 - a) / (K + 1 + d)."""
    for right, made in ((9, 10), (6, 10), (1, 10)):
        length = DraftLength(12, 9, 1.0)
        for _ in range(200):
            for _ in range(made - right):
                length.record(right // (made - right), False)
        rate = length._right / length._made
        speed = [(1 - rate ** (d + 1)) / (1 - rate) / (9 + d) for d in range(13)]
        assert length() == speed.index(max(speed))
    assert DraftLength(5, 9, 0.0)() == 5  # guesses that cost nothing


def test_guesses_that_are_never_right_are_tried_now_and_then():
    length = DraftLength(8, 9, 1.0)
    made = []
    for _ in range(60):
        made.append(length())
        if made[-1]:
            length.record(0, False)
    assert [index for index, count in enumerate(made) if count] == [0, 1, 2, 3, 4, 6, 9, 14, 23, 40, 57]
    assert length.accepted == 0 and length.drafted == sum(bool(count) for count in made)


def test_right_guesses_are_counted_up_to_the_first_wrong_one():
    length = DraftLength(8, 9, 1.0)
    length.record(8, True)
    length.record(3, False)
    assert (length.accepted, length.drafted) == (11, 12)


def test_the_report_counts_guesses():
    model = opinionated("llama")
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.zero_()  # the model's own guesses are then always right
    report = generate(model, tiny.text(1, 6), max_new_tokens=20, drafts=4, do_sample=True).thinking
    rounds = 20 - report.drafted  # each says a token more than it has guesses
    assert report.accepted == report.drafted > 10 and report.acceptance == 1
    assert report.passes == 1 + report.drafted + 4 * rounds


def test_no_guess_goes_beyond_the_end_of_all_rows():
    model = opinionated("llama")
    free = generate(model, tiny.text(1, 6), max_new_tokens=20, think_when="never").sequences[0, 6:].tolist()
    eos = free[2]
    asked: list[list[int]] = []

    def allowed(_, tokens):
        asked.append(tokens.tolist())
        return list(range(4, 32))

    with torch.no_grad():
        model.qstar_mixing_head.output.weight.zero_()
    options = dict(max_new_tokens=20, eos_token_id=eos, drafts=8, prefix_allowed_tokens_fn=allowed)
    output = generate(model, tiny.text(1, 6), **options)
    assert output.sequences[0, 6:].tolist() == free[: free.index(eos) + 1]
    assert all(eos not in tokens[6:] for tokens in asked) and len(asked) == free.index(eos) + 1


@pytest.mark.parametrize("rows, drafted", [(1, True), (2, False)])
def test_a_batch_guesses_only_where_it_is_asked_to(rows, drafted):
    model = opinionated("llama")
    assert bool(generate(model, tiny.text(rows, 6), max_new_tokens=12).thinking.drafted) == drafted
    assert generate(model, tiny.text(rows, 6), max_new_tokens=12, drafts=4).thinking.drafted > 0


def test_a_watermark_that_keeps_a_state_is_left_out_of_the_guesses():
    keys = dict(ngram_len=3, keys=[1, 2, 3, 4], context_history_size=64)
    texts = []
    for drafts in (0, 6):
        torch.manual_seed(2)
        config = SynthIDTextWatermarkingConfig(**keys)
        model = opinionated("llama")
        given = dict(watermarking_config=config, do_sample=True, max_new_tokens=24, drafts=drafts)
        texts.append(generate(model, tiny.text(1, 6), **given).sequences)
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "limits", [dict(vocab_size=20), dict(vocab_size=12), dict(max_position_embeddings=14)], ids=str
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_that_knows_fewer_words_or_positions_guesses_as_far_as_it_can(limits, do_sample):
    model, assistant = opinionated("llama"), tiny.plain_model("llama", seed=4, **limits)
    texts = []
    for options in (dict(drafts=0), dict(assistant_model=assistant, drafts=4)):
        torch.manual_seed(6)
        given = dict(max_new_tokens=16, do_sample=do_sample, suppress_tokens=list(range(12)))
        texts.append(generate(model, tiny.text(1, 6), **given, **options).sequences)
    assert torch.equal(*texts)


def test_where_no_token_is_allowed_any_is_guessed():
    choice = Choice(LogitsProcessorList(), do_sample=True, **NO_END)
    assert 0 <= int(choice(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 5), -torch.inf))) < 5
