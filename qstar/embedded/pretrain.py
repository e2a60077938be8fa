"""A small decoder, pre-trained until it can write the working of problems it has not seen; kept in a cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qstar.embedded.task import Problems, build_tokenizer, documents, problems
from qstar_kernels import faster_linear

RECORD_FILE = "pretraining.json"
ARITHMETIC = 2  # a number that changes where the same settings make other weights
Corpus: TypeAlias = Callable[[int, int], list[str]]  # so many documents, of a seed
Measure: TypeAlias = "Callable[[LlamaForCausalLM], Ability]"


@dataclass(frozen=True)
class PretrainSettings:
    """The decoder and how it is trained. A setting that changes makes other weights, under another name in the cache.

    Attributes:
        init_std: of the weights, about 1 / sqrt(width). transformers' 0.02 is meant for wide models; so narrow a one
            then needs several times as many steps.
        rope_base: positions differ by a few tokens here; a small base tells them apart sharply.
        max_steps: give up after so many; the learning rate falls to zero by then.
        check_steps: try the model every so many steps.
        goal: stop when this share of the workings, and of the answers that follow one, is right.
        tried: how many problems of the validation split the model is tried on.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 128
    init_std: float = 0.125
    rope_base: float = 100.0
    max_positions: int = 2048
    batch_size: int = 128
    learning_rate: float = 4e-3
    beta2: float = 0.95
    weight_decay: float = 0.01
    warmup_steps: int = 50
    max_steps: int = 1600
    check_steps: int = 25
    goal: float = 0.99
    tried: int = 512


@dataclass(frozen=True)
class Ability:
    """What a model can do with problems that it has not seen, as shares of 1.

    Attributes:
        working: workings that it writes without a mistake, greedily, after the marker.
        answer_after_working: answers that are right after the right working.
        answer_alone: answers that are right without a working, scored over the permitted answers.
    """

    working: float
    answer_after_working: float
    answer_alone: float

    def reaches(self, goal: float) -> bool:
        """Whether the model can write workings and read them."""
        return min(self.working, self.answer_after_working) >= goal

    def __str__(self) -> str:
        return (
            f"workings {self.working:.1%}, answers after a working {self.answer_after_working:.1%}, "
            f"answers without {self.answer_alone:.1%}"
        )


def pretrained_model(
    cache_dir: str | Path,
    seed: int = 0,
    settings: PretrainSettings | None = None,
    corpus: Corpus | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    measure: Measure | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The pre-trained decoder and its tokenizer: from the cache, or trained now, in seconds at its defaults.

    Args:
        cache_dir: folder that holds models of any settings side by side; made where it is missing.
        seed: of the weights and of the corpus.
        settings: the defaults of :class:`PretrainSettings` where None.
        corpus: what it is trained on; :func:`qstar.embedded.task.documents` where None.
        tokenizer: of the corpus; that of :mod:`qstar.embedded.task` where None.
        measure: what the model can do; :func:`measure_ability` with problems of :mod:`qstar.embedded.task` where None.

    Warns:
        UserWarning: the model did not reach the goal within ``max_steps``; thoughts will hardly help it.
    """
    settings, corpus, tokenizer = settings or PretrainSettings(), corpus or documents, tokenizer or build_tokenizer()
    measure = measure or partial(measure_ability, asked=problems(settings.tried, seed, tokenizer, split="validation"))
    folder = Path(cache_dir) / f"decoder-{_cache_key(seed, settings, corpus, tokenizer)}"
    if (folder / RECORD_FILE).is_file():
        model = LlamaForCausalLM.from_pretrained(folder)
        record = json.loads((folder / RECORD_FILE).read_text())
        steps, ability = record["steps"], Ability(**record["ability"])
    else:
        model, steps, ability = pretrain(tokenizer, seed, settings, corpus, measure)
        _save(folder, model, tokenizer, dict(steps=steps, ability=asdict(ability), seed=seed, **asdict(settings)))
        model = LlamaForCausalLM.from_pretrained(folder)  # which knows where it is from
    if not ability.reaches(settings.goal):
        warnings.warn(
            f"the built-in decoder stopped after {steps} steps of pre-training, below its goal of {settings.goal:.0%} "
            f"({ability}): thoughts will hardly help it; another seed may do",
            stacklevel=2,
        )
    return model, tokenizer


def pretrain(
    tokenizer: PreTrainedTokenizerFast, seed: int, settings: PretrainSettings, corpus: Corpus, measure: Measure
) -> tuple[LlamaForCausalLM, int, Ability]:
    """Train a decoder from random weights; the model in ``eval()``, the steps taken, and what it can do then."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(decoder_config(tokenizer, settings))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / settings.warmup_steps, 1 - step / settings.max_steps)
    )
    step = 0
    with tqdm(total=settings.max_steps, desc="pre-training", unit="step") as progress:
        while True:
            if step % settings.check_steps == 0 or step == settings.max_steps:
                ability = measure(model)
                progress.set_postfix_str(str(ability))
                if ability.reaches(settings.goal) or step == settings.max_steps:
                    return model, step, ability
            # Each step's documents have a seed of their own, above the small ones that others choose for a corpus.
            batch = _batch(tokenizer, corpus(settings.batch_size, ((seed + 1) << 32) + step))
            with faster_linear(torch.empty(*batch["input_ids"].shape, settings.width)):
                loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            progress.update()


@torch.no_grad()
def measure_ability(model: LlamaForCausalLM, asked: Problems) -> Ability:
    """Try ``model`` on problems; it is left in ``eval()``.

    One pass reads the right workings: greedy decoding writes one exactly where each of its tokens is the most probable
    one behind those before it.
    """
    model.eval()
    prompts, workings = torch.tensor(asked.prompts), torch.tensor(asked.workings)
    answers, choices = torch.tensor(asked.answers), torch.tensor(asked.choices)
    marker = torch.full((len(prompts), 1), asked.marker)
    equals = torch.full((len(prompts), 1), asked.equals)
    opened = prompts.shape[1]  # where the marker stands
    logits = model(torch.cat([prompts, marker, workings, equals], 1)).logits
    alone = choices[logits[:, opened - 1, choices].argmax(-1)]
    written = logits[:, opened : opened + workings.shape[1]].argmax(-1)
    after = logits[:, -1].argmax(-1)
    return Ability(
        working=(written == workings).all(1).float().mean().item(),
        answer_after_working=(after == answers).float().mean().item(),
        answer_alone=(alone == answers).float().mean().item(),
    )


def _batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, Tensor]:
    """Documents, one a row: input ids and labels ``[B, S]``, the padding behind a document left out of the labels."""
    texts = [text + tokenizer.eos_token for text in texts]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return dict(input_ids=batch["input_ids"], labels=labels)  # no mask: text does not see what stands behind it


def decoder_config(tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.max_positions,
        rope_parameters=dict(rope_type="default", rope_theta=settings.rope_base),
        initializer_range=settings.init_std,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _cache_key(seed: int, settings: PretrainSettings, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> str:
    """A name that changes with the seed, with any setting, and with what the generator and the tokenizer make of it."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    content = json.dumps([ARITHMETIC, seed, asdict(settings), corpus(16, seed), vocabulary])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict) -> None:
    """Write all of it beside ``folder`` and give it the name in one step: a cache entry is complete or is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was first; its weights are the same.
            if not (folder / RECORD_FILE).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
