"""Small stories in plain words: what the clock shows in the end.

    on monday tom wakes at 7 . first for 4 hours he reads . then for 9 hours he cooks with ann . later for 1 hour
    he rests . what does the clock show ? answer : count 7 first 11 then 8 later 9 so 9

Clocks begin again after twelve. Without that a decoder learns to add a few small numbers in one step, and there would
be little to think about.
"""

from __future__ import annotations

import random

from qstar.embedded.pretrain import PretrainSettings
from tasks.task import Problem, Task


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HE = _words(
    "tom ben sam max leo jack noah luke adam paul mark john peter henry oscar felix simon david martin robert james "
    "george edward frank harry arthur walter victor albert hugo"
)
SHE = _words(
    "ann eva mia zoe lily rose emma lucy anna clara julia sarah maria laura nina helen alice grace ruth martha diana "
    "olga irene sofia vera wanda karen linda susan betty"
)
BEGINS = _words("arrives begins leaves starts wakes")
DOES = _words(
    "cooks cleans climbs dances draws drives drums fishes gardens hikes hunts jogs knits listens marches paints "
    "plays practises prays reads rests rides rows runs sails sews sings skates sleeps studies swims talks teaches "
    "trains travels types waits walks watches works writes"
)
PLACES = _words(
    "barn beach camp castle cellar church field forest garden gym hall harbour hotel house kitchen lake library "
    "market meadow museum office park playground pool river school shop station street studio tent theatre tower "
    "town valley village workshop yard zoo"
)
HOW = _words(
    "alone badly bravely calmly carefully early gladly gently happily loudly late outside quickly quietly sadly slowly "
    "softly today upstairs well"
)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
LINKS = _words("first then later")  # in this order
HOURS = 12
NUMBERS = tuple(str(hour) for hour in range(1, HOURS + 1))
REST = _words("on at for hour hours . near the with and he she what does clock show ? answer : count so")
WORDS = tuple(dict.fromkeys([*REST, *NUMBERS, *HE, *SHE, *BEGINS, *DOES, *PLACES, *HOW, *DAYS, *LINKS]))


def draw(rng: random.Random) -> Problem:
    """A story by chance."""
    man = rng.random() < 0.5
    they = "he" if man else "she"
    hour = rng.randint(1, HOURS)
    name = rng.choice(HE if man else SHE)
    sentences = [f"on {rng.choice(DAYS)} {name} {rng.choice(BEGINS)} at {hour} ."]
    named, working = [str(hour)], [str(hour)]
    for link in LINKS:
        spell = rng.randint(1, HOURS - 1)
        hour = (hour + spell - 1) % HOURS + 1
        sentences.append(f"{link} for {spell} {'hour' if spell == 1 else 'hours'} {_does(rng, they)} .")
        named += [link, str(spell)]
        working += [link, str(hour)]
    prompt = " ".join([*sentences, "what does the clock show ? answer :"])
    return Problem(prompt, tuple(named), tuple(working), len(LINKS))


def _does(rng: random.Random, they: str) -> str:
    """What somebody does, in one of several ways to say it."""
    does = f"{they} {rng.choice(DOES)}"
    return rng.choice(
        [
            does,
            f"{does} near the {rng.choice(PLACES)}",
            f"{does} {rng.choice(HOW)}",
            f"{does} with {rng.choice(HE + SHE)}",
        ]
    )


STORIES_TASK = Task(
    name="stories",
    draw=draw,
    words=WORDS,
    choices=NUMBERS,
    marker="count",
    close="so",
    thought_tokens=2 * len(LINKS) + 1,
    pretraining=PretrainSettings(  # 2.5 million parameters
        width=256,
        layers=4,
        heads=8,
        key_value_heads=4,
        intermediate=512,
        init_std=0.0625,
        batch_size=64,
        learning_rate=1.5e-3,
        goal=0.5,
        max_steps=2400,
    ),
    training=dict(seq_length=80, per_device_train_batch_size=8, max_steps=300),
)
