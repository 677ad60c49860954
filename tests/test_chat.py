"""A conversation: what the model is asked, what is kept, and what reaches the terminal."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from peftlab.chat.session import DEFAULT, Session, transcript
from peftlab.chat.terminal import Terminal
from peftlab.data.records import Message
from peftlab.models.backbone import load_backbone
from peftlab.recipes.tools import open_chat
from peftlab.sampling.sampler import Decoding, Sampler

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny.causal_folder(tmp_path_factory.mktemp("chat") / "gpt2"))


@pytest.fixture(scope="module")
def sampler(folder) -> Sampler:
    backbone = load_backbone(folder, device="cpu")
    return Sampler(backbone.model, backbone.tokenizer)


@pytest.fixture
def templated(sampler, monkeypatch) -> Sampler:
    """The same model, asked by a chat template."""
    monkeypatch.setattr(sampler.tokenizer, "chat_template", TEMPLATE)
    return sampler


@pytest.fixture
def session(sampler) -> Session:
    return Session(sampler, Decoding(max_new_tokens=8, temperature=0.8, top_p=0.95))


class Keyboard:
    """Lines that are typed; an exception among them is raised; then the end of input."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = [*lines, EOFError()]

    def __call__(self, prompt: str) -> str:
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def typed(session: Session, *lines: str | BaseException) -> str:
    """What the terminal shows for these lines."""
    out = io.StringIO()
    Terminal(session, Keyboard(*lines), out).run()
    return out.getvalue()


