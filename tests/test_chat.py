"""A conversation: what the model is asked, what is kept, and what reaches the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from commands import peftlab
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from peftlab.chat.keyboard import piped
from peftlab.chat.screen import Screen, Wrapper
from peftlab.chat.session import ANSWERS, GOES_ON, Session, default_decoding, transcript
from peftlab.chat.terminal import Terminal
from peftlab.chat.voices import Voice
from peftlab.data.check import check_file
from peftlab.data.records import Message
from peftlab.models.backbone import load_backbone
from peftlab.recipes.chat import open_chat
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
    return Session(Voice.of(sampler), Decoding(max_new_tokens=8, temperature=0.8, top_p=0.95))


class Keyboard:
    """Lines that are typed; an exception among them is raised; then the end of input."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = [*lines, EOFError()]

    def __call__(self) -> str:
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def typed(session: Session, *lines: str | BaseException) -> str:
    """What the terminal shows for these lines, below its greeting."""
    out = io.StringIO()
    Terminal(session, Keyboard(*lines), out).run()
    return out.getvalue().split("\n", 2)[2]


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


def test_a_small_context_cuts_a_reply_and_not_the_setting(session):
    session.decoding = Decoding(max_new_tokens=session.context + 9)
    assert session.acting.max_new_tokens == session.context - 1 < session.decoding.max_new_tokens
    assert list(session.reply("the film")) and session.cut
    assert session.decoding.max_new_tokens == session.context + 9


def test_whole_characters_are_streamed(session, monkeypatch):
    """A character of three tokens comes in one piece."""
    said = session.sampler.tokenizer("é 雪 ok")["input_ids"]
    monkeypatch.setattr(session.sampler, "decode", lambda *_: ((token, None) for token in said))
    pieces = list(session.reply("hi"))
    assert "".join(pieces) == "é 雪 ok"
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_reply_is_drawn_anew_and_all_again_under_the_same_seed(sampler):
    def talk() -> list[str]:
        session = Session(Voice.of(sampler), Decoding(max_new_tokens=8), seed=4)
        return ["".join(session.reply("the film was")) for _ in range(2) if not session.clear()]

    first, second = talk()
    assert first != second
    assert talk() == [first, second]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_thirty_turns_stay_within_the_context_and_keep_the_newest(sampler, monkeypatch, template):
    monkeypatch.setattr(sampler.tokenizer, "chat_template", template)
    session = Session(Voice.of(sampler), Decoding(max_new_tokens=4), system="be good" if template else "")
    prompts, stream = [], session._stream
    monkeypatch.setattr(session, "_stream", lambda prompt: (prompts.append(prompt), stream(prompt))[1])
    asked = [f"the film number {i} was good" for i in range(30)]
    for count, text in enumerate(asked, 1):
        "".join(session.reply(text))
        assert session.turns[-2] == Message("user", text)
        assert [turn.role for turn in session.turns] == ["user", "assistant"] * count
        assert session.dropped % 2 == 0
    assert session.dropped > 0
    for text, prompt in zip(asked, prompts, strict=True):
        assert len(prompt) + 4 <= session.context
        assert text in words(session, prompt)
        assert ("be good" in words(session, prompt)) == bool(template), "the system text is never dropped"
    assert asked[0] in words(session, prompts[1]) and asked[0] not in words(session, prompts[-1])


def test_one_turn_too_long_for_the_context_keeps_its_end(session):
    "".join(session.reply("the plot " * 100 + "was awful"))
    assert session.cut
    session.turns.pop()
    ids = session.fit()
    assert len(ids) == session.context - session.decoding.max_new_tokens
    assert words(session, ids).endswith("was awful")
    assert "its beginning was cut" in typed(session, "the plot " * 100)


def test_a_template_gives_each_turn_its_role(templated):
    session = Session(Voice.of(templated), Decoding(max_new_tokens=4), system="be kind")
    session.turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert words(session, session.fit()) == "<system>be kind\n<user>a\n<assistant>b\n<user>c\n<assistant>"
    session.system = ""
    assert words(session, session.fit()).startswith("<user>a")


def test_turns_that_a_template_refuses_are_taken_back(templated):
    template = "{{ raise_exception('no such roles') }}"
    session = Session(Voice("strict", templated, template=template), Decoding(max_new_tokens=4))
    shown = typed(session, "a film", "/undo")
    assert "does not take these turns: no such roles" in shown and session.turns == []
    assert "nothing to take back" in shown and "model> \n" in shown


