"""``qstar generate``: what it prints and writes is what ``model.generate`` returns, for every flag."""

from __future__ import annotations

import io
import json
import re

import pytest
import tiny_folder
import torch
from transformers import set_seed

from qstar import load
from qstar.commands import generate
from qstar.commands.flags import takes_codes
from qstar.commands.main import main

PROMPT = "c a b d e"
PROMPTS = [PROMPT, "a", "h i j k l m n o p", "b b", "c a b d f"]
PLAIN = dict(max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.thinking_folder(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def command(folder, capsys):
    """Runs the command on the folder: its exit code, what it printed, and the last line of what it said beside."""

    def run(*flags: str, tokens: int | None = 8) -> tuple[int, str, str]:
        limit = [] if tokens is None else ["--max-new-tokens", str(tokens)]
        code = main(["generate", str(folder), *limit, *flags])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()[-1]

    return run


def generated(loaded, prompt: str = PROMPT, **arguments):
    """What ``model.generate`` returns for one prompt."""
    model, tokenizer = loaded
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return model.generate(ids, return_dict_in_generate=True, **(PLAIN | arguments))


def text_of(loaded, prompt: str = PROMPT, row: int = 0, **arguments) -> str:
    """The continuation, decoded."""
    whole = loaded[1].decode(generated(loaded, prompt, **arguments).sequences[row], skip_special_tokens=True)
    assert whole.startswith(prompt)
    return whole.removeprefix(prompt)


def test_one_prompt_is_continued_as_by_generate_piece_by_piece(command, loaded, monkeypatch):
    pieces = []
    monkeypatch.setattr(generate, "write_out", pieces.append)
    code, out, line = command("--prompt", PROMPT)
    expected = generated(loaded)
    assert (code, out) == (0, "\n")
    said = expected.sequences[0, 5:]
    assert len(said) == 8
    assert pieces == [" " + word for word in loaded[1].convert_ids_to_tokens(said)], "each token as it comes"
    thinking = expected.thinking
    assert line == (
        f"thought before 100.0% of 8 tokens, in {thinking.passes} passes; "
        f"{thinking.accepted / thinking.drafted:.1%} of {thinking.drafted} guesses right"
    )


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("", {}),
        ("--no-think", dict(think=False)),
        ("--think --think-when every:2", dict(think=True, think_when="every:2")),
        ("--thought-tokens 1", dict(thought_tokens=1)),
        ("--thought-temperature 2 --thought-seed 5", dict(thought_temperature=2.0, thought_seed=5)),
        ("--do-sample --temperature 3 --seed 4", dict(do_sample=True, temperature=3.0, seed=4)),
        ("--do-sample --temperature 3 --seed 5", dict(do_sample=True, temperature=3.0, seed=5)),
        ("--do-sample --temperature 9 --top-k 2", dict(do_sample=True, temperature=9.0, top_k=2, seed=0)),
        ("--do-sample --temperature 9 --top-p .4", dict(do_sample=True, temperature=9.0, top_p=0.4, seed=0)),
        ("--do-sample --temperature 9 --min-p .6", dict(do_sample=True, temperature=9.0, min_p=0.6, seed=0)),
        ("--repetition-penalty 5", dict(repetition_penalty=5.0)),
        ("--num-beams 3", dict(num_beams=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_flag_has_the_effect_of_its_argument(command, loaded, flags, arguments):
    code, out, _ = command("--prompt", PROMPT, *flags.split())
    if (seed := arguments.pop("seed", None)) is not None:
        set_seed(seed)
    expected = text_of(loaded, **arguments)
    streamed = "num_beams" not in arguments
    assert (code, out) == (0, f"{expected}\n" if streamed else f"{PROMPT}{expected}\n")
    if flags:
        assert expected != text_of(loaded), "the argument changes the text"


def test_drafts_save_passes_and_leave_the_text(command, loaded):
    _, out, line = command("--prompt", PROMPT, "--drafts", "0")
    passes = generated(loaded, drafts=0).thinking.passes
    assert out == f"{text_of(loaded)}\n"
    assert line == f"thought before 100.0% of 8 tokens, in {passes} passes; no guesses"


def test_a_stop_text_ends_the_continuation_and_stays_in_it(command, loaded):
    words = text_of(loaded).split()
    stop = next(word for word in words if word != words[0])
    _, out, line = command("--prompt", PROMPT, "--stop", stop, "--stop", "never said", tokens=None)
    assert out.split() == words[: words.index(stop) + 1]
    assert re.match(rf"thought before 100.0% of {len(out.split())} tokens, ", line)


def test_a_stop_text_in_the_prompt_ends_nothing(command, loaded):
    stop = next(word for word in PROMPT.split() if word not in text_of(loaded))
    assert command("--prompt", PROMPT, "--stop", stop)[1] == f"{text_of(loaded)}\n"


def test_a_stop_text_ends_a_row_of_a_batch_where_it_ends_it_alone(command, loaded, tmp_path):
    """Also where the rest of the row is filled with the token that ends a text."""
    model, _ = loaded
    stop = text_of(loaded).split()[1]
    flags = ["--prompt", PROMPT, "--prompt", "a", "--stop", f" {stop}", "--output", str(tmp_path / "made.jsonl")]
    lengths = []
    for padding in (model.generation_config.pad_token_id, model.generation_config.eos_token_id):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "ready_model", lambda folder: loaded)
            patch.setattr(model.generation_config, "pad_token_id", padding)
            assert command(*flags, "--show-thoughts")[0] == 0
        rows = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
        for row in rows:
            words = text_of(loaded, row["prompt"]).split()
            alone = words[: words.index(stop) + 1] if stop in words else words
            assert row["text"].split() == alone
            assert [thought is not None for thought in row["thoughts"]] == [True] * len(alone)
        lengths.append([len(row["thoughts"]) for row in rows])
    assert lengths[0] == lengths[1] and lengths[0][0] == 2 < lengths[0][1], "one row ends before the other"


def test_several_prompts_are_printed_in_their_order_with_their_continuations(command, loaded):
    flags = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    _, out, _ = command(*flags, "--batch-size", "2")
    assert out.splitlines() == [prompt + text_of(loaded, prompt) for prompt in PROMPTS]


def test_several_continuations_of_a_prompt_follow_each_other(command, loaded):
    flags = ["--num-beams", "3", "--num-return-sequences", "2"]
    _, out, _ = command("--prompt", PROMPT, "--prompt", "b b", *flags)
    expected = [
        prompt + text_of(loaded, prompt, row, num_beams=3, num_return_sequences=2)
        for prompt in (PROMPT, "b b")
        for row in (0, 1)
    ]
    assert out.splitlines() == expected and len(set(expected)) == 4


@pytest.mark.parametrize("beams", [1, 2])
def test_shown_thoughts_are_those_that_generate_returns(command, loaded, beams):
    _, out, _ = command("--prompt", PROMPT, "--show-thoughts", "--num-beams", str(beams))
    expected = generated(loaded, output_thoughts=True, num_beams=beams)
    tokenizer = loaded[1]
    words = tokenizer.convert_ids_to_tokens(expected.sequences[0, 5:])
    thoughts = tokenizer.batch_decode(expected.thoughts[0])
    weights = expected.thought_weights[0].tolist()
    parts = [f"⟨{t} | {w:.2f}⟩ {word}" for t, w, word in zip(thoughts, weights, words, strict=True)]
    assert out == ("" if beams == 1 else PROMPT) + "".join(parts) + "\n"


def test_no_thought_is_shown_where_there_was_none(command, loaded):
    _, out, line = command("--prompt", PROMPT, "--show-thoughts", "--think-when", "every:4")
    pieces = re.findall(r"(⟨[^⟩]+⟩)? (\w)", out)
    # Positions 4 to 11 of the text are predicted from; those that are a multiple of 4 are thought at.
    assert [bool(thought) for thought, _ in pieces] == [True, False, False, False] * 2
    assert "".join(f" {word}" for _, word in pieces) == text_of(loaded, think_when="every:4")
    assert line.startswith("thought before 25.0% of 8 tokens, ")


def test_a_batch_says_and_thinks_what_each_prompt_does_alone(command, loaded, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    made = []
    for size in ("1", "3"):
        path = tmp_path / f"{size}.jsonl"
        flags = ["--prompts", str(tmp_path / "prompts.txt"), "--batch-size", size, "--output", str(path)]
        _, out, line = command(*flags, "--show-thoughts", tokens=12)
        assert out == f"written to {path}\n"
        made.append([json.loads(row) for row in path.read_text().splitlines()])
        said = sum(len(row["thoughts"]) for row in made[-1])
        assert line.startswith(f"thought before 100.0% of {said} tokens, ")
        if size == "1":
            each = [generated(loaded, prompt, max_new_tokens=12).thinking for prompt in PROMPTS]
            passes, drafted, accepted = (
                sum(getattr(one, name) for one in each) for name in ("passes", "drafted", "accepted")
            )
            assert line.endswith(f" in {passes} passes; {accepted / drafted:.1%} of {drafted} guesses right")
    assert [row["prompt"] for row in made[0]] == PROMPTS
    for alone, together in zip(*made, strict=True):
        for record in (*alone["thoughts"], *together["thoughts"]):
            record["weight"] = pytest.approx(record["weight"], abs=1e-4)
        assert alone == together


def test_lines_of_json_hold_the_text_and_every_thought(command, loaded, tmp_path):
    path = tmp_path / "made.jsonl"
    command("--prompt", PROMPT, "--prompt", "b b", "--output", str(path), "--show-thoughts")
    tokenizer = loaded[1]
    for row, prompt in zip(map(json.loads, path.read_text().splitlines()), (PROMPT, "b b"), strict=True):
        expected = generated(loaded, prompt, output_thoughts=True)
        thoughts = tokenizer.batch_decode(expected.thoughts[0])
        weights = expected.thought_weights[0].tolist()
        assert row == {
            "prompt": prompt,
            "text": text_of(loaded, prompt),
            "thoughts": [
                {"text": text, "weight": pytest.approx(weight, abs=1e-4)}
                for text, weight in zip(thoughts, weights, strict=True)
            ],
        }


def test_answers_are_compared_with_continuations(command, loaded, tmp_path):
    texts = [text_of(loaded, prompt, max_new_tokens=2) for prompt in PROMPTS]
    answers = [texts[0], f"{texts[1].strip()}\n", texts[2] + "x", "", texts[4].strip()]
    rows = [{"question": p, "other": 1, "right one": a} for p, a in zip(PROMPTS, answers, strict=True)]
    file, made = tmp_path / "problems.jsonl", tmp_path / "made.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", str(file), "--prompt-column", "question", "--answer-column", "right one"]
    _, out, _ = command(*flags, tokens=2)
    lines = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert out.splitlines() == [*lines, "accuracy 60.0% (3 of 5)"]
    _, out, _ = command(*flags, "--output", str(made), tokens=2)
    assert out.splitlines() == ["accuracy 60.0% (3 of 5)", f"written to {made}"]
    right = [True, True, False, False, True]
    expected = [
        {"prompt": p, "text": t, "answer": a, "right": r}
        for p, t, a, r in zip(PROMPTS, texts, answers, right, strict=True)
    ]
    assert [json.loads(line) for line in made.read_text().splitlines()] == expected


def test_a_column_named_answer_is_compared_without_being_asked_for(command, loaded, tmp_path):
    file = tmp_path / "problems.json"
    file.write_text(json.dumps([{"prompt": PROMPT, "answer": text_of(loaded)}]))
    _, out, _ = command("--prompts", str(file))
    assert out.splitlines() == [text_of(loaded), "accuracy 100.0% (1 of 1)"]
    file.write_text(json.dumps([{"prompt": PROMPT}]))
    _, out, _ = command("--prompts", str(file))
    assert out.splitlines() == [text_of(loaded)]


def test_lines_of_the_standard_input_are_prompts(command, loaded, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\nb b\n"))
    assert command()[1].splitlines() == [prompt + text_of(loaded, prompt) for prompt in (PROMPT, "b b")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_alone_is_no_prompt_and_takes_escape_codes_unless_told_otherwise(command, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert takes_codes(Terminal()) and not takes_codes(io.StringIO())
    monkeypatch.setattr("sys.stdin", Terminal())
    code, _, error = command()
    assert code == 1 and error.endswith("--prompts FILE, or a prompt a line on the standard input")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_codes(Terminal())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt a --prompts x.txt", "prompt and prompts both say what to continue"),
        ("--prompt a --prompt-column x", "prompt_column is 'x', but there is no file of prompts"),
        ("--prompts missing.txt", "prompts is 'missing.txt', but there is no such file"),
        ("--prompt a --batch-size 0", "batch_size is 0, but it must be at least 1"),
        ("--prompt a --temperature 2", "temperature is 2.0, but no tokens are sampled"),
        ("--prompt a --seed 2", "seed is 2, but no tokens are sampled"),
        ("--prompt a --no-do-sample --top-k 2", "top_k is 2, but no tokens are sampled"),
        ("--prompt a --num-beams 0", "num_beams is 0, but it must be an integer of at least 1"),
        ("--prompt a --no-think --thought-seed 2", "thought_seed is given, but think is False"),
        ("--prompt a --no-think --show-thoughts", "show_thoughts is given, but think is False"),
        ("--prompt a --think-when never --show-thoughts", "show_thoughts is given, but think_when is 'never'"),
        ("--prompt a --think-when now", "think_when is 'now', but it must be 'always'"),
        ("--prompt a --drafts 2 --num-beams 2", "drafts is given, but no tokens can be guessed: num_beams is 2"),
        ("--prompt a --stop=", "stop is '', but it must be a text"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_what_cannot_be_or_has_no_effect_is_refused(command, flags, message):
    code, out, error = command(*flags.split())
    assert (code, out) == (1, "")
    assert error.startswith(f"qstar generate: {message}")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 2 is '', but it must have at least one token"),
        ("a b quiet c", "prompt 2 holds 'quiet', which the tokenizer does not know"),
        ("a " * 125, "prompt 2: 125 tokens are given and max_new_tokens is 8, but 132 text tokens and 5 tokens of a"),
    ],
    ids=["empty", "unknown word", "too long"],
)
def test_a_prompt_that_cannot_be_continued_is_named_by_its_number(command, tmp_path, prompt, message):
    (tmp_path / "made.jsonl").write_text("kept")
    code, out, error = command("--prompt", "a", "--prompt", prompt, "--output", str(tmp_path / "made.jsonl"))
    assert (code, out) == (1, "")
    assert error.startswith(f"qstar generate: {message}")
    assert (tmp_path / "made.jsonl").read_text() == "kept", "all prompts are checked before anything is written"


def test_without_thoughts_a_prompt_may_fill_all_positions(command):
    flags = ["--prompt", "a " * 121]
    assert command(*flags, "--no-think")[0] == 0
    assert command(*flags)[0] == 1
    assert "129 text tokens and 0 tokens" in command("--prompt", "a " * 122, "--no-think")[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a", "p.csv', but a file must end in .jsonl, .json, .txt"),
        ("p.txt", "", "p.txt holds no prompts"),
        ("p.txt", "a\n\nb\n", "prompt 2 is '', but it must have at least one token"),
        ("p.jsonl", "", "p.jsonl holds no rows"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl, line 1 has no column 'prompt', but 'text'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl, line 2: column 'prompt' holds the number 3"),
        (
            "p.jsonl",
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n',
            "p.jsonl, line 2 has no column 'answer', but 'prompt'",
        ),
        (
            "p.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}]}\n',
            "p.jsonl, row 1: column 'prompt' holds a chat, but it must hold text",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(command, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    code, out, error = command("--prompts", str(tmp_path / name))
    assert (code, out) == (1, "")
    assert message in error


def test_columns_of_a_file_without_columns_are_refused(command, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    error = command("--prompts", str(tmp_path / "p.txt"), "--answer-column", "x")[2]
    assert error.startswith("qstar generate: answer_column is 'x', but '") and error.endswith("lines and no columns")


def test_a_model_that_has_not_learned_to_think_says_so(tmp_path, capsys):
    folder = tiny_folder.thinking_folder(tmp_path / "model", mixing=False)
    assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "3 tokens without thoughts"
    assert main(["generate", str(folder), "--prompt", "a", "--show-thoughts"]) == 1
    assert "the mixing head has not been trained" in capsys.readouterr().err


def test_what_fills_a_row_after_its_end_is_not_shown(command, loaded, tmp_path):
    """Rows of a batch end at different places, each as it does alone, and the end of a text is a token of it."""
    model, tokenizer = loaded
    end = tokenizer.convert_tokens_to_ids(text_of(loaded).split()[2])
    config = model.generation_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "ready_model", lambda folder: loaded)
        patch.setattr(config, "eos_token_id", [end])
        path = tmp_path / "made.jsonl"
        command("--prompt", PROMPT, "--prompt", "a", "--output", str(path), "--show-thoughts")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            said = generated(loaded, row["prompt"]).sequences[0, len(row["prompt"].split()) :]
            assert len(row["thoughts"]) == len(said) == len(row["text"].split())
    lengths = [len(row["thoughts"]) for row in rows]
    assert lengths[0] == 3 and lengths[1] != 3, "one row ends before the other"
    assert torch.equal(said[-1], torch.tensor(end)) == (lengths[1] < 8)