class Mouth:
    """In the place of a session's stream: says these pieces, and raises those that are exceptions."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self.pieces = pieces

    def __call__(self, prompt: list[int]):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def words(session: Session, ids: list[int]) -> str:
    return session.sampler.tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(6))
def test_the_stream_joins_to_the_whole_reply(session, seed):
    """Also where characters of several tokens are torn: this model speaks bytes at random."""
    session.seed = seed
    session.decoding = Decoding(max_new_tokens=40, temperature=1.5)
    ids, mask = session.sampler.pad([session.sampler.tokenizer("the film")["input_ids"]])
    drawn = [int(token) for token, _ in session.sampler.decode(ids, mask, [seed + 1], session.decoding)]
    pieces = list(session.reply("the film"))
    assert "".join(pieces) == session.sampler.text(drawn) == session.turns[-1].content
    assert len(pieces) > 3 and all(pieces)


def test_whole_characters_are_streamed(session, monkeypatch):
    """A character of three tokens comes in one piece."""
    said = session.sampler.tokenizer("é 雪 ok")["input_ids"]
    monkeypatch.setattr(session.sampler, "decode", lambda *_: ((token, None) for token in said))
    pieces = list(session.reply("hi"))
    assert "".join(pieces) == "é 雪 ok"
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_reply_is_drawn_anew_and_all_again_under_the_same_seed(sampler):
    def talk() -> list[str]:
        session = Session(sampler, Decoding(max_new_tokens=8), seed=4)
        return ["".join(session.reply("the film was")) for _ in range(2) if not session.clear()]

    first, second = talk()
    assert first != second
    assert talk() == [first, second]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_history_stays_within_the_context_and_keeps_the_newest(sampler, monkeypatch, template):
    monkeypatch.setattr(sampler.tokenizer, "chat_template", template)
    session = Session(sampler, Decoding(max_new_tokens=4), system="be good" if template else "")
    prompts, stream = [], session._stream
    monkeypatch.setattr(session, "_stream", lambda prompt: (prompts.append(prompt), stream(prompt))[1])
    asked = [f"the film number {i} was good" for i in range(9)]
    for count, text in enumerate(asked, 1):
        "".join(session.reply(text))
        assert session.turns[-2] == Message("user", text)
        assert session.dropped + len(session.turns) == 2 * count
        assert [turn.role for turn in session.turns] == ["user", "assistant"] * (len(session.turns) // 2)
    assert session.dropped > 0
    for text, prompt in zip(asked, prompts, strict=True):
        assert len(prompt) + 4 <= session.context
        assert text in words(session, prompt)
        assert ("be good" in words(session, prompt)) == bool(template), "the system text is never dropped"
    assert asked[0] in words(session, prompts[1]) and asked[0] not in words(session, prompts[-1])


def test_one_turn_too_long_for_the_context_keeps_its_end(session):
    "".join(session.reply("the plot " * 100 + "was awful"))
    session.turns.pop()
    ids = session.fit()
    assert len(ids) == session.context - session.decoding.max_new_tokens
    assert words(session, ids).endswith("was awful")


def test_a_template_gives_each_turn_its_role(templated):
    session = Session(templated, Decoding(max_new_tokens=4), system="be kind")
    session.turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert words(session, session.fit()) == "<system>be kind\n<user>a\n<assistant>b\n<user>c\n<assistant>"
    session.system = ""
    assert words(session, session.fit()).startswith("<user>a")


def test_without_a_template_the_conversation_is_one_text(session):
    session.turns = [Message("user", "the film"), Message("assistant", " was good ."), Message("user", "but")]
    assert words(session, session.fit()) == "the film was good .\nbut"


def test_undo_takes_back_a_turn_with_its_reply(session):
    shown = typed(session, "good", "bad", "/undo")
    assert [turn.content for turn in session.turns[::2]] == ["good"] and len(session.turns) == 2
    assert shown.count("model> ") == 2
    assert "nothing to take back" in typed(session, "/undo", "/undo")
    assert session.turns == []


def test_retry_asks_the_same_again(session):
    typed(session, "the film", "good")
    first = session.turns[-1].content
    typed(session, "/retry")
    assert [turn.content for turn in session.turns[::2]] == ["the film", "good"]
    assert session.turns[-1].content != first
    typed(session, "/clear")
    assert "nothing to answer again" in typed(session, "/retry")


def test_retry_of_a_first_turn_answers_it(session):
    typed(session, "good", "/retry")
    assert [turn.role for turn in session.turns] == ["user", "assistant"]


def test_clear_forgets_every_turn(session):
    typed(session, "good", "bad", "/clear")
    assert (session.turns, session.dropped) == ([], 0)
    assert "(nothing yet)" in typed(session, "/history")


def test_system_and_history(session):
    shown = typed(session, "/system be brief", "good\tfilm", "/history", "/system")
    assert "user: good film" in shown and "assistant: " in shown
    assert session.system == ""
    assert typed(session, "/system be brief") and session.system == "be brief"


def test_set_changes_how_it_is_decoded(session):
    shown = typed(session, "/set temperature=0", "/set top_p = 0.5", "/set top_k=3", "/set max_new_tokens=5")
    assert session.decoding == Decoding(max_new_tokens=5, temperature=0.0, top_k=3, top_p=0.5)
    assert shown == "\n", "nothing but the end of input"


def test_set_alone_lists_what_would_be_typed(session):
    session.decoding = Decoding(max_new_tokens=7, temperature=0.25, top_p=0.5, top_k=3)
    before, shown = session.decoding, typed(session, "/set").split()
    assert shown == ["temperature=0.25", "top_p=0.5", "top_k=3", "max_new_tokens=7"]
    session.decoding = DEFAULT
    assert typed(session, *(f"/set {pair}" for pair in shown)) == "\n" and session.decoding == before


def test_help_tells_the_settings_a_chat_begins_with(sampler):
    session = Session(sampler)
    begins = typed(session, "/set").strip()
    assert "temperature=0.7  top_p=0.95" in begins and begins in typed(session, "/help")


def test_the_banner_is_two_lines_that_name_the_model_and_the_commands(session):
    out = io.StringIO()
    terminal = Terminal(session, Keyboard("/quit"), out, model="my\x1b[2J model")
    terminal.run()
    first, second = out.getvalue().splitlines()
    assert first.startswith("my model, without a chat template")
    assert second.split() == [*terminal.commands, "/quit"]


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "heat=1": "temperature, top_p, top_k, max_new_tokens",
        "top_p": "not a number",
        "temperature": "not a number",
        "temperature=warm": "'warm' is not a number",
        "temperature=-1": "out of range",
        "temperature=nan": "out of range",
        "temperature=inf": "out of range",
        "top_p=0": "out of range",
        "top_p=1.5": "out of range",
        "top_k=-2": "out of range",
        "top_k=1.5": "not a number",
        "max_new_tokens=0": "out of range",
        "max_new_tokens=96": "out of range",
    }.items(),
)
def test_a_wrong_setting_is_answered_and_changes_nothing(session, text, said):
    before = session.decoding
    assert said in typed(session, f"/set {text}")
    assert session.decoding == before


def test_an_unknown_command_is_answered(session):
    shown = typed(session, "/quti\x1b[2J", "/help")
    assert "unknown command /quti; /help lists them" in shown and "\x1b" not in shown
    assert all(name in shown for name in Terminal(session).commands)


def test_blank_lines_are_nothing_and_quit_leaves(session):
    shown = typed(session, "", "   ", "/quit", "never read")
    assert (shown, session.turns) == ("", [])


HOSTILE = {
    "clear": "a\x1b[2Jb", "title": "a\x1b]0;owned\x07b", "clipboard": "a\x1b]52;c;AAAA\x1b\\b", "carriage": "a\rb",
    "backspace": "a\x08b", "c1": "a\x9b31mb", "bidi": "a\u202eb", "bell": "a\x07b", "device": "a\x1bP1;1|x\x1b\\b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_a_model_says_cannot_steer_the_terminal(session, monkeypatch, text):
    """Whole, and torn at every place, since a sequence may come in several pieces."""
    for pieces in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        monkeypatch.setattr(session, "_stream", Mouth(*pieces))
        assert typed(session, "hi") == "model> ab\n\n"
        assert typed(session, "/history").replace("\n", "").isprintable()
        session.clear()


@given(pieces=st.lists(st.text(max_size=6), max_size=6))
def test_no_control_character_is_ever_shown(sampler, pieces):
    session = Session(sampler)
    session._stream = Mouth(*pieces)
    shown = typed(session, "hi", "/history")
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(session, monkeypatch):
    monkeypatch.setattr(session, "_stream", Mouth("the ", "film", KeyboardInterrupt()))
    assert "the film (stopped)" in typed(session, "hi")
    assert session.turns == [Message("user", "hi"), Message("assistant", "the film")]
    monkeypatch.setattr(session, "_stream", Mouth(" goes on"))
    assert " goes on" in typed(session, "and")
    assert len(session.turns) == 4


def test_ctrl_c_while_printing_keeps_what_was_said(session, monkeypatch):
    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            if text == "film":
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(session, "_stream", Mouth("the ", "film", " never said"))
    out = Pipe()
    Terminal(session, Keyboard("hi"), out).run()
    assert session.turns[-1] == Message("assistant", "the film") and "(stopped)" in out.getvalue()


def test_ctrl_c_at_the_prompt_says_how_to_leave(session):
    assert "/quit or Ctrl+D leaves" in typed(session, KeyboardInterrupt(), "/quit")


def test_a_full_context_is_said_once(session):
    session.decoding = Decoding(max_new_tokens=60)
    shown = typed(session, *["the film was not very good and the plot was dull"] * 4)
    assert shown.count("context of 96 tokens is full") == 1


def test_a_transcript_is_a_line_a_turn():
    lines = transcript([Message("user", "a\nb" * 90), Message("assistant", "ok")], width=20)
    assert lines[1] == "assistant: ok" and len(lines[0]) == 20 and lines[0].endswith("…")


def test_the_verb_talks_over_a_pipe_and_heeds_ctrl_c(folder):
    """A program of its own: a first reply by the model; a real SIGINT while it speaks the second, which stays."""
    code = (
        "import sys, time\nfrom peftlab import cli\nfrom peftlab.chat.session import Session\n"
        "first = Session._stream\n"
        "def slow(self, prompt):\n"
        "    if len(self.turns) == 1:\n        yield from first(self, prompt)\n        return\n"
        "    yield 'the '\n    yield 'end '\n    time.sleep(60)\n"
        "Session._stream = slow\n"
        f"sys.argv = ['peftlab', 'chat', {folder!r}, '--device', 'cpu']\ncli.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        it.stdin.write("/set max_new_tokens=6\nthe film\nhi\n/history\n")
        it.stdin.close()
        heard = ""
        while not heard.endswith("the end "):
            heard += (letter := it.stdout.read(1))
            assert letter, heard
        os.kill(it.pid, signal.SIGINT)
        heard += it.stdout.read()
    assert it.returncode == 0
    assert heard.startswith(folder) and heard.splitlines()[2].startswith("you> you> model> ")
    assert heard.count("model> ") == 2
    assert "(stopped)" in heard and "user: the film" in heard and "assistant: the end" in heard


def test_a_chat_opens_on_a_model_by_name(folder):
    terminal = open_chat(folder, "be good", 3, "cpu")
    assert (terminal.session.system, terminal.session.seed, terminal.session.context) == ("be good", 3, 96)


def test_seeds_of_replies_differ(session, monkeypatch):
    seeds = []
    monkeypatch.setattr(session.sampler, "decode", lambda ids, mask, seed, how: seeds.extend(seed) or iter(()))
    for _ in range(3):
        "".join(session.reply("a"))
    assert all(later > earlier for earlier, later in pairwise(seeds)) and len(seeds) == 3