def test_without_a_template_the_conversation_is_one_text(session):
    session.turns = [Message("user", "the film"), Message("assistant", " was good ."), Message("user", "but")]
    assert words(session, session.fit()) == "the film was good .\nbut"


def test_undo_makes_room_for_what_was_dropped(session):
    typed(session, *["the film was not very good and the plot was dull"] * 8)
    assert session.dropped
    typed(session, *["/undo"] * 7)
    session.fit()
    assert session.dropped == 0 and len(session.turns) == 2


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
    assert "begins with it" in typed(session, "/system be brief") and session.system == "be brief"


def test_set_changes_how_it_is_decoded(session):
    typed(session, "/set temperature=0", "/set top_p = 0.5", "/set top_k=3", "/set max_new_tokens=5")
    assert session.decoding == Decoding(max_new_tokens=5, temperature=0.0, top_k=3, top_p=0.5)
    typed(session, "/set temperature=1 top_p = 0.25")
    assert (session.decoding.temperature, session.decoding.top_p) == (1.0, 0.25)


def test_set_alone_lists_what_would_be_typed(session):
    session.decoding = Decoding(max_new_tokens=7, temperature=0.25, top_p=0.5, top_k=3)
    before, shown = session.decoding, typed(session, "/set").split()
    assert shown == ["temperature=0.25", "top_p=0.5", "top_k=3", "max_new_tokens=7"]
    session.decoding = GOES_ON
    assert typed(session, f"/set {' '.join(shown)}").split() == shown and session.decoding == before


def test_what_a_chat_begins_with_suits_the_model_and_leaves_room(sampler, templated):
    """The random model's context is 96: half of it is a reply's at most."""
    assert default_decoding(Voice.of(templated)) == replace(ANSWERS, max_new_tokens=48)
    assert default_decoding(Voice("x", sampler)) == replace(GOES_ON, max_new_tokens=48)


def test_the_greeting_is_two_lines_that_name_the_model_and_the_way_on(sampler):
    out = io.StringIO()
    Terminal(Session(Voice("my\x1b[2J model", sampler)), Keyboard("/quit"), out).run()
    assert out.getvalue().splitlines() == [
        "my model, which goes on with what you write", "/help lists the commands, /quit leaves"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "heat=1": "temperature, top_p, top_k, max_new_tokens",
        "top_p": "not a number",
        "temperature": "not a number",
        "temperature=warm": "'warm' is not a number",
        "temperature=-1": "out of range; give 0 or more",
        "temperature=nan": "out of range; give 0 or more",
        "temperature=inf": "out of range",
        "top_p=0": "out of range; give more than 0, and 1 at most",
        "top_p=1.5": "out of range; give more than 0, and 1 at most",
        "top_k=-2": "out of range; give 0 or more",
        "top_k=1.5": "not a number",
        "max_new_tokens=0": "out of range; give more than 0, and 95 at most",
        "max_new_tokens=96": "out of range; give more than 0, and 95 at most",
    }.items(),
)
def test_a_wrong_setting_is_answered_and_changes_nothing(session, text, said):
    before = session.decoding
    assert said in typed(session, f"/set {text}")
    assert session.decoding == before


def test_an_unknown_command_is_answered(session):
    shown = typed(session, "/quti\x1b[2J", "/help")
    assert "unknown command /quti; /help lists them" in shown and "\x1b" not in shown
    assert all(name in shown for name in Terminal(session, Keyboard()).commands)
    assert max(map(len, shown.splitlines())) <= 80


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
        assert typed(session, "hi") == "model> ab\n"
        assert typed(session, "/history").replace("\n", "").isprintable()
        session.clear()


@given(pieces=st.lists(st.text(max_size=6), max_size=6))
def test_no_control_character_is_ever_shown(sampler, pieces):
    session = Session(Voice.of(sampler), GOES_ON)
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


def test_the_verb_talks_over_a_pipe(folder, monkeypatch):
    """Ctrl+C at a real terminal: test_chat_pty.py."""
    monkeypatch.setattr("sys.stdin", io.StringIO("/set max_new_tokens=6\nthe film \\\nwas\n/history\n/nonsense"))
    done = peftlab("chat {folder} --device cpu --seed 3", folder=folder)
    assert (done.code, done.err) == (0, "")
    shown = done.out.splitlines()
    assert shown[0] == f"{folder}, which goes on with what you write" and shown[2] == "you> /set max_new_tokens=6"
    assert shown[4:6] == ["you> the film ", "was"] and shown[6].startswith("model> ")
    assert "user: the film was" in shown and shown[-1] == "(unknown command /nonsense; /help lists them)"


