"""What a decoder of a task's corpus can do, by which its pre-training stops."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qstar.embedded.pretrain import Ability
from tasks.task import WORKING_SHARE, Problem, Task


@torch.no_grad()
def note_ability(
    model: LlamaForCausalLM, task: Task, tokenizer: PreTrainedTokenizerFast, asked: list[Problem]
) -> Ability:
    """Try ``model`` on problems; it is left in ``eval()``.

    A note is a working in some of the documents only. So ``working`` is the mean probability of the working behind
    the word that opens a note, over the share of workings among the notes: 1 for a model of the corpus.
    """
    model.eval()
    vocabulary = tokenizer.get_vocab()
    choices = torch.tensor([vocabulary[word] for word in task.choices])
    alike: dict[tuple[int, int], list[Problem]] = defaultdict(list)
    for problem in asked:
        alike[len(problem.prompt.split()), len(problem.working)].append(problem)
    found = torch.zeros(3)
    for (prompt, length), problems in alike.items():
        texts = [task.with_note(each, each.working).split() for each in problems]
        ids = torch.tensor([[vocabulary[word] for word in text] for text in texts])
        answers = torch.tensor([vocabulary[each.answer] for each in problems])
        log_p = model(ids).logits.log_softmax(-1)
        working = log_p[:, prompt : prompt + length].gather(-1, ids[:, prompt + 1 : prompt + 1 + length, None])
        after, alone = log_p[:, -1].argmax(-1), choices[log_p[:, prompt - 1, choices].argmax(-1)]
        found += torch.stack([working.sum((1, 2)).exp().sum(), _count(after == answers), _count(alone == answers)])
    written, after_working, answer_alone = (found / len(asked)).tolist()
    return Ability(written / WORKING_SHARE, after_working, answer_alone)


def _count(right: Tensor) -> Tensor:
    return right.sum().float()
