"""Inspections that views are shown: ordinary ones, of hostile texts, and long ones; alone and two beside each other."""

from __future__ import annotations

from dataclasses import replace

import tiny
import tokenizers_of_kinds as kinds

import qstar
from qstar.inspection.comparison import Comparison, compare
from qstar.inspection.data import Document, Inspection
from qstar.wrapping import wrap

TEXTS = ["a b c d e f", "g h i j k l m", "n o p q"]
HOSTILE = [
    "\x1b[31m\x1b]0;title\x07 \x1b[2J\x9b1A",
    "\u202eright to left\u2066 \u200f",
    "[bold red]markup[/] :smile: [link=file:///etc/passwd]x[/link] {{ 7 * 7 }} {% raw %}",
    "😀0😀 \r\n\b\b \x00 \x7f",
    '<img src=x onerror=alert(2)><script>alert(1)</script> </style><!--<script> & &lt; "quotes" \'',
    "w" * 3000,
    "\u2028日本語\u2029\ufeff",
]


def ordinary() -> Inspection:
    """Three texts of letters."""
    model = tiny.thinking_model("llama", thought_tokens=3, ahead_tokens=2)
    return qstar.inspect(model, tiny.tokenizer(), TEXTS, name="some/model")


def learned() -> list[Inspection]:
    """The same texts at three steps, by models that differ."""
    found = []
    for scale in (0.0, 0.3, 1.0):
        model = tiny.thinking_model("llama", thought_tokens=3, ahead_tokens=2)
        model.qstar_mixing_head.output.weight.data *= scale
        model.qstar_start.data *= 1 + scale
        found.append(qstar.inspect(model, tiny.tokenizer(), TEXTS, name="some"))
    return found


def compared(**settings) -> Comparison:
    """:func:`ordinary` beside another model, which thinks in two tokens and is scored on three."""
    model = tiny.thinking_model("llama", seed=5, thought_tokens=2, ahead_tokens=3)
    return compare(ordinary(), qstar.inspect(model, tiny.tokenizer(), TEXTS, name="another/model", **settings))


def hostile(seed: int = 0) -> Inspection:
    """``HOSTILE``, read by a model whose tokenizer knows every byte, with a hostile name."""
    tokenizer = kinds.byte_level()
    model = tiny.plain_model("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=4096)
    model = wrap(model, tokenizer, thought_tokens=3, ahead_tokens=2, start_init=None, end_init=None)
    model.qstar_mixing_head.output.weight.data.normal_(0, 0.5)
    options = dict(max_tokens=None, temperature=0.0, name="\x1b[31mmodel\u202e</title><script>", controls=False)
    found = qstar.inspect(model, tokenizer, HOSTILE, **options)
    found.documents.append(_with_whole_texts(found.documents[0]))
    return found


def hostile_compared() -> Comparison:
    """:func:`hostile` beside another such model."""
    return compare(hostile(), hostile(seed=1))


def _with_whole_texts(document: Document) -> Document:
    """As of a tokenizer that makes a token of each text, and of a word of 50,000 letters."""
    texts = ["w" * 50_000, *HOSTILE]
    first, *rest = document.positions
    likely = [each._replace(text=text) for each, text in zip(first.before, texts[2:], strict=False)]
    rationales = [replace(each, tokens=texts[3:6]) for each in first.rationales]
    first = replace(first, before=likely, after=likely, rationales=rationales)
    tokens = [*texts, *document.tokens[len(texts) :]]
    return replace(document, tokens=tokens, positions=[first, *rest])


def lengthened(found: Inspection, tokens: int) -> Inspection:
    """``found`` with one text that repeats the first one up to so many tokens."""
    document = found.documents[0]
    length = len(document.tokens)
    times = -(-tokens // length)
    positions = [
        replace(each, index=each.index + length * number) for number in range(times) for each in document.positions
    ]
    long = replace(document, tokens=document.tokens * times, token_ids=document.token_ids * times, positions=positions)
    return replace(found, documents=[long])
