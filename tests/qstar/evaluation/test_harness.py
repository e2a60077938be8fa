"""Tasks of lm-evaluation-harness without network: its figures are those of plain logits and of our own scores."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import tiny
import tiny_folder
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig
from plain_answers import greedy_thought
from transformers import AutoModelForCausalLM

import qstar
from qstar import reference
from qstar.evaluation.answers import Letters
from qstar.evaluation.direct import answer_directly
from qstar.evaluation.harness import evaluate_with_harness, find_harness_tasks, found_tasks, harness_table
from qstar.evaluation.harness_model import QuietStarLM
from qstar.evaluation.questions import Question
from qstar.evaluation.report import Row
from qstar.evaluation.run import OWN_THOUGHTS, WITHOUT
from qstar.evaluation.scoring import Request, encode, score_requests
from qstar.evaluation.tasks import Task
from qstar.wrapping import wrap

ASKED = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def documents() -> list[dict]:
    """Questions of several lengths, each with three answers of one to three words."""
    found = []
    for number in range(ASKED):
        words = [LETTERS[each] for each in (tiny.text(1, 14, number)[0] - 4).tolist()]
        choices = [" ".join(words[:1]), " ".join(words[1:3]), " ".join(words[3:6])]
        question = " ".join(words[6 : 9 + number % 5])
        found.append(dict(question=question, choices=choices, label=number % 3, answer="b"))
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with two tasks: one of choices, one of generated text."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents()))
    shared = dict(
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(folder / "questions.jsonl")), cache_dir=str(folder / "cache")),
        test_split="test",
        doc_to_text="Question: {{question}}\nAnswer:",
    )
    choice = dict(
        task="letters",
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[dict(metric=metric, aggregation="mean", higher_is_better=True) for metric in ("acc", "acc_norm")],
    )
    said = dict(
        task="said",
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs=dict(until=["z"], max_gen_toks=5, do_sample=False),
        metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
    )
    for task in (choice, said):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    return folder


def run(row, tasks: Path, *names: str, **options) -> dict:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(row, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)


def samples(found: dict, task: str) -> list[dict]:
    return sorted(found["samples"][task], key=lambda each: each["doc_id"])


def scores_of(found: dict) -> list[list[float]]:
    """Log-likelihoods of each question's answers."""
    return [[float(each[0][0]) for each in sample["resps"]] for sample in samples(found, "letters")]


@pytest.fixture(scope="module")
def model():
    return tiny.thinking_model("llama", thought_tokens=3, ahead_tokens=2)


@torch.no_grad()
def plain_score(model, request: Request, think: bool) -> float:
    """The sum of log-probabilities of a continuation, by a pass for every token and thought."""
    total = 0.0
    edges = torch.tensor([model.qstar.start_token_id, model.qstar.end_token_id])
    for place, token in enumerate(request.continuation):
        text = torch.tensor(request.context + request.continuation[:place])
        state = reference.hidden_states(model, text)[-1]
        if think:
            whole = torch.cat([text, edges[:1], greedy_thought(model, text), edges[1:]])
            state = reference.mix(model, state, reference.hidden_states(model, whole)[-1])
        total += float(reference.logits(model, state).log_softmax(-1)[token])
    return total


def prompts() -> list[str]:
    return [f"Question: {each['question']}\nAnswer:" for each in documents()]


@pytest.mark.parametrize("think", [False, True])
def test_accuracy_is_that_of_plain_logits_and_of_our_own_evaluation(model, tasks, think):
    """To the last digit, and so is accuracy by length; every log-likelihood agrees as far as it is rounded."""
    tokenizer, thoughts = tiny.tokenizer(), "own" if think else None
    found = run(QuietStarLM(model, tokenizer=tokenizer, batch_size=5, think=think), tasks, "letters")
    results = found["results"]["letters"]
    harness = results["acc,none"], results["acc_norm,none"]

    pairs = [
        (text, f" {choice}") for text, each in zip(prompts(), documents(), strict=True) for choice in each["choices"]
    ]
    plain = torch.tensor([plain_score(model, encode(tokenizer, *pair), think) for pair in pairs]).view(ASKED, 3)
    torch.testing.assert_close(torch.tensor(scores_of(found)), plain, rtol=1e-4, atol=1e-5)
    right = torch.tensor([each["label"] for each in documents()])
    lengths = torch.tensor([[len(choice) for choice in each["choices"]] for each in documents()])
    by_sum, by_length = (int((each.argmax(1) == right).sum()) / ASKED for each in (plain, plain / lengths))
    assert harness == (by_sum, by_length)

    questions = [
        Question(each["question"], "ABC"[each["label"]], (*each["choices"],), (*"ABC",)) for each in documents()
    ]
    task = Task("letters", Letters(3), compares_choices=True)
    answers = dict(answer_directly(model, tokenizer, task, questions, thoughts=thoughts, batch_size=7))
    ours = [answers[place] for place in range(ASKED)]
    by_ours = torch.tensor([each.detail["log_likelihoods"] for each in ours])
    torch.testing.assert_close(torch.tensor(scores_of(found)), by_ours, rtol=1e-5, atol=1e-5)
    row = Row("ours", tuple(ours), {})
    assert harness == (row.mean("accuracy").value, sum(each.detail["right_by_length"] for each in ours) / ASKED)


