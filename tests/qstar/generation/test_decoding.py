"""What transformers' ``generate`` can do, with thoughts: every way of decoding, and the same text with drafts."""

from __future__ import annotations

import copy
import time

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)

from qstar.generation.output import ThinkingBeamOutput, ThinkingOutput
from qstar.grid import Text
from qstar.talking import speak
from qstar.thinking import read_text, think

WAYS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True),
    "temperature": dict(do_sample=True, temperature=0.7),
    "top-k": dict(do_sample=True, top_k=5),
    "top-p": dict(do_sample=True, top_p=0.8),
    "min-p": dict(do_sample=True, min_p=0.1),
    "typical": dict(do_sample=True, typical_p=0.7),
    "repetition penalty": dict(do_sample=False, repetition_penalty=1.5),
    "no repeated bigram": dict(do_sample=True, no_repeat_ngram_size=2),
    "least length": dict(do_sample=False, min_new_tokens=5, eos_token_id=20),
    "bad words": dict(do_sample=True, bad_words_ids=[[7], [8], [9, 10]]),
    "sequence bias": dict(do_sample=True, sequence_bias=[[[11], 3.0]]),
}


@pytest.mark.parametrize("way", WAYS)
def test_drafts_change_no_text_however_it_is_decoded(way):
    """Token for token, with the same seed: guesses are drawn with the random numbers that the text is drawn with."""
    model = opinionated("llama")
    tokens, mask = padded(2, 6)
    texts = []
    for drafts in (0, 3, 8):
        set_seed(11)
        output = generate(model, tokens, mask, drafts=drafts, max_new_tokens=16, **WAYS[way])
        texts.append((output.sequences, output.thoughts, torch.rand(1)))
    for text in texts[1:]:
        assert all(torch.equal(x, y) for x, y in zip(text, texts[0], strict=True))


def test_the_right_guesses_of_a_model_whose_thoughts_weigh_little_save_passes():
    model = opinionated("llama")
    with torch.no_grad():
        model.qstar_mixing_head.output.weight *= 1e-3
    slow, fast = (generate(model, tiny.text(1, 6), drafts=drafts, max_new_tokens=40) for drafts in (0, 8))
    assert torch.equal(slow.sequences, fast.sequences)
    assert slow.thinking.passes == 40 * 4 + 1 and slow.thinking.acceptance is None
    assert fast.thinking.accepted == fast.thinking.drafted > 25 and fast.thinking.acceptance == 1
    assert fast.thinking.passes < 90


def test_a_guess_of_an_own_processor_is_left_out_and_the_text_stays_the_same():
    class Counting(LogitsProcessor):
        """Forbids another token with every call."""

        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return scores.index_fill(1, torch.tensor([4 + self.calls % 26]), -torch.inf)

    texts = []
    for drafts in (0, 4):
        counting = Counting()
        given = dict(logits_processor=LogitsProcessorList([counting]), max_new_tokens=20)
        texts.append(generate(opinionated("llama"), tiny.text(1, 6), drafts=drafts, **given).sequences)
        assert counting.calls == 20
    assert torch.equal(*texts)


def test_guesses_of_an_assistant_change_no_text():
    model, assistant = opinionated("llama"), tiny.plain_model("gpt2", seed=8)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight *= 0.1
    helper = copy.deepcopy(model)
    tokens, mask = padded(2, 6)
    for way in ("greedy", "top-k"):
        texts = []
        for drafter in (None, assistant, helper):
            set_seed(4)
            given = dict(drafts=0) if drafter is None else dict(assistant_model=drafter, drafts=4)
            texts.append(generate(model, tokens, mask, max_new_tokens=24, **given, **WAYS[way]))
        assert torch.equal(texts[1].sequences, texts[0].sequences)
        assert torch.equal(texts[2].sequences, texts[0].sequences)
        assert texts[2].thinking.drafted > texts[2].thinking.accepted > 0


