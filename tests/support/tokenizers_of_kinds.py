"""Small tokenizers that mark spaces, bytes and parts of words in each of the usual ways."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECES = ["0", "1", "8", "18", "A", "B", "a", "Q", ":", "\n"]  # each alone, and behind a space
NEVER = ["<7>", "5"]  # special tokens: a digit is no digit there


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2: Ġ for a space, Ċ for a newline."""
    written = [piece.replace("\n", "Ċ") for piece in PIECES]
    words = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "18",
        *("Ġ" + piece for piece in written),
        "ĊĊ",
        "Ġ1B",
        "ĠĠ8",
    ]
    vocabulary = {word: token for token, word in enumerate(dict.fromkeys(words))}
    merges = [
        ("1", "8"),
        ("Ġ", "18"),
        *(("Ġ", piece) for piece in written if piece != "18"),
        ("Ċ", "Ċ"),
        ("Ġ1", "B"),
        ("Ġ", "Ġ8"),
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As of Llama 2: ▁ for a space, <0x0A> for a newline, and a space before every text."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *PIECES[:-1], "³"]
    words += ["▁" + piece for piece in PIECES[:-1]]
    vocabulary = {word: token for token, word in enumerate(words)}
    merges = [("1", "8"), ("▁", "18"), *(("▁", piece) for piece in PIECES[:-1] if piece != "18")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT: ## before what goes on with a word; a newline is no word."""
    words = ["[UNK]", *PIECES[:-1], *("##" + piece for piece in PIECES[:-1])]
    tokenizer = Tokenizer(models.WordPiece({word: token for token, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _with_specials(tokenizer, unk_token="[UNK]")


def _with_specials(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in NEVER])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=NEVER[0], **names)