def test_a_chat_opens_on_a_model_by_name(folder):
    terminal = open_chat(folder, None, "be good", 3, "cpu", "imdb-sentiment", "persona-router")
    assert (terminal.session.system, terminal.session.seed, terminal.session.context) == ("be good", 3, 96)


def test_seeds_of_replies_differ(session, monkeypatch):
    seeds = []
    monkeypatch.setattr(session.sampler, "decode", lambda ids, mask, seed, how: seeds.extend(seed) or iter(()))
    for _ in range(3):
        "".join(session.reply("a"))
    assert all(later > earlier for earlier, later in pairwise(seeds)) and len(seeds) == 3


def test_piped_lines_are_told_again_and_joined_behind_a_backslash():
    out = io.StringIO()
    read = piped(io.StringIO("one\n\ntwo \\\nthree\nla\x1b[2Jst\\"), out)
    assert [read() for _ in range(4)] == ["one", "", "two \nthree", "la\x1b[2Jst\n"]
    assert out.getvalue() == "you> one\nyou> two \nthree\nyou> last\n\n"
    with pytest.raises(EOFError):
        read()


@given(st.lists(st.text(alphabet="ab \n\t雪é", max_size=12), max_size=8), st.integers(8, 30))
def test_a_stream_is_wrapped_at_words_and_nothing_is_lost(pieces, width):
    wrapper = Wrapper(width, used=3)
    shown = "".join(map(wrapper.feed, pieces)) + wrapper.flush()
    lines = shown.split("\n")
    assert all(cell_len(line) < width for line in [" " * 3 + lines[0], *lines[1:]] if line.strip())
    assert shown.split() == "".join(pieces).split() or any(cell_len(w) >= width - 1 for w in "".join(pieces).split())
    assert "".join(shown.split()) == "".join("".join(pieces).split())


def test_columns_stay_within_eighty_cells_whatever_they_hold():
    out = io.StringIO()
    texts = ["a film [/b] of [red]words[/red] " * 9, "雪" * 100 + " \x1b]0;owned\x07 end"]
    Screen(out).columns(["runs/" + "x" * 90, "critic"], texts)
    shown = out.getvalue()
    assert max(cell_len(line) for line in shown.splitlines()) <= 80
    assert shown.count("雪") == 100 and shown.count("[/red]") == 9 and "owned" not in shown


def test_what_is_saved_is_trained_on_and_read_back(session, tmp_path, monkeypatch):
    """Also what has no text, or holds what `data check` refuses: the file is a row to train on all the same."""
    monkeypatch.chdir(tmp_path)
    session.system = "be kind"
    for said in (" fine", "", "a\x1b[31mred\x08\x07 \ud800"):
        monkeypatch.setattr(session, "_stream", Mouth(said))
        typed(session, "the film")
    assert "2 exchanges, without 1 of no text" in typed(session, "/save talk.jsonl")
    (row,) = check_file(Path("talk.jsonl"), "sft").records
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages[2].content == " fine" and row.messages[4].content == "ared \ufffd"
    assert peftlab("data check talk.jsonl --for sft").code == 0
    session.clear()
    session.system = ""
    assert "(talk.jsonl: 2 exchanges)" in typed(session, "/load talk.jsonl")
    assert session.system == "be kind" and session.turns == list(row.messages[1:])
    "".join(session.reply("good"))
    assert len(session.turns) == 6


def test_a_file_that_is_there_is_not_written_over(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "_stream", Mouth("ok"))
    Path("mine.jsonl").write_text("{}")
    shown = typed(session, "/save a.jsonl", "hi", "/save a.jsonl", "/undo", "more", "/save a.jsonl", "/save mine.jsonl")
    assert "no reply yet" in shown and shown.count("(a.jsonl: 1 exchange)") == 2
    assert "mine.jsonl: is there already" in shown and Path("mine.jsonl").read_text() == "{}"
    for bad in ("none.jsonl", "a.txt", "mine.jsonl"):
        assert "(" in typed(session, f"/load {bad}") and session.turns
    assert "no/such/x.jsonl" in typed(session, "/save no/such/x.jsonl")
