"""The model card at the end of a run: what it says is so, and what it shows runs."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from tiny_runs import records, texts, tiny_train
from transformers import AutoModelForCausalLM

from qstar.config import ThoughtSettings
from qstar.model import QuietStarModel
from qstar.training.card import CARD_FILE, HELD_OUT, IN_TRAINING, Source, Sources, how_to_load, model_card
from qstar.training.config_file import read_settings
from qstar.training.settings import QuietStarArguments

SETTINGS = dict(
    learning_rate=1e-2,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr": 1e-7},
    optim="sgd",
    max_steps=3,
    logging_steps=1,
    hub_token="hf_secret",
    rationales=3,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a file, and its card."""
    place = tmp_path_factory.mktemp("place")
    texts().to_json(place / "sums.jsonl")
    options = dict(dataset=place / "sums.jsonl", eval_dataset=texts(4), curves=True)
    result = tiny_train(
        place / "thinker", model=tiny.plain_model("llama", tie_word_embeddings=False), **options, **SETTINGS
    )
    return result, (result.folder / CARD_FILE).read_text()


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def test_the_settings_on_a_card_are_those_of_the_run(finished, tmp_path):
    _, card = finished
    [block] = blocks(card, "yaml")
    (tmp_path / "run.yaml").write_text(block)
    read = read_settings(tmp_path / "run.yaml", (ThoughtSettings, QuietStarArguments))
    expected = {name: value for name, value in SETTINGS.items() if name != "hub_token"}
    expected |= dict(thought_tokens=2, ahead_tokens=2, per_device_train_batch_size=2, seq_length=12, policy_weight=10.0)
    expected |= dict(preset="rlp", likelihood_weight=1.0, baseline="leave_one_out", signed_advantages=True)
    expected |= dict(reinforce_temperature=1.0)
    assert expected.items() <= read.items()
    assert "hf_secret" not in card and not {"output_dir", "use_cpu", "report_to", "curves"} & read.keys()


def test_the_results_on_a_card_are_the_last_in_the_log(finished):
    result, card = finished
    rows = dict(re.findall(r"^\| (\S.*?) \| (\S+) \|$", card.split("On held-out text:")[0], re.MULTILINE))
    held_out = dict(re.findall(r"^\| (\S.*?) \| (\S+) \|$", card.split("On held-out text:")[1], re.MULTILINE))
    logged = {name: value for record in records(result.folder) for name, value in record.items()}
    assert rows.keys() == set(IN_TRAINING.values()) and held_out.keys() == set(HELD_OUT.values())
    for names, found in ((IN_TRAINING, rows), (HELD_OUT, held_out)):
        for name, text in names.items():
            assert float(found[text]) == pytest.approx(logged[name], rel=1e-3), name
    assert "\n- Steps: 3\n" in card and "![Curves of the training](curves.png)" in card


def test_the_examples_on_a_card_load_what_was_trained(finished, monkeypatch):
    """With the package the model that thinks, without it a decoder of the same logits and embeddings."""
    result, card = finished
    monkeypatch.chdir(result.folder)
    with_package, without = ({"__name__": "__main__"} for _ in range(2))
    first, second = blocks(card, "python")
    exec(first, with_package)
    exec(second, without)
    thinking, plain = with_package["model"], without["model"]
    assert isinstance(thinking, QuietStarModel) and not isinstance(plain, QuietStarModel)
    for name, weight in result.model.state_dict().items():
        assert torch.equal(thinking.state_dict()[name], weight), name
    tokens = tiny.text(2, 9)
    torch.testing.assert_close(plain(tokens).logits, result.model.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    rows, ids = plain.get_input_embeddings().weight, thinking.qstar
    assert torch.equal(rows[ids.start_token_id], result.model.qstar_start)
    assert torch.equal(rows[ids.end_token_id], result.model.qstar_end)
    assert without["tokenizer"].convert_tokens_to_ids(ids.start_token) == ids.start_token_id


def test_a_card_says_what_the_run_began_with_and_no_path_of_the_machine(finished):
    result, card = finished
    assert "- Model: an object of the class LlamaForCausalLM\n" in card
    assert "- Trained on: `sums.jsonl`, not from the hub\n" in card
    assert str(result.folder.parent) not in card
    data = ModelCard.load(result.folder / CARD_FILE).data
    assert data.library_name == "transformers" and data.tags == ["quiet-star"]
    assert data.base_model is None and data.datasets is None
    assert card.splitlines()[0] == "---" and "\n# thinker\n" in card


def test_names_of_the_hub_are_metadata(finished, tmp_path):
    result, _ = finished
    args = QuietStarArguments(str(tmp_path), use_cpu=True, report_to="none")
    sources = Sources.of("some/model", "some/data", "more/data")
    metadata = dict(license="apache-2.0", tags="own", repo="me/thinker", name="A thinker")
    card = model_card(result.model, args, sources, {}, 1000, **metadata)
    data = ModelCard(card).data
    assert (data.base_model, data.datasets, data.license) == ("some/model", ["some/data"], "apache-2.0")
    assert data.tags == ["quiet-star", "own"]
    assert "- Held out: `more/data`\n" in card and "\n# A thinker\n" in card and "- Steps: 1,000\n" in card
    assert "## Results" not in card and "curves.png" not in card
    assert 'qstar.load(snapshot_download("me/thinker"))' in card and 'from_pretrained("me/thinker")' in card


def test_a_source_is_told_by_what_was_given(tmp_path):
    (tmp_path / "model").mkdir()
    assert Source.of(str(tmp_path / "model")) == Source("`model`, not from the hub")
    assert Source.of(tmp_path / "missing") == Source("`missing`, not from the hub")
    assert Source.of("some/data") == Source("`some/data`", "some/data")
    assert Source.of(texts()) == Source("an object of the class Dataset")
    model = tiny.plain_model("llama")
    model.config._name_or_path = model.name_or_path = "some/model"
    assert Source.of(model) == Source("`some/model`", "some/model")


def test_a_readme_of_another_origin_is_left_as_it_is(tmp_path, caplog):
    tmp_path.joinpath(CARD_FILE).write_text("# My project\n")
    tiny_train(tmp_path, max_steps=1)
    assert tmp_path.joinpath(CARD_FILE).read_text() == "# My project\n"
    assert "README.md is not a card of ours: it is left as it is" in caplog.text


def test_a_card_of_ours_is_written_anew(tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    tiny_train(tmp_path, max_steps=1, **options)
    assert "\n- Steps: 1\n" in tmp_path.joinpath(CARD_FILE).read_text()
    tiny_train(tmp_path, max_steps=2, resume_from_checkpoint=True, **options)
    assert "\n- Steps: 2\n" in tmp_path.joinpath(CARD_FILE).read_text()


def test_the_hub_downloads_before_it_loads():
    assert how_to_load("a/b").count("snapshot_download") == 2
    assert "snapshot_download" not in how_to_load(None)
    assert AutoModelForCausalLM.__name__ in how_to_load(None)