def test_thoughts_change_what_is_found(model, tasks):
    found = [
        scores_of(run(QuietStarLM(model, tokenizer=tiny.tokenizer(), think=think), tasks, "letters"))
        for think in (False, True)
    ]
    assert not torch.allclose(*map(torch.tensor, found), atol=1e-2)


def test_whether_greedy_decoding_would_say_it_is_told(model):
    row = QuietStarLM(model, tokenizer=tiny.tokenizer(), think=True)
    context = [5, 9, 11]
    said = model.generate(torch.tensor([context]), think=True, max_new_tokens=2, do_sample=False, eos_token_id=None)
    right = said[0, 3:].tolist()
    wrong = [right[0], 4 if right[1] != 4 else 5]
    found = row._loglikelihood_tokens([(("", ""), context, each) for each in (right, wrong)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_a_model_that_never_learned_to_think_fares_as_with_the_harness_own_class(tasks):
    model = tiny.plain_model("llama")
    ours, theirs = (
        run(kind(model, tokenizer=tiny.tokenizer(), batch_size=4), tasks, "letters", "said")
        for kind in (QuietStarLM, HFLM)
    )
    assert ours["results"] == theirs["results"]
    torch.testing.assert_close(torch.tensor(scores_of(ours)), torch.tensor(scores_of(theirs)), rtol=1e-5, atol=1e-6)
    assert [each["resps"] for each in samples(ours, "said")] == [each["resps"] for each in samples(theirs, "said")]
    assert ours["config"]["think"] is False and "thought_tokens" not in ours["config"]


@pytest.mark.parametrize("think", [False, True])
def test_generated_text_is_that_of_generate(model, tasks, think):
    tokenizer = tiny.tokenizer()
    row = QuietStarLM(model, tokenizer=tokenizer, batch_size=5, think=think)
    found = run(row, tasks, "said")
    expected = []
    for text in prompts():
        prompt = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(prompt, think=think, max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split("z")[0])
    assert [each["resps"][0][0] for each in samples(found, "said")] == expected
    assert len(set(expected)) > 3
    right = sum(each == "b" for each in expected)
    assert found["results"]["said"]["exact_match,none"] == right / ASKED


def test_repeats_of_a_request_think_differently_and_the_same_each_time(model):
    """Of greedy text, which is otherwise the same each time; the first repeat has the thoughts of the seed."""
    row = QuietStarLM(
        model, tokenizer=tiny.tokenizer(), think=True, thought_temperature=3.0, thought_seed=5, batch_size=4
    )
    options = dict(until=["z"], max_gen_toks=8, do_sample=False)
    requests = [SimpleNamespace(args=(context, options)) for context in ("a b c", "d e") for _ in range(4)]
    said = row.generate_until(requests, disable_tqdm=True)
    assert row.generate_until(requests, disable_tqdm=True) == said
    assert len(set(said[:4])) > 1 and len(set(said[4:])) > 1
    assert row.generate_until(requests[::4], disable_tqdm=True) == said[::4]
    row.thought_temperature = 0.0
    said = row.generate_until(requests, disable_tqdm=True)
    assert len(set(said[:4])) == len(set(said[4:])) == 1


def test_a_rolling_log_likelihood_thinks_at_every_token(model):
    row = QuietStarLM(model, tokenizer=tiny.tokenizer(), think=True)
    [found] = row.loglikelihood_rolling([SimpleNamespace(args=("a b c d e",))], disable_tqdm=True)
    assert found == pytest.approx(plain_score(model, Request([1], [4, 5, 6, 7, 8]), think=True), rel=1e-5)


def test_a_long_context_loses_its_beginning_and_leaves_room_for_a_thought(model):
    row = QuietStarLM(model, tokenizer=tiny.tokenizer(), think=True)
    assert row.max_length == 128 - 5
    long = tiny.text(1, 200)[0].tolist()
    [found] = row._loglikelihood_tokens([(None, long, [7, 8])], disable_tqdm=True)
    [(_, expected)] = score_requests(model, [Request(long[-122:], [7, 8])])
    assert found[0] == pytest.approx(float(expected.log_prob.sum()), rel=1e-6)
    with pytest.raises(ValueError, match="a continuation has 130 tokens, but there is room for 123"):
        row._loglikelihood_tokens([(None, [4], long[:130])], disable_tqdm=True)
    assert QuietStarLM(model, tokenizer=tiny.tokenizer(), think=False).max_length == 128


def test_folders_of_every_kind_are_loaded(tmp_path, tasks):
    """One that thinks, one with adapters, and one of a base; a folder that has learned to think does so by default."""
    folder = tiny_folder.thinking_folder(tmp_path / "thinking")
    base = tiny_folder.base_folder(tmp_path / "base")
    adapted, tokenizer = AutoModelForCausalLM.from_pretrained(base), tiny.tokenizer()
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"]))
    adapted = wrap(adapted, tokenizer, thought_tokens=2, check=False)
    for each in (adapted, tokenizer):
        each.save_pretrained(tmp_path / "adapted")
    for path, thinks, same in (
        (folder, True, qstar.load(folder)[0]),
        (tmp_path / "adapted", False, adapted),
        (base, False, AutoModelForCausalLM.from_pretrained(base)),
    ):
        row = QuietStarLM(path, batch_size=4)
        assert row.thinks is thinks
        tokenizer = row.tokenizer
        again = QuietStarLM(same, tokenizer=tokenizer, batch_size=4)
        requests = [(None, [5, 6, 7], [8, 9])]
        assert row._loglikelihood_tokens(requests, True) == again._loglikelihood_tokens(requests, True)
    with pytest.raises(ValueError, match="attn_implementation is 'eager', but the folder of a model that thinks"):
        QuietStarLM(folder, attn_implementation="eager")


def test_what_is_run_says_how_the_model_thought(model, tasks):
    row = QuietStarLM(model, tokenizer=tiny.tokenizer(), thought_temperature=0.5, thought_seed=9)
    config = run(row, tasks, "letters", limit=2)["config"]
    wanted = dict(think=True, thought_tokens=3, ahead_tokens=2, thought_temperature=0.5, thought_seed=9)
    assert {name: config[name] for name in wanted} == wanted and config["qstar_version"] == qstar.__version__


def test_what_would_have_no_effect_is_refused(model):
    for options, what in (
        (dict(batch_size="auto"), "batch_size is 'auto', but it must be a number"),
        (dict(softmax_dtype="float32"), "softmax_dtype is 'float32'"),
        (dict(backend="seq2seq"), "is a seq2seq model"),
    ):
        with pytest.raises(ValueError, match=what):
            QuietStarLM(model, tokenizer=tiny.tokenizer(), **options)
    with pytest.raises(ValueError, match="think is True, but LlamaForCausalLM never learned to think"):
        QuietStarLM(tiny.plain_model("llama"), tokenizer=tiny.tokenizer(), think=True)


def test_our_door_runs_tasks_with_and_without_thoughts(model, tasks):
    tokenizer = tiny.tokenizer()
    model.train()
    results = evaluate_with_harness(model, tokenizer, find_harness_tasks(["letters"], tasks), batch_size=4, limit=9)
    assert model.training
    model.eval()
    assert list(results) == [WITHOUT, OWN_THOUGHTS]
    for name, think in ((WITHOUT, False), (OWN_THOUGHTS, True)):
        alone = run(QuietStarLM(model, tokenizer=tokenizer, think=think), tasks, "letters", limit=9)
        assert results[name]["results"]["letters"]["acc,none"] == alone["results"]["letters"]["acc,none"]
        assert results[name]["config"]["think"] is think
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    header, _, first, second = harness_table(results).splitlines()
    assert header.split() == ["lm-evaluation-harness", *WITHOUT.split(), *OWN_THOUGHTS.split()]
    assert first.startswith("letters, acc ") and second.startswith("letters, acc_norm ")
    shown = [f"{each['results']['letters']['acc,none']:.4f}" for each in results.values()]
    assert [first.split()[2], first.split()[5]] == shown


def test_tasks_are_named_by_name_pattern_or_file(tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    assert found_tasks(manager, ["letters", "s*", "*"]) == ["letters", "said", "letters", "said"]
    assert found_tasks(manager, [str(tasks / "said.yaml")]) == [str(tasks / "said.yaml")]
    with pytest.raises(ValueError, match="tasks name 'no_such_task', but the harness has no such task"):
        found_tasks(manager, ["letters", "no_such_task"])


def test_the_harness_is_told_of_our_class():
    project = Path(__file__).parents[3] / "pyproject.toml"
    [line] = [line for line in project.read_text().splitlines() if line.startswith('qstar = "qstar.evaluation')]
    module, _, name = line.split('"')[1].partition(":")
    assert getattr(import_module(module), name) is QuietStarLM


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="the extra eval, but lm_eval is not installed: pip install lm-eval"):
        find_harness_tasks(["letters"])
