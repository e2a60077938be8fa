"""How a question is put so that a model reasons before it answers, with and without a hint, and how it is read."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from qstar.config import setting
from qstar.evaluation.questions import Question


@dataclass(kw_only=True)
class Wording:
    """Templates of the texts around a question, and where its answer stands in what is said.

    Attributes:
        prompt: a question, up to where the reasoning begins. The trained text begins with it.
        hinted_prompt: the same with the answer as a hint; no text that is trained on has it.
        exemplar: what stands behind the prompt of an exemplar.
        answer_pattern: a regular expression with one group, the answer; the first match counts, and ends the rationale.
        stop: texts that end what is said, if it goes on.
    """

    _argument_group_name = "wording"

    prompt: str = setting("Q: {question}\nA:", "A question, up to where the reasoning begins.")
    hinted_prompt: str = setting(
        "Q: {question} (The answer is {answer}.)\nA:", "The same with the answer as a hint, never trained on."
    )
    exemplar: str = setting(" {rationale} The answer is {answer}.\n\n", "What stands behind an exemplar's prompt.")
    answer_pattern: str = setting(
        r"[Tt]he answer is:? \(?\$?(-?\w[\w.,]*)\)?\.?",
        "A regular expression whose group is the answer; its first match counts.",
    )
    stop: tuple[str, ...] = setting(("\nQ:",), "A text that ends what is said; may be repeated.")

    def __post_init__(self) -> None:
        for name, needed, known in (
            ("prompt", {"question"}, {"question"}),
            ("hinted_prompt", {"question", "answer"}, {"question", "answer"}),
            ("exemplar", {"rationale", "answer"}, {"rationale", "answer"}),
        ):
            template = getattr(self, name)
            try:
                fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
            except ValueError as error:
                raise ValueError(f"{name} is {template!r}, which is no template: {error}") from None
            if not needed <= fields <= known:
                must = " and ".join(f"{{{each}}}" for each in sorted(needed))
                raise ValueError(f"{name} is {template!r}, but it must hold {must}, and no other field")
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern is {self.answer_pattern!r}, which is no pattern: {error}") from None
        if groups != 1:
            raise ValueError(f"answer_pattern is {self.answer_pattern!r}, but it must have one group: the answer")

    def ask(self, question: Question, exemplars: Sequence[Question] = (), *, hinted: bool = False) -> str:
        """The prompt of a question, behind exemplars that are put in the same way."""
        template = self.hinted_prompt if hinted else self.prompt
        return "".join(
            [
                *(
                    _filled(template, each) + self.exemplar.format(rationale=each.rationale, answer=each.answer)
                    for each in exemplars
                ),
                _filled(template, question),
            ]
        )

    def read(self, said: str) -> tuple[str, str] | None:
        """What was said up to and with its answer, and the answer; None where there is none."""
        found = re.search(self.answer_pattern, said)
        return None if found is None else (said[: found.end()], found[1])


def _filled(template: str, question: Question) -> str:
    choices = [f"\n({label}) {text}" for label, text in zip(question.labels, question.choices, strict=False)]
    return template.format(question="".join([question.text, *choices]), answer=question.answer)
