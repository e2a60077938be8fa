"""``qstar chat``: answers are those of a chat that is read afresh each time, however many turns it has."""

from __future__ import annotations

import io

import pytest
import tiny_folder
import torch

from qstar import load
from qstar.commands.chat import HELP, chat, typed_lines
from qstar.commands.main import main
from qstar.generation.settings import GenerationSettings
from qstar.prompting.conversation import Conversation
from qstar.prompting.settings import ChatSettings

# As some templates do, it leaves out what the assistant said in earlier turns.
FORGETFUL = "{% for m in messages if m.role != 'assistant' %}{{ m.role[0] }} {{ m.content }} {% endfor %}a"
REFUSING = "{{ raise_exception('only one message is known') if messages|length > 1 }}a b c"
TURNS = ["b c d", "k", "x y z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.thinking_folder(tmp_path_factory.mktemp("chat") / "model", tiny_folder.TEMPLATE)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


def conversation(loaded, *, template: str | None = None, decoding: dict | None = None, **options) -> Conversation:
    model, tokenizer = loaded
    if template is not None:
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
        tokenizer.chat_template = template
    settings = options.pop("settings", GenerationSettings())
    return Conversation(
        model, tokenizer, settings, ChatSettings(**(dict(max_new_tokens=6) | (decoding or {}))), **options
    )


def read_afresh(talk: Conversation, messages: list[dict[str, str]], **arguments) -> str:
    """The answer to messages without a cache."""
    written = talk.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = talk.tokenizer(written, return_tensors="pt").input_ids
    whole = talk.model.generate(ids, **(dict(max_new_tokens=6) | arguments))[0]
    return talk.tokenizer.decode(whole, skip_special_tokens=True).removeprefix(" ".join(written.split()))


@pytest.mark.parametrize("think", [None, False])
@pytest.mark.parametrize(
    ("template", "goes_on"), [(None, True), (FORGETFUL, False)], ids=["text that goes on", "text that is changed"]
)
def test_every_answer_is_that_of_the_chat_read_afresh(loaded, think, template, goes_on):
    talk = conversation(loaded, template=template, settings=GenerationSettings(think=think), system="s q")
    length, answers = 0, []
    for turn in TURNS:
        pieces: list[str] = []
        answers.append(talk.answer(turn, pieces.append))
        assert "".join(pieces) == answers[-1] == read_afresh(talk, talk.messages[:-1], think=think)
        assert talk.known == (length if goes_on else 0)
        length = talk._past.get_seq_length()
    contents = [message["content"] for message in talk.messages]
    assert contents == ["s q", *(text for pair in zip(TURNS, answers, strict=True) for text in pair)]
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 3]
    assert len(set(answers)) > 1


def test_flags_of_decoding_and_thinking_reach_the_answers(loaded):
    settings = GenerationSettings(think_when="every:2", thought_tokens=2)
    talk = conversation(loaded, settings=settings, decoding=dict(max_new_tokens=9, repetition_penalty=4.0))
    talk.answer(TURNS[0], str)
    given = dict(max_new_tokens=9, repetition_penalty=4.0, think_when="every:2", thought_tokens=2)
    assert talk.answer(TURNS[1], str) == read_afresh(talk, talk.messages[:-1], **given)
    assert read_afresh(talk, talk.messages[:-1]) != read_afresh(talk, talk.messages[:-1], **given)


def said(talk: Conversation, lines: list[str]) -> str:
    pieces: list[str] = []
    chat(talk, iter(lines), pieces.append)
    return "".join(pieces)


def test_commands_are_obeyed_between_answers(loaded):
    talk = conversation(loaded, system="s")
    start = [{"role": "system", "content": "s"}]
    user = {"role": "user", "content": "h i"}
    thinking, base = (read_afresh(talk, [*start, user], think=think) for think in (True, False))
    assert thinking != base
    lines = [
        "h i\n",
        "\n",
        "/think off\n",
        "/reset\n",
        "h i\n",
        "/think on\n",
        "/reset\n",
        "  h i\n",
        "/quit\n",
        "k",
    ]
    assert said(talk, lines).splitlines() == [
        thinking,
        "thinking is off",
        "the chat begins anew",
        base,
        "thinking is on",
        "the chat begins anew",
        thinking,
    ]
    assert talk.messages == [*start, user, {"role": "assistant", "content": thinking}]


