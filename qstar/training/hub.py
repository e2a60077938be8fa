"""A checkpoint on the hub: what a run goes on with and nothing pickled."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from qstar.training.checkpoints import MANIFEST_FILE, PARTIAL
from qstar.training.saving import OPTIMIZER, RANDOM, SCALER, SCHEDULER, SETTINGS_FILE

LEFT_OUT = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{PARTIAL}*")  # of a run's folder; the first two as the Trainer has it
OF_A_CHECKPOINT = (  # and not of a model; the settings stand for a run that is finished
    *(f"{name}*" for name in (OPTIMIZER, SCHEDULER, SCALER, RANDOM)),
    *(TRAINER_STATE_NAME, MANIFEST_FILE, SETTINGS_FILE),
)


def push_checkpoint(
    checkpoint: Path, run: Path, strategy: HubStrategy, message: str, **place: Any
) -> list[Future[Any]]:
    """Push the model of a checkpoint, and all of it where the strategy says so; uploads go on in the background.

    transformers' own would lay a pickle of the settings beside the model, and leave out what lets it think.

    Args:
        checkpoint: a whole one.
        run: the folder of the run, where the model is put and what is pushed.
        strategy: ``hub_strategy`` of the settings, but for ``end``.
        message: of the commit.
        place: ``repo_id``, ``token`` and ``revision``.
    """
    shutil.copytree(checkpoint, run, ignore=shutil.ignore_patterns(*OF_A_CHECKPOINT), dirs_exist_ok=True)
    upload = cast(Any, partial(HfApi().upload_folder, run_as_future=True, **place))
    jobs = [upload(folder_path=run, commit_message=message, ignore_patterns=[*LEFT_OUT])]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
        jobs.append(upload(folder_path=checkpoint, path_in_repo=name, commit_message=f"{message}, checkpoint"))
    return jobs
