"""The sum of digits modulo ten: the problems of ``qstar train`` (:mod:`qstar.embedded.task`), and as many more steps.

    Q 1 3 5 0 8 = T 1 4 9 9 7 : 7      always five digits
    Q 3 5 8 = T 3 8 6 6 6 6 6 6 : 6    three to eight; a note is as long as the longest, its last word said again

So on the second rung the first K words of a working hold the answer where there are no more than K digits; where there
are more, only the sum of the first K. A note is not closed by the word that ends a question: a model that learns how
little can be said behind a question would learn it of a thought's end as well, and no longer read what it has thought.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from qstar.embedded.pretrain import PretrainSettings
from qstar.embedded.task import DIGITS, EQUALS, MODULUS, NUMBERS, QUESTION, WORKING, running_sums
from tasks.task import Problem, Task

CLOSE = ":"
WORDS = (QUESTION, EQUALS, WORKING, CLOSE, *NUMBERS)
FEWEST, MOST = 3, 8  # digits of the second rung
PRETRAINING = PretrainSettings(goal=0.5)


def sums_of(lengths: range) -> Callable[[random.Random], Problem]:
    """Draws the sum of so many digits, each number of them as often; notes are as long as those of the most."""
    longest = max(lengths)

    def filled(note: tuple[str, ...]) -> tuple[str, ...]:
        return note + note[-1:] * (longest - len(note))

    def draw(rng: random.Random) -> Problem:
        digits = tuple(rng.randrange(MODULUS) for _ in range(rng.choice(lengths)))
        named = tuple(map(str, digits))
        working = tuple(map(str, running_sums(digits)))
        return Problem(" ".join([QUESTION, *named, EQUALS]), filled(named), filled(working), len(digits))

    return draw


DIGITS_TASK = Task(
    name="digits",
    draw=sums_of(range(DIGITS, DIGITS + 1)),
    words=WORDS,
    choices=NUMBERS,
    marker=WORKING,
    close=CLOSE,
    thought_tokens=DIGITS,
    pretraining=PRETRAINING,
    training=dict(seq_length=48, max_steps=100),
)
STEPS_TASK = Task(
    name="steps",
    draw=sums_of(range(FEWEST, MOST + 1)),
    words=WORDS,
    choices=NUMBERS,
    marker=WORKING,
    close=CLOSE,
    thought_tokens=MOST,
    cuts=(1, 2, 4, 6),
    pretraining=PRETRAINING,
    training=dict(seq_length=48, max_steps=150),
)
