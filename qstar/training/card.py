"""The model card of a run: what was trained on what and how, what came out, and how to load it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from qstar.config import ThoughtSettings, setting_names
from qstar.model import MIXING_HEAD_FILE, QuietStarModel
from qstar.training.config_file import default_of, typed_fields, written
from qstar.training.curves import CURVES_FILE
from qstar.training.settings import OF_PRESET, QuietStarArguments

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
TAG = "quiet-star"
PAPER = "https://arxiv.org/abs/2403.09629"
ALWAYS = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seq_length", "policy_weight"),
    *("preset", *OF_PRESET),
)
NOT_OF_THE_MODEL = (  # settings of the place where it was trained
    *("output_dir", "use_cpu", "disable_tqdm", "report_to", "run_name", "curves", "gradient_checkpointing"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "accelerator_config"),
)
IN_TRAINING = {
    "nll_base": "negative log-likelihood without thoughts, nats per token",
    "nll_talk": "negative log-likelihood with thoughts, nats per token",
    "reward": "reward, nats",
    "mixing_weight": "mixing weight",
    "thought_entropy": "entropy of the tokens of thoughts, nats",
    "distinct_thoughts": "share of distinct thoughts",
}
HELD_OUT = {
    "eval_nll_base": "negative log-likelihood without thoughts, nats per token",
    "eval_nll_talk": "negative log-likelihood with thoughts, nats per token",
    "eval_gain": "gain by thoughts, nats per token",
    "eval_perplexity_base": "perplexity without thoughts",
    "eval_perplexity_talk": "perplexity with thoughts",
    "eval_mixing_weight": "mixing weight",
    "eval_tokens": "tokens that were predicted",
}


@dataclass(frozen=True)
class Source:
    """A model or data that a run began with.

    Attributes:
        words: what a reader is told.
        hub: its name on the hub; None where it is not from there.
    """

    words: str
    hub: str | None = None

    @classmethod
    def of(cls, given: Any) -> Source:
        """What :func:`qstar.train` was given as a model, a dataset or held-out text; of a path only its last name."""
        name = given.name_or_path if isinstance(given, PreTrainedModel) else given
        if not isinstance(name, (str, Path)) or not str(name):
            return cls(f"an object of the class {type(given).__name__}")
        if isinstance(name, Path) or Path(name).exists():
            return cls(f"`{Path(name).resolve().name}`, not from the hub")
        return cls(f"`{name}`", name)


@dataclass(frozen=True)
class Sources:
    """What a run began with; None where it is not known, or there is none."""

    model: Source | None = None
    dataset: Source | None = None
    eval_dataset: Source | None = None

    @classmethod
    def of(cls, model: Any, dataset: Any, eval_dataset: Any = None) -> Sources:
        """Of what :func:`qstar.train` was given."""
        return cls(Source.of(model), Source.of(dataset), None if eval_dataset is None else Source.of(eval_dataset))


def model_card(
    model: QuietStarModel,
    args: QuietStarArguments,
    sources: Sources,
    logged: Mapping[str, Any],
    steps: int,
    *,
    name: str | None = None,
    repo: str | None = None,
    **metadata: Any,
) -> str:
    """The text of a model card.

    Args:
        model: that was trained.
        args: the settings of the run.
        sources: what it began with.
        logged: the last value of each metric.
        steps: that were taken.
        name: of the model; that of the folder by default.
        repo: its name on the hub, where it is there.
        metadata: of :class:`huggingface_hub.ModelCardData`: ``license``, ``language``, ``tags``.
    """
    tags = metadata.pop("tags", None) or []
    data = ModelCardData(
        base_model=sources.model.hub if sources.model else None,
        datasets=[sources.dataset.hub] if sources.dataset and sources.dataset.hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[TAG, *([tags] if isinstance(tags, str) else tags)],
        **metadata,
    )
    began = {"Model": sources.model, "Trained on": sources.dataset, "Held out": sources.eval_dataset}
    said = (
        "to mix what it would say after the thought with what it would say without"
        if model.qstar.mixing_head
        else "to say what follows from it"
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name or args.folder.resolve().name}",
        f"A {type(model).__bases__[-1].__name__} that thinks before it speaks: it was trained by "
        f"[Quiet-STaR]({PAPER}) to write a thought after every token of a text, and {said}.",
        "\n".join([*(f"- {what}: {source.words}" for what, source in began.items() if source), f"- Steps: {steps:,}"]),
        f"## Settings\n\nThose that are not the defaults, or matter most:\n\n```yaml\n{settings_of(model, args)}```",
    ]
    tables = [
        f"{title}:\n\n| | |\n|---|---:|\n{rows}"
        for title, names in (("In training, at the end", IN_TRAINING), ("On held-out text", HELD_OUT))
        if (rows := "\n".join(f"| {text} | {number(logged[name])} |" for name, text in names.items() if name in logged))
    ]
    if tables:
        sections += ["## Results", *tables]
    if (args.folder / CURVES_FILE).is_file():
        sections.append(f"![Curves of the training]({CURVES_FILE})")
    return "\n\n".join([*sections, how_to_load(repo)]) + "\n"


def write_card(card: str, folder: Path) -> None:
    """Write a card into ``folder``, unless there is a README of another origin."""
    path = folder / CARD_FILE
    if path.exists() and f"\n- {TAG}\n" not in path.read_text():
        logger.warning("%s is not a card of ours: it is left as it is, and no card is written", path)
        return
    path.write_text(card)


def number(value: float) -> str:
    """A number as a table has it; counts in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def settings_of(model: QuietStarModel, args: QuietStarArguments) -> str:
    """The settings that make a run what it is, as YAML that ``qstar train --config`` takes."""
    shown = {name: value for name, value in asdict(model.qstar).items() if name in setting_names(ThoughtSettings)}
    for each, _ in typed_fields(QuietStarArguments):
        value, default = getattr(args, each.name), default_of(each)
        value = getattr(value, "value", value)  # of an enum
        changed = value != default and bool(value or default) and isinstance(value, (bool, int, float, str, dict, list))
        if each.name in ALWAYS or (changed and each.name not in NOT_OF_THE_MODEL):
            shown[each.name] = value
    return written(shown, {}, (ThoughtSettings, QuietStarArguments), full=False)


def how_to_load(repo: str | None) -> str:
    """How to load the model with this package and without, from the hub or from the folder that the card is in."""
    download = "from huggingface_hub import snapshot_download\n\n" if repo else ""
    place = f'snapshot_download("{repo}")' if repo else '"."'
    return f'''## How to use it

With its thoughts, by the package quiet-star{"" if repo else ", here from this folder"}:

```python
import qstar
{download}
model, tokenizer = qstar.load({place})
prompt = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=8)
print(tokenizer.decode(output[0]))
```

Without that package, as the decoder that it is. It does not think then: the mixing head, `{MIXING_HEAD_FILE}`, is not
read where there is one, and the embeddings of the tokens that open and close a thought are rows of its vocabulary like
others.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo or "."}")
tokenizer = AutoTokenizer.from_pretrained("{repo or "."}")
```'''
