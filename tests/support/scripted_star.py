"""A plain model whose words are scripted, and questions about letters for it; its training is real."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace

import tiny
import torch
from transformers import LlamaForCausalLM

from qstar import star
from qstar.ancestors.wording import Wording
from qstar.evaluation.questions import Question


def question(text: str, answer: str, rationale: str | None = None) -> Question:
    """A question about letters."""
    return Question(text, answer, rationale=rationale)


WORDING = Wording(
    prompt="{question} q", hinted_prompt="h {answer} {question} q", exemplar=" {rationale} z {answer} e ",
    answer_pattern=r"z (\w)", stop=(),
)  # fmt: skip
QUICK = dict(first_steps=2, warmup_steps=0, learning_rate=1e-2, train_batch_size=2, batch_size=3, max_new_tokens=6)
QUESTIONS = [question(*each) for each in (("a b", "c"), ("b c", "d"), ("c d", "e"), ("d e", "f"), ("e f", "g"))]
HELD_OUT = [question("u v", "w"), question("v w", "x")]
SAID = {
    "a b q": "m z c",  # right
    "b c q": "m z m",  # wrong, and right with the hint
    "h d b c q": "n z d m",  # the answer ends the rationale
    "c d q": "m m",  # no answer, and none with the hint
    "h e c d q": "m m",
    "d e q": "m z m",  # wrong, and wrong with the hint
    "h f d e q": "n z m",
    "e f q": "m n z g z m",  # the first answer counts
    "u v q": "m z w",
    "v w q": "m z m",
}


def weights_of(model) -> str:
    """What tells weights from others, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Script:
    """Says to each prompt what a function of the prompt and the weights says.

    Attributes:
        asked: the prompts, in their order, each with the weights that were asked.
    """

    def __init__(self, monkeypatch, says: Callable[[str, str], str]):
        self.says, self.asked = says, list[tuple[str, str]]()
        self.tokenizer = tiny.tokenizer()
        script = self

        def generate(model, tokens, attention_mask, **arguments):
            return script._said(model, tokens, attention_mask)

        monkeypatch.setattr(LlamaForCausalLM, "generate", generate)

    def _said(self, model, tokens, attention_mask):
        assert not model.training
        weights, rows = weights_of(model), []
        for row, mask in zip(tokens, attention_mask.bool(), strict=True):
            prompt = self.tokenizer.decode(row[mask])
            self.asked.append((prompt, weights))
            words = self.tokenizer(self.says(prompt, weights))["input_ids"]
            rows.append([*words, self.tokenizer.eos_token_id])
        width = max(map(len, rows))
        said = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        return SimpleNamespace(sequences=torch.cat([tokens, said], 1))


def run(tmp_path, name="run", questions=QUESTIONS, **options):
    """A run of STaR, by default of one round."""
    settings = dict(tokenizer=tiny.tokenizer(), wording=WORDING, output_dir=tmp_path / name, rounds=1) | QUICK
    return star(options.pop("model", None) or tiny.plain_model("llama"), questions, **(settings | options))