def test_guesses_from_the_text_change_no_text():
    model = opinionated("llama")
    tokens = tiny.text(2, 4).repeat(1, 4)
    plain = generate(model, tokens, drafts=0, max_new_tokens=30)
    for options in (dict(prompt_lookup_num_tokens=3), dict(prompt_lookup_num_tokens=5, max_matching_ngram_size=1)):
        ahead = generate(model, tokens, max_new_tokens=30, **options)
        assert torch.equal(ahead.sequences, plain.sequences)
        config = GenerationConfig(**options, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        by_config = model.generate(tokens, config, thought_temperature=1.0, thought_seed=3)
        assert torch.equal(by_config.sequences, plain.sequences)
        assert by_config.thinking == ahead.thinking and ahead.thinking.drafted > 0
        assert config.prompt_lookup_num_tokens == options["prompt_lookup_num_tokens"]


@pytest.mark.parametrize("drafts", [0, 4])
def test_returned_sequences_think_differently_and_each_as_the_packed_pass_says(drafts):
    model = opinionated("llama")
    tokens, mask = padded(2, 6)
    set_seed(1)
    output = generate(model, tokens, mask, num_return_sequences=3, do_sample=True, drafts=drafts)
    assert output.sequences.shape == (6, 16)
    assert len({tuple(row.tolist()) for row in output.thoughts[:3, 0]}) == 3
    expected, _ = packed_log_probs(model, output, mask.repeat_interleave(3, 0))
    torch.testing.assert_close(output.logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def next_log_probs(model, tokens):
    """Log-probabilities ``[V]`` after one text, with a greedy thought, from a fresh reading."""
    text, grid = Text.from_inputs(tokens[None]), model.grid(len(tokens))
    reading = read_text(model, text, grid)
    thoughts = think(model, text, grid, temperature=0.0, last=1, reading=reading)
    mixed = speak(model, reading, thoughts, cached=grid.thought_tokens)
    return model.language_head().logits(mixed[0, 0, 0]).log_softmax(-1)


@torch.no_grad()
def beam_search(model, prompt, beams: int, length: int):
    """The best continuation of one prompt and its log-probability, by re-reading every text."""
    kept = [(0.0, prompt)]
    for _ in range(length):
        grown = []
        for score, text in kept:
            log_probs = next_log_probs(model, text)
            values, tokens = log_probs.topk(beams)
            grown += [
                (score + float(value), torch.cat([text, token[None]]))
                for value, token in zip(values, tokens, strict=True)
            ]
        kept = sorted(grown, key=lambda each: -each[0])[:beams]
    return kept[0]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beams_find_what_a_beam_search_that_reads_every_text_afresh_finds(family):
    model = opinionated(family)
    tokens, mask = padded(2, 5)
    asked = dict(num_beams=3, max_new_tokens=6, output_scores=True, thought_temperature=0.0)
    output = generate(model, tokens, mask, **asked)
    assert isinstance(output, ThinkingBeamOutput)
    for row in range(2):
        score, text = beam_search(model, tokens[row, row:], 3, 6)
        assert torch.equal(output.sequences[row, row:], text)
        assert float(output.sequences_scores[row]) == pytest.approx(score / 6, abs=1e-4)


def test_thoughts_of_beams_are_those_of_the_texts_that_were_kept():
    model = opinionated("llama")
    tokens = tiny.text(2, 5)
    output = generate(model, tokens, num_beams=3, num_return_sequences=2, max_new_tokens=6, output_scores=True)
    expected, _ = packed_log_probs(model, output)
    said = output.sequences[:, 5:, None]
    totals = expected.gather(-1, said).sum((1, 2))
    torch.testing.assert_close(totals / 6, output.sequences_scores, rtol=1e-4, atol=1e-4)


def test_sampled_beams_are_scored_by_the_predictions_of_their_texts():
    model = opinionated("llama")
    tokens = tiny.text(1, 5)
    set_seed(2)
    asked = dict(num_beams=3, num_return_sequences=3, do_sample=True, max_new_tokens=6, output_scores=True)
    output = generate(model, tokens, thought_temperature=0.0, **asked)
    for text, score in zip(output.sequences, output.sequences_scores, strict=True):
        log_probs = [float(next_log_probs(model, text[:end])[text[end]]) for end in range(5, 11)]
        assert float(score) == pytest.approx(sum(log_probs) / 6, abs=1e-4)


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_a_prompt_may_be_read_in_chunks(chunk, drafts):
    model = opinionated("mistral")
    tokens, mask = padded(2, 12)
    whole = generate(model, tokens, mask, drafts=drafts)
    parts = generate(model, tokens, mask, drafts=drafts, prefill_chunk_size=chunk)
    assert torch.equal(parts.sequences, whole.sequences)
    assert torch.equal(parts.thoughts, whole.thoughts)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_going_on_from_a_returned_cache_is_reading_afresh(rows, drafts):
    model = opinionated("mistral")
    tokens, mask = padded(rows, 8)
    first = generate(model, tokens, mask, drafts=drafts, max_new_tokens=5)
    read = first.past_key_values.get_seq_length()
    assert read == 12  # the last token has not been read
    longer = torch.cat([first.sequences, tiny.text(rows, 4, seed=9)], dim=1)
    mask = torch.cat([mask, mask.new_ones(rows, 9)], dim=1)
    fresh = generate(model, longer, mask, drafts=drafts, thought_tokens=2)
    gone_on = generate(model, longer, mask, drafts=drafts, thought_tokens=2, past_key_values=first.past_key_values)
    assert torch.equal(gone_on.sequences, fresh.sequences)
    assert torch.equal(gone_on.thoughts, fresh.thoughts)
    torch.testing.assert_close(gone_on.logits, fresh.logits, rtol=1e-4, atol=1e-4)
    assert gone_on.thinking.passes == fresh.thinking.passes


@pytest.mark.parametrize("drafts", [0, 6])
def test_a_row_that_ends_is_filled_and_its_fillings_have_no_thoughts(drafts):
    model = opinionated("llama")
    tokens, mask = padded(3, 6)
    free = generate(model, tokens, mask, max_new_tokens=12)
    eos = int(free.sequences[0, 8])
    output = generate(model, tokens, mask, max_new_tokens=12, eos_token_id=eos, drafts=drafts)
    said = output.sequences[:, 6:]
    counted = 0
    for row in range(3):
        ends = (free.sequences[row, 6:] == eos).nonzero().flatten().tolist()
        end = ends[0] + 1 if ends else said.shape[1]
        assert torch.equal(said[row, :end], free.sequences[row, 6 : 6 + end][: said.shape[1]])
        assert (said[row, end:] == 0).all()
        assert (output.thoughts[row, end:] == model.qstar.end_token_id).all()
        assert output.thought_at[row, :end].all() and not output.thought_at[row, end:].any()
        assert (output.thought_weights[row, end:] == 0).all() and (output.thought_weights[row, :end] != 0).all()
        counted += min(end, said.shape[1])
    assert counted < said.numel()
    assert output.thinking.tokens == counted and output.thinking.thought_share == 1


@pytest.mark.parametrize("drafts", [0, 6])
def test_stop_strings_stop(drafts):
    model = opinionated("llama")
    letters = "abcdefghijklmnopqrstuvwxyz012345"
    spelling = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    spelling.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling)
    tokens = tiny.text(1, 6)
    free = generate(model, tokens, max_new_tokens=12)
    said = "".join(letters[token] for token in free.sequences[0, 6:])
    stopped = generate(model, tokens, max_new_tokens=12, stop_strings=[said[2:4]], tokenizer=tokenizer, drafts=drafts)
    length = said.index(said[2:4]) + 2
    assert torch.equal(stopped.sequences, free.sequences[:, : 6 + length])
    assert stopped.thinking.tokens == length


def test_a_streamer_gets_the_text_and_no_thought():
    model, tokenizer = opinionated("llama"), tiny.tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = generate(model, tiny.text(1, 6), streamer=streamer)
    assert "".join(streamer).split() == tokenizer.decode(output.sequences[0, 6:]).split()


def test_a_streamer_that_asks_for_thoughts_gets_each_before_its_token():
    class Listening:
        def __init__(self):
            self.heard = []

        def put(self, tokens):
            self.heard.append(tokens)

        def put_thoughts(self, thoughts, weight, thought_at):
            self.heard.append((thoughts, weight, thought_at))

        def end(self):
            self.heard.append(None)

    listening = Listening()
    output = generate(opinionated("llama"), tiny.text(1, 6), streamer=listening, drafts=4)
    prompt, *heard, end = listening.heard
    assert torch.equal(prompt, tiny.text(1, 6)) and end is None and len(heard) == 20
    for step in range(10):
        thoughts, weight, thought_at = heard[2 * step]
        assert torch.equal(thoughts, output.thoughts[:, step]) and thought_at.all()
        assert torch.equal(weight, output.thought_weights[:, step])
        assert torch.equal(heard[2 * step + 1], output.sequences[:, 6 + step])


def test_it_stops_in_time():
    model = opinionated("llama")
    began = time.monotonic()
    output = generate(model, tiny.text(1, 6), max_new_tokens=100, max_time=0.05)
    assert 6 < output.sequences.shape[1] < 106
    assert time.monotonic() - began < 20


def test_what_it_returns_without_being_asked_for_more():
    model = opinionated("llama")
    tokens = tiny.text(2, 6)
    output = model.generate(tokens, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert isinstance(output, ThinkingOutput)
    assert output.thoughts is None and output.thought_weights is None and output.thought_at is None
    assert output.thinking.tokens == 8 and len(output.scores) == 4
    assert torch.equal(model.generate(tokens, max_new_tokens=4), output.sequences)


def test_it_takes_what_a_tokenizer_gives_and_prompts_by_name():
    model = opinionated("llama")
    tokens, mask = padded(2, 6)
    batch = BatchEncoding(dict(input_ids=tokens, attention_mask=mask))
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), expected)
    assert torch.equal(model.generate(inputs=tokens, attention_mask=mask, max_new_tokens=4), expected)


