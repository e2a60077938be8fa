"""docs/models.md says of every causal class of transformers what ``qstar.wrap`` says of its smallest model."""

import every_model
import pytest
import tiny
import transformers
from every_model import DOCUMENT, THINKS, UNTRIED, documented

from qstar import wrap

DOCUMENTED_VERSION = "5.23"
MODEL_TYPES = every_model.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


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
    assert f"transformers {DOCUMENTED_VERSION}" in DOCUMENT.read_text()
    assert documented().keys() == MODEL_TYPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES.keys() & documented().keys()))
def test_wrap_says_what_is_documented(model_type):
    assert documented()[model_type] in said_by_wrap(model_type)
