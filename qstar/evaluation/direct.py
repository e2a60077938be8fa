"""Direct answers: the tokens of the right answer are scored right behind the question (paper, section 5.1).

The paper's "accuracy" is the probability of the answer where only tokens that an answer may hold share the mass, as the
product over the answer's tokens, the newline that ends it included. Tokens outside of those, such as a comma, are
skipped. It grows when a distribution gets sharper, whatever it says: so beside it stand whether each token is the most
probable one, and the log-likelihood of all tokens under the whole vocabulary.

Where the texts of choices are compared, as lm-evaluation-harness does for ARC, the choice of the highest log-likelihood
is the answer, and its probability its share of those of all choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.evaluation.questions import Question
from qstar.evaluation.report import Answered
from qstar.evaluation.scoring import Request, Thoughts, TokenScores, encode, score_requests
from qstar.evaluation.tasks import Task


def requests_of(task: Task, question: Question, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """What is scored for a question: its answer, or each of its choices."""
    texts = task.choice_texts(question) or (task.continuation(question),)
    return [encode(tokenizer, task.prompt(question), text) for text in texts]


def answer_directly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    *,
    thoughts: Thoughts,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[int, Answered]]:
    """Score the answers to questions, in batches of about one length, the longest first.

    Args:
        model: any causal language model of transformers without thoughts, a :class:`QuietStarModel` with them.
        tokenizer: its own.
        task: of the questions.
        questions: to be answered.
        thoughts: ``"own"``: the model's; None: it does not think; or those to read instead, for each request of each
            question, one question after the other, see :func:`qstar.evaluation.scoring.score_requests`.
        batch_size: requests at a time.
        temperature: thoughts are sampled at; greedy by default.
        seed: of sampled thoughts.

    Yields:
        Places in ``questions``, each once, with the answers. ``detail`` holds the thoughts that were read, token ids
        ``[L][K]`` for each request, where there were any; of compared choices their ``log_likelihoods``, and whether
        the right one has the highest one per character (``right_by_length``).
    """
    asked = [requests_of(task, question, tokenizer) for question in questions]
    requests = [each for those in asked for each in those]
    owner = [place for place, those in enumerate(asked) for _ in those]
    begins = list(accumulate(map(len, asked), initial=0))
    found: dict[int, dict[int, TokenScores]] = {}
    permitted = task.permitted(tokenizer)
    options: dict[str, Any] = dict(permitted=permitted, batch_size=batch_size, temperature=temperature, seed=seed)
    for number, scores in score_requests(model, requests, thoughts=thoughts, **options):
        place = owner[number]
        here = found.setdefault(place, {})
        here[number - begins[place]] = scores
        if len(here) == len(asked[place]):
            in_order = [scores for _, scores in sorted(found.pop(place).items())]
            choices = task.choice_texts(questions[place])
            if choices:
                answered = _chosen(in_order, choices, questions[place])
            else:
                answered = _scored(in_order[0], tokenizer)
            read = [scores.thoughts.tolist() for scores in in_order if scores.thoughts is not None]
            if read:
                answered.detail["thoughts"] = read
            yield place, answered


def thoughts_of(answers: Sequence[Answered]) -> list[Tensor]:
    """The thoughts that :func:`answer_directly` found, ``[L, K]`` for each request."""
    return [torch.tensor(each) for answered in answers for each in answered.detail["thoughts"]]


def _scored(scores: TokenScores, tokenizer: PreTrainedTokenizerBase) -> Answered:
    return Answered(
        right=bool(scores.permitted_best.all()),
        probability=float(scores.permitted_log_prob.double().sum().exp()),
        log_likelihood=float(scores.log_prob.double().sum()),
        said=str(tokenizer.decode(scores.top)).strip(),
    )


def _chosen(scores: Sequence[TokenScores], choices: Sequence[str], question: Question) -> Answered:
    sums = torch.stack([each.log_prob.sum() for each in scores])
    lengths = torch.tensor([len(text.removeprefix(" ")) for text in choices], dtype=torch.float64)
    right, said = question.right_choice, int(sums.argmax())
    return Answered(
        right=said == right,
        probability=float(sums.double().softmax(0)[right]),
        log_likelihood=float(sums[right]),
        said=question.choices[said],
        detail={
            "log_likelihoods": sums.tolist(),
            "right_by_length": int((sums.double() / lengths).argmax()) == right,
        },
    )