def test_thoughts_are_shown_and_hidden_again(loaded):
    talk = conversation(loaded)
    model, tokenizer = loaded
    ids = tokenizer("u k a", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, output_thoughts=True)
    words = tokenizer.convert_ids_to_tokens(output.sequences[0, 3:])
    thoughts = zip(tokenizer.batch_decode(output.thoughts[0]), output.thought_weights[0].tolist(), words, strict=True)
    shown = "".join(f"⟨{text} | {weight:.2f}⟩ {word}" for text, weight, word in thoughts)
    hidden = "".join(f" {word}" for word in words)
    lines = ["/thoughts on", "k", "/reset", "/thoughts off", "k"]
    expected = ["thoughts are shown", shown, "the chat begins anew", "thoughts are hidden", hidden]
    assert said(talk, lines).splitlines() == expected
    assert talk.messages[-1]["content"] == hidden


def test_settings_of_thoughts_come_back_with_them(loaded):
    settings = GenerationSettings(thought_tokens=1, thought_seed=3, thought_temperature=1.5)
    talk = conversation(loaded, settings=settings)
    given = dict(thought_tokens=1, thought_seed=3, thought_temperature=1.5)
    first = read_afresh(talk, [{"role": "user", "content": "k"}], **given)
    base = read_afresh(talk, [{"role": "user", "content": "k"}], think=False)
    out = said(talk, ["/think off", "k", "/reset", "/think on", "k"]).splitlines()
    assert (out[1], out[-1]) == (base, first)


def test_an_interrupted_answer_stands_as_far_as_it_was_said(loaded):
    talk = conversation(loaded)
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    whole = read_afresh(talk, [{"role": "user", "content": "b c d"}])
    chat(talk, ["b c d", "k"], write)
    cut = talk.messages[1]["content"]
    assert cut == "".join(f" {word}" for word in whole.split()[:3])
    assert "".join(pieces) == f"{cut} (stopped)\n{talk.messages[3]['content']}\n"
    assert talk.messages[3]["content"] == read_afresh(talk, talk.messages[:3])
    assert talk.known == 0, "a cache that was left in the middle is not used"


def test_a_chat_that_outgrows_the_model_or_is_refused_goes_on_after_a_reset(loaded):
    talk = conversation(loaded)
    first = read_afresh(talk, [{"role": "user", "content": "k"}])
    out = said(talk, ["k", "b " * 120, "/reset", "k"]).splitlines()
    assert out[0] == out[3] == first
    assert out[1].startswith("131 tokens are given and max_new_tokens is 6, but 136 text tokens and 5 tokens of a")
    assert out[1].endswith("(/reset begins anew)")
    refused = conversation(loaded, template=REFUSING)
    out = said(refused, ["k", "k"]).splitlines()
    assert out[1] == "the tokenizer's chat template refuses: only one message is known (/reset begins anew)"
    assert len(refused.messages) == 2, "the messages are as they were"


def test_help_and_unknown_commands(loaded):
    out = said(conversation(loaded), ["/help", "/think", "/thoughts maybe"])
    assert out == HELP + "'/think' is no command: /help lists them\n'/thoughts maybe' is no command: /help lists them\n"


def test_the_command_reads_lines_and_flags(folder, loaded, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("b c d\nk\n"))
    flags = ["--system", "s", "--max-new-tokens", "5", "--show-thoughts", "--drafts", "0"]
    assert main(["chat", str(folder), *flags]) == 0
    talk = conversation(loaded, system="s", decoding=dict(max_new_tokens=5), show_thoughts=True)
    pieces: list[str] = []
    chat(talk, ["b c d", "k"], pieces.append)
    assert capsys.readouterr().out == "".join(pieces)


def test_sampled_answers_have_a_seed(folder, capsys, monkeypatch):
    made, flags = [], ["--max-new-tokens", "9", "--do-sample", "--temperature", "9"]
    for seed in "778":
        torch.rand(3)  # the seed does not depend on what was drawn before
        monkeypatch.setattr("sys.stdin", io.StringIO("b c d\n"))
        assert main(["chat", str(folder), *flags, "--seed", seed]) == 0
        made.append(capsys.readouterr().out)
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no-think --show-thoughts", "show_thoughts is given, but think is False"),
        ("--no-think --thought-seed 3", "thought_seed is given, but think is False"),
        ("--top-p 0.5", "top_p is 0.5, but no tokens are sampled"),
        ("--max-new-tokens 0", "max_new_tokens is 0, but it must be an integer of at least 1"),
    ],
)
def test_what_would_have_no_effect_is_refused_before_the_first_answer(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("sys.stdin", io.StringIO("b c d\n"))
    assert main(["chat", str(folder), *flags.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith(f"qstar chat: {message}")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, capsys):
    folder = tiny_folder.thinking_folder(tmp_path / "model")
    assert main(["chat", str(folder)]) == 1
    assert "tokenizer.chat_template is not set, but a chat must be written in one" in capsys.readouterr().err


def test_typing_ends_with_the_input_and_not_with_an_interruption(monkeypatch, capsys):
    typed = iter(["a b", KeyboardInterrupt, "c", EOFError])

    def type_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    assert list(typed_lines()) == ["a b", "c"]
