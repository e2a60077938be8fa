"""Which tokens of a vocabulary an answer may have, told by the text that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

ANCHOR = "a"
_texts: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, dict[int, str]]] = WeakKeyDictionary()


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """What each token adds to a text that it stands in, by its id; special tokens are left out.

    Found out by decoding, so that it does not matter how the tokenizer marks spaces, bytes or parts of words. It is
    kept for as long as the tokenizer is, and made anew when its vocabulary has changed.
    """
    size, texts = _texts.get(tokenizer, (0, {}))
    if size != len(tokenizer):
        texts = _decoded(tokenizer)
        _texts[tokenizer] = (len(tokenizer), texts)
    return texts


def permitted_tokens(tokenizer: PreTrainedTokenizerBase, permits: Callable[[str], bool]) -> list[int]:
    """Ids in order of the tokens whose text, without one space before it, is permitted or is a newline."""
    texts = ((token, text.removeprefix(" ")) for token, text in token_texts(tokenizer).items())
    return [token for token, text in texts if text == "\n" or permits(text)]


def _decoded(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Each token decoded behind another one, where it is what it is in the middle of a text."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, each in added if each.special)}
    tokens = sorted({*tokenizer.get_vocab().values()} - special)
    anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"][-1:]
    [before, *texts] = tokenizer.batch_decode(
        [anchor, *([*anchor, token] for token in tokens)], clean_up_tokenization_spaces=False
    )
    return {
        token: text.removeprefix(before)
        for token, text in zip(tokens, texts, strict=True)
        if text.startswith(before)  # not so for a part of a character, which changes the one before it
    }
