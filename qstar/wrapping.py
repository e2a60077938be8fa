"""From a live model to one that thinks, and from a folder back to it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME

from qstar import adapters, attention
from qstar.classes import ThinkingModel, thinking_class
from qstar.compatibility import (
    EXACT,
    check_architecture,
    check_behaviour,
    disable_dropout,
    noise_of,
    plain_passes,
    small_copy,
)
from qstar.config import QuietStarConfig, ThoughtSettings, check_names, setting_names
from qstar.heads import MixingHead, ThoughtAlone
from qstar.model import (
    BASE_VOCABULARY,
    EMBEDDINGS_FILE,
    QuietStarModel,
    embedding_rows,
    existing,
    long_rope_limit,
    vocabulary_size,
)

logger = logging.getLogger(__name__)


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, check: bool = True, **settings: Any
) -> ThinkingModel:
    """Teach ``model`` the tokens and give it the parameters that let it think; in place.

    Args:
        model: a decoder of transformers whose attention can be exchanged; with adapters of LoRA, where
            ``model.add_adapter`` or peft has put some into it.
        tokenizer: its tokenizer; start and end tokens are added to it where it lacks them.
        check: compare a tiny packed pass with the model's own before anything is trained.
        settings: any field of :class:`qstar.config.ThoughtSettings`: ``thought_tokens``, ``ahead_tokens``,
            ``rationales``, ``mixing_head``, ``sigmoid``, ``pauses``, ``start_token``, ``end_token``, ``start_init``,
            ``end_init``.

    Returns:
        ``model`` itself, now of a subclass of its class.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: the model cannot think (its attention cannot be exchanged, it has linear-attention layers, or the
            check found other results than the model's own), or an argument is wrong. ``model`` is then as it was; the
            tokenizer keeps the two tokens.
    """
    if isinstance(model, QuietStarModel):
        raise ValueError("model is already a Quiet-STaR model")
    check_names("wrap()", settings, setting_names(ThoughtSettings))
    thoughts = ThoughtSettings(**settings)
    check_architecture(model)
    adapters.check_adapters(model)
    tokens = [thoughts.start_token, thoughts.end_token]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    start, end = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in tokens)
    with _given_back_unless_it_thinks(model, start, end):
        rows = embedding_rows(model).detach()
        known = len(rows)
        initial = [_initial_embedding(rows, tokenizer, text) for text in (thoughts.start_init, thoughts.end_init)]
        if max(start, end) >= len(rows):  # ids may have gaps, so that there are more of them than tokens
            model.resize_token_embeddings(max(start, end, len(tokenizer) - 1) + 1, mean_resizing=False)
        with torch.no_grad():
            for token, vector in zip((start, end), initial, strict=True):
                embedding_rows(model)[token] = vector
        plain = None
        if check:
            model.set_attn_implementation("eager")  # which leaves nothing out, as sdpa does a soft-cap
            plain = plain_passes(model, start, end), small_copy(model)
        name, revision = adapters.base_of(model) if model.name_or_path else (None, None)
        ids: dict[str, Any] = dict(start_token_id=start, end_token_id=end)
        config = QuietStarConfig(**asdict(thoughts), **ids, base_model=name, base_revision=revision)
        thinking = attach(model, config, known)
        with torch.no_grad():
            for parameter, vector in zip((thinking.qstar_start, thinking.qstar_end), initial, strict=True):
                parameter.copy_(vector)
        if plain is not None:
            before, small = plain
            check_behaviour(thinking, before)
            if small is not None:
                _check_small(small, thinking.qstar)
    limit = long_rope_limit(thinking.config.get_text_config(decoder=True))
    if limit is not None:
        logger.warning(
            "%s changes its rotary factors at %d tokens: shorter texts whose thoughts reach beyond are refused",
            type(thinking).__name__,
            limit,
        )
    thinking.adopt_adapters()
    if thinking.generation_config is not None:
        suppressed = set(thinking.generation_config.suppress_tokens or ()) | {start, end}
        thinking.generation_config.suppress_tokens = sorted(suppressed)
    return thinking


def load(folder: str | Path, **kwargs: Any) -> tuple[ThinkingModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer that were saved in ``folder``.

    Args:
        folder: what :func:`qstar.train` wrote, or ``save_pretrained`` of model and tokenizer. Where it holds adapters,
            they are put into the base that it names, which is read in the precision that they were trained beside.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``; code of the folder is not run unless
            ``trust_remote_code`` says so.

    Raises:
        FileNotFoundError: the folder lacks the settings or the mixing head.
        ValueError: a weight is infinite or NaN; the tokenizer cannot be read; the adapters are of another base, or
            peft, which reads them, is not installed.
    """
    config = QuietStarConfig.load(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=kwargs.get("trust_remote_code", False))
    for name in ("start_token", "end_token"):  # by their ids: a folder of an earlier version does not name them
        setattr(config, name, tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")))
    kwargs = {"trust_remote_code": False} | kwargs
    if adapters.holds_adapters(folder):
        model = _with_adapters(folder, config, kwargs)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        check_architecture(plain)
        model = attach(plain, config)
    model.load_thoughts(folder)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{folder} holds a model whose {name} is not finite: its training went wrong")
    return model, tokenizer


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, as :func:`load` finds it.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read, but a model needs its own: {error}") from error


def load_untrained(folder: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> ThinkingModel:
    """The model in ``folder`` as it was before it learned to think, with untrained thoughts.

    Args:
        folder: as for :func:`load`.
        tokenizer: that :func:`load` has found there.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: the folder that it began with is not there any more.
        ValueError: nobody knows what it began with.
    """
    config = QuietStarConfig.load(folder)
    if config.base_model is None:
        raise ValueError(f"{folder} does not say which model it was before training")
    if Path(config.base_model).is_absolute() and not Path(config.base_model).is_dir():
        raise FileNotFoundError(f"{folder} was trained from {config.base_model}, but no folder is there")
    at = {} if config.base_revision is None else {"revision": config.base_revision}
    plain = AutoModelForCausalLM.from_pretrained(config.base_model, **({"trust_remote_code": False} | at | kwargs))
    settings = {name: getattr(config, name) for name in setting_names(ThoughtSettings)}
    for name in ("start_token", "end_token"):
        settings[name] = tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id"))
    return wrap(plain, tokenizer, check=False, **settings)


def _with_adapters(folder: str | Path, config: QuietStarConfig, kwargs: dict[str, Any]) -> ThinkingModel:
    """The base of the adapters in ``folder`` with them, and with the rows of added tokens, which are not yet set."""
    settings, (name, revision) = adapters.stored_config(folder), adapters.stored_base(folder)
    with safe_open(existing(folder, EMBEDDINGS_FILE, "the thought embeddings are"), "pt") as embeddings:
        dtype = embeddings.get_tensor("start").dtype
        added = embeddings.get_slice("input").get_shape()[0] if "input" in embeddings.keys() else 0  # noqa: SIM118
        wanted = int(embeddings.metadata()[BASE_VOCABULARY])
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(
            f"{folder} holds adapters of the model in {name}, says its {ADAPTER_CONFIG_NAME}, but no folder is there"
        )
    at = {} if revision is None else {"revision": revision}
    plain = AutoModelForCausalLM.from_pretrained(name, **({"dtype": dtype} | at | kwargs))
    check_architecture(plain)
    known = vocabulary_size(plain)
    if known != wanted:
        raise ValueError(
            f"{folder} is of a base with {wanted} rows in its vocabulary, but that of {name} has {known}: it is another"
        )
    adapters.check_base(plain, folder)
    if added:
        plain.resize_token_embeddings(known + added, mean_resizing=False)
    model = attach(plain, config, known)
    model.add_adapter(settings)
    adapters.load_adapters(model, folder)
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def attach(model: PreTrainedModel, config: QuietStarConfig, known: int | None = None) -> ThinkingModel:
    """Make ``model`` one that thinks, in place, with thought embeddings that are not yet set; returns it.

    Its base came with the first ``known`` rows of the vocabulary, by default with all of them.
    """
    rows = embedding_rows(model)
    factory: dict[str, Any] = dict(device=rows.device, dtype=rows.dtype)
    model.__class__ = thinking_class(type(model))
    assert isinstance(model, ThinkingModel)
    model.qstar = config
    model.qstar_base_vocabulary = len(rows) if known is None else known
    model.qstar_start = nn.Parameter(torch.empty(rows.shape[1], **factory))
    model.qstar_end = nn.Parameter(torch.empty(rows.shape[1], **factory))
    model.qstar_mixing_head = MixingHead(rows.shape[1], **factory) if config.mixing_head else ThoughtAlone()
    # A tensor that stays, since a new one would be copied to the device and checked there for every head and token.
    forbidden = torch.tensor([config.start_token_id, config.end_token_id], device=rows.device)
    model.register_buffer("qstar_forbidden", forbidden, persistent=False)
    model.set_attn_implementation(attention.NAME)
    disable_dropout(model)
    return model


def _check_small(small: PreTrainedModel, config: QuietStarConfig) -> None:
    """Check a small copy of a model, in which nothing hides and float32 is exact; its last two words are the tokens."""
    rows, words = embedding_rows(small), small.config.get_text_config(decoder=True).vocab_size
    start, end = words - 2, words - 1
    before = plain_passes(small, start, end)
    thinking = attach(small, replace(config, start_token_id=start, end_token_id=end))
    with torch.no_grad():
        thinking.qstar_start.copy_(rows[start])
        thinking.qstar_end.copy_(rows[end])
    check_behaviour(thinking, before, EXACT)


@contextlib.contextmanager
def _given_back_unless_it_thinks(model: PreTrainedModel, start: int, end: int) -> Iterator[None]:
    """Make ``model`` what it was if anything inside fails, and say of any failure that it cannot think."""
    plain_class, plain_attention = type(model), model.config._attn_implementation
    rows, noise = vocabulary_size(model), noise_of(model)
    written = {token: embedding_rows(model)[token].detach().clone() for token in (start, end) if token < rows}
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    except Exception as error:  # whatever a model does with a grid that it was not written for
        parameters = ("qstar_start", "qstar_end", "qstar_mixing_head", "qstar_forbidden")
        for name in ("qstar", "qstar_base_vocabulary", *parameters):
            if hasattr(model, name):
                delattr(model, name)
        model.__class__ = plain_class
        model.set_attn_implementation(plain_attention)
        for module, name, value in noise:
            setattr(module, name, value)
        if vocabulary_size(model) != rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for token, vector in written.items():
                embedding_rows(model)[token] = vector
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen.get(name, True))
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{plain_class.__name__} cannot read a thought grid: {type(error).__name__} in a tiny pass ({error})"
        ) from error


def _initial_embedding(rows: Tensor, tokenizer: PreTrainedTokenizerBase, text: str | None) -> Tensor:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if not tokens or tokenizer.unk_token_id in tokens or max(tokens) >= len(rows):
        return rows.mean(0)  # of a word that the model has not learned there is nothing to begin with
    return rows[tokens].mean(0)