def test_a_model_thinks_by_default_once_its_mixing_head_has_been_trained():
    model = opinionated("llama")
    assert model.has_learned_to_think
    asked = dict(max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(model.generate(tiny.text(1, 6), **asked), ThinkingOutput)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.zero_()
    assert not model.has_learned_to_think
    assert not isinstance(model.generate(tiny.text(1, 6), **asked), ThinkingOutput)
    assert isinstance(model.generate(tiny.text(1, 6), think=True, **asked), ThinkingOutput)


def test_a_pipeline_thinks():
    model, tokenizer = opinionated("llama"), tiny.tokenizer()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = generator("a b c d", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = model.generate(
        **tokenizer("a b c d", return_tensors="pt", return_token_type_ids=False), max_new_tokens=5
    )
    assert said.split() == tokenizer.decode(expected[0, 4:]).split()


def test_training_mode_stays_and_does_not_matter():
    model = opinionated("llama")
    expected = model.generate(tiny.text(1, 6), max_new_tokens=5)
    model.train()
    tiny.checkpoint_layers(model)
    assert torch.equal(model.generate(tiny.text(1, 6), max_new_tokens=5), expected)
    assert model.training


DRAWS, LETTERS = 5000, 6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sampled", "temperature", "top-k", "top-p"])
def test_tokens_are_drawn_from_the_mixed_prediction(way):
    """Each token's count against the sum of its probabilities, over thousands of draws with drafts; chi-square.

    Given what came before it, a draw minus its probabilities has mean 0 and the variance of one draw; so the sums over
    a text are normal by the central limit theorem of martingales, and their squares, made independent, a chi-square.
    """
    model = opinionated("llama", thought_tokens=1)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight *= 0.1
    few = list(range(4, 4 + LETTERS))
    others = [token for token in range(len(model.get_input_embeddings().weight)) if token not in few]
    set_seed(17)
    counts, expected, covariance = torch.zeros(LETTERS), torch.zeros(LETTERS), torch.zeros(LETTERS, LETTERS)
    drafted = accepted = 0
    for seed in range(DRAWS // 100):
        output = generate(
            model, tiny.text(1, 4, seed), suppress_tokens=others, thought_seed=seed, output_scores=True,
            max_new_tokens=100, **WAYS[way],
        )  # fmt: skip
        p = torch.cat(output.scores).softmax(-1)[:, few]
        said = torch.nn.functional.one_hot(output.sequences[0, 4:] - 4, LETTERS)
        counts, expected = counts + said.sum(0), expected + p.sum(0)
        covariance += torch.diag(p.sum(0)) - p.T @ p
        drafted, accepted = drafted + output.thinking.drafted, accepted + output.thinking.accepted
    assert accepted > DRAWS / 4 and drafted > accepted * 1.02  # right and wrong guesses both had their say
    difference = (counts - expected)[:-1]  # the last follows from the others
    statistic = float(difference @ torch.linalg.solve(covariance[:-1, :-1], difference))
    assert statistic < 20.5  # the 99.9th percentile of chi-square with 5 degrees of freedom
