"""docs/models.md says of every causal class of transformers what ``qstar.wrap`` says of its smallest model."""

import functools
import re
from pathlib import Path

import every_model
import pytest
import tiny
import transformers

from qstar import wrap

MODELS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
THINKS, UNTRIED = "thinks", "not tried"
DOCUMENTED_VERSION = "5.23"
MODEL_TYPES = every_model.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@functools.cache
def documented() -> dict[str, str]:
    """What the tables say of each model type: their first column, ``thinks``, ``not tried`` or part of the message."""
    rows = re.findall(r"^\| ([^|]+) \|.* \| ([^|]+) \|$", MODELS.read_text(), re.MULTILINE)
    return {name: said.strip('"') for said, names in rows for name in re.findall(r"`([\w-]+)`", names)}


def said_by_wrap(model_type: str) -> str:
    try:
        model = every_model.tiny_model(model_type)
    except Exception:
        return UNTRIED
    try:
        wrap(model, tiny.tokenizer())
    except ValueError as refusal:
        return str(refusal)
    return THINKS


@pytest.mark.skipif(not transformers.__version__.startswith(DOCUMENTED_VERSION), reason="another transformers")
def test_every_causal_class_is_documented():
    assert f"transformers {DOCUMENTED_VERSION}" in MODELS.read_text()
    assert documented().keys() == MODEL_TYPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES.keys() & documented().keys()))
def test_wrap_says_what_is_documented(model_type):
    assert documented()[model_type] in said_by_wrap(model_type)
