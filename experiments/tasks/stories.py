"""Small stories in plain words: what the time is in the end.

    tom wakes at 7 , first reads for 4 hours , then cooks with ann for 9 hours , later rests for 1 hour . now it is
    count 7 first 11 then 8 later 9 so 9

Clocks begin again after twelve. Without that a decoder learns to add a few small numbers in one step, and there would
be little to think about.
"""

from __future__ import annotations

import random

from qstar.embedded.pretrain import PretrainSettings
from tasks.task import Problem, Task


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "tom ben sam max leo jack noah luke adam paul mark john peter henry oscar felix simon david martin robert james "
    "george edward frank harry arthur walter victor albert hugo ann eva mia zoe lily rose emma lucy anna clara julia "
    "sarah maria laura nina helen alice grace ruth martha diana olga irene sofia vera wanda karen linda susan betty"
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
LINKS = _words("first then later")  # in this order
HOURS = 12
NUMBERS = tuple(str(hour) for hour in range(1, HOURS + 1))
REST = _words("at for hour hours , . near the with now it is count so")
WORDS = tuple(dict.fromkeys([*REST, *NUMBERS, *NAMES, *BEGINS, *DOES, *PLACES, *HOW, *LINKS]))


def draw(rng: random.Random) -> Problem:
    """A story by chance."""
    hour = rng.randint(1, HOURS)
    parts = [f"{rng.choice(NAMES)} {rng.choice(BEGINS)} at {hour}"]
    named, working = [str(hour)], [str(hour)]
    for link in LINKS:
        spell = rng.randint(1, HOURS - 1)
        hour = (hour + spell - 1) % HOURS + 1
        parts.append(f"{link} {_does(rng)} for {spell} {'hour' if spell == 1 else 'hours'}")
        named += [link, str(spell)]
        working += [link, str(hour)]
    return Problem(f"{' , '.join(parts)} . now it is", tuple(named), tuple(working), len(LINKS))


def _does(rng: random.Random) -> str:
    """What somebody does, in one of several ways to say it."""
    does = rng.choice(DOES)
    ways = [does, does, f"{does} near the {rng.choice(PLACES)}", f"{does} {rng.choice(HOW)}"]
    return rng.choice([*ways, f"{does} with {rng.choice(NAMES)}"])


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
    training=dict(
        seq_length=96,
        per_device_train_batch_size=8,
        max_steps=300,
        learning_rate=2e-4,
        mixing_head_lr_factor=15.0,
    ),
)
