"""The tasks by name, a rung each."""

from __future__ import annotations

from tasks.digits import DIGITS_TASK, STEPS_TASK
from tasks.stories import STORIES_TASK
from tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS_TASK, STEPS_TASK, STORIES_TASK)}
