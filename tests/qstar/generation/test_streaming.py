"""What is written while a text grows is the text, for tokenizers that split words and characters; thoughts in place."""

from __future__ import annotations

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qstar.generation.streaming import GrowingText, ThoughtStreamer

PROMPT = "We say"
TEXT = " naïve things , 日本語 and 🙂 .\n\n  It isn't over\nyet "


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """Each byte is a token, as GPT-2 would begin."""
    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tokenizer_of_pieces() -> PreTrainedTokenizerFast:
    """As Llama's: a space is a part of the token behind it, lost where that comes first; unknown letters are bytes."""
    pieces = ["▁We", "▁say", "▁na", "▁things", "ve", "▁and", "▁It", "▁is", "n't", "▁over", "yet", "▁", ",", ".", "\n"]
    vocabulary = [("<unk>", 0.0), ("<eos>", 0.0), *((piece, -1.0) for piece in pieces)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


TOKENIZERS = {"bytes": tokenizer_of_bytes, "pieces": tokenizer_of_pieces}


def stream(streamer: ThoughtStreamer, prompt: list[int], tokens: list[int]) -> None:
    streamer.put(torch.tensor([prompt]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_streamed_pieces_make_the_decoded_text(kind):
    tokenizer = TOKENIZERS[kind]()
    tokens, prompt = (tokenizer(text)["input_ids"] for text in (PROMPT + TEXT, PROMPT))
    assert tokens[: len(prompt)] == prompt
    tokens = [*tokens[len(prompt) :], tokenizer.eos_token_id]
    pieces: list[str] = []
    streamer = ThoughtStreamer(tokenizer, pieces.append)
    stream(streamer, prompt, tokens)
    assert PROMPT + "".join(pieces) == tokenizer.decode(prompt + tokens, skip_special_tokens=True) == PROMPT + TEXT
    assert streamer.text == TEXT
    assert len(pieces) > 10 and {"日", "🙂"} <= {piece.strip() for piece in pieces}, "whole characters, as they come"


def test_a_text_that_ends_within_a_character_is_written_to_its_end():
    tokenizer = tokenizer_of_bytes()
    tokens = tokenizer("a🙂")["input_ids"][:-1]
    growing = GrowingText(tokenizer, [])
    assert [growing.add(token) for token in tokens] == ["a", "", "", ""]
    assert growing.rest() == "\ufffd"
    pieces: list[str] = []
    stream(ThoughtStreamer(tokenizer, pieces.append), [5], tokens)
    assert pieces == ["a", "\ufffd"]


def test_a_space_after_a_skipped_token_is_not_lost():
    """Words are joined by spaces, also where the token between them is not shown."""
    tokenizer = tiny.tokenizer()
    growing = GrowingText(tokenizer, [4])
    assert [growing.add(token) for token in (5, 1, 6, 1, 1, 7)] == [" b", "", " c", "", "", " d"]


def test_each_thought_stands_before_its_token():
    tokenizer = tiny.tokenizer()
    pieces: list[str] = []
    streamer = ThoughtStreamer(tokenizer, pieces.append, show_thoughts=True)
    streamer.put(torch.tensor([[4, 5]]))
    said = [([10, 11], 0.256, True), ([12, 1], -1.0, True), ([1, 1], 0.0, False), ([13, 13], 1.5, True)]
    for token, (thought, weight, thought_at) in zip((6, 7, 8, 1), said, strict=True):
        streamer.put_thoughts(torch.tensor([thought]), torch.tensor([weight]), torch.tensor([thought_at]))
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["⟨g h | 0.26⟩", " c", "⟨i <eos> | -1.00⟩", " d", " e", "⟨j j | 1.50⟩"]
    assert streamer.text == " c d e"


def test_thoughts_that_run_ahead_of_the_tokens_stand_in_the_same_places():
    """Where generate holds tokens back by a step, a thought comes before the token before it."""
    pieces: list[str] = []
    streamer = ThoughtStreamer(tiny.tokenizer(), pieces.append, show_thoughts=True)
    streamer.put(torch.tensor([[4]]))

    def think(token: int) -> None:
        streamer.put_thoughts(torch.tensor([[token]]), torch.tensor([0.5]), torch.tensor([True]))

    think(10)
    think(11)
    streamer.put(torch.tensor([5]))
    streamer.put(torch.tensor([6]))
    streamer.end()
    assert pieces == ["⟨g | 0.50⟩", " b", "⟨h | 0.50⟩", " c"]


def test_dimmed_thoughts_are_plain_again_behind_and_take_one_line():
    tokenizer = tokenizer_of_bytes()
    pieces: list[str] = []
    streamer = ThoughtStreamer(tokenizer, pieces.append, show_thoughts=True, dimmed=True)
    streamer.put(torch.tensor([tokenizer("a")["input_ids"]]))
    streamer.put_thoughts(torch.tensor([tokenizer("x\ny")["input_ids"]]), torch.tensor([0.5]), torch.tensor([True]))
    streamer.put(torch.tensor(tokenizer("b")["input_ids"]))
    assert pieces == ["\x1b[2m⟨x\\ny | 0.50⟩\x1b[22m", "b"]


def test_a_streamer_writes_one_text_after_the_other_and_never_two_at_once():
    pieces: list[str] = []
    streamer = ThoughtStreamer(tiny.tokenizer(), pieces.append)
    stream(streamer, [4], [5])
    stream(streamer, [4], [6])
    assert pieces == [" b", " c"] and streamer.text == " c"
    with pytest.raises(ValueError, match="streamer is given 2 rows, but it writes one text"):
        streamer.put(torch.tensor([[4], [5]]))
