"""The chat as one meets it: a program at a terminal of 80 columns, every command typed into it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import stacks
import tiny

from peftlab.chat.terminal import HELP
from peftlab.data.check import check_file

# What a model may say: a title, a cleared screen, a clipboard, a move to the left, right to left, C1.
HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x1b]52;c;AAAA\x1b\\d\re\u202ef\x9b31mg"
# The program takes the terminal as its own, so that Ctrl+C reaches it. Replies are the model's, but for two turns.
PROGRAM = f"""
import fcntl, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a background job would hand on that it is ignored
from peftlab import cli
from peftlab.chat.session import Session
speak = Session._stream
def stream(self, prompt):
    asked = [turn.content for turn in self.turns if turn.role == "user"][-1]
    if asked == "hostile":
        yield from {list(HOSTILE)!r}
    elif asked == "slow":
        yield "begun and "
        time.sleep(60)
    else:
        yield from speak(self, prompt)
Session._stream = stream
cli.main()
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Terminal:
    """A program at the other end of a pseudo-terminal, and all that it wrote."""

    def __init__(self, line: list[str], folder: Path) -> None:
        self.end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        # Nobody answers the question where the cursor is.
        env = os.environ | {"PEFTLAB_HOME": str(folder / "home"), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *line],
            stdin=inner, stdout=inner, stderr=inner, cwd=folder, env=env, start_new_session=True,
        )
        os.close(inner)
        self.heard = self.typed = ""
        self.until("you>")

    def until(self, text: str, since: int = 0, seconds: float = 120) -> int:
        """Read until `text` was written behind position `since`; the position behind it."""
        begun = time.monotonic()
        while (at := self.seen.find(text, since)) < 0:
            assert time.monotonic() - begun < seconds, f"no {text!r} in {self.seen[since:]!r}"
            if select.select([self.end], [], [], 1)[0]:
                try:
                    self.heard += os.read(self.end, 1 << 16).decode("utf-8", "replace")
                except OSError:  # how Linux says that the program is gone
                    assert text in self.seen[since:], f"ended without {text!r}: {self.seen[since:]!r}"
        return at + len(text)

    @property
    def seen(self) -> str:
        """What was written, without what moves the cursor."""
        return ESCAPES.sub("", self.heard)

    def type(self, keys: str, expected: str) -> str:
        """Type, and wait for what is expected and the next prompt; what was written meanwhile."""
        since = len(self.seen)
        self.typed += keys
        os.write(self.end, keys.encode())
        self.until("you>", self.until(expected, since))
        return self.seen[since:]


def test_every_command_is_typed_at_a_terminal(tmp_path):
    base = str(tiny.causal_folder(tmp_path / "base"))
    stacks.adapters(base, tmp_path)
    stacks.personas(base, tmp_path)
    stacks.router(base, tmp_path / "router", ["kind", "asker"])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "chat-history").write_text("\n# 2026-01-01\n+the film of yesterday\n")
    line = ["chat", "plain", "--router", "router", "--reward", "rubric:length", "--device", "cpu"]
    it = Terminal(line, tmp_path)
    try:
        assert "plain, which goes on with what you write" in it.seen
        it.type("/set max_new_tokens=6\r", "max_new_tokens=6\r\n")
        it.type("\x1b[A\x1b[A\r", "model>")
        assert "the film of yesterday" in it.type("/history\r", "user:")
        it.type("a plot\x1b\rin two lines\r", "model>")
        it.type("and \\\rthen some\r", "model>")
        assert "user: and then some" in it.type("/history\r", "user: a plot in two lines")

        # What a model says is shown without what steers a terminal; the rest of a reply is kept on Ctrl+C.
        assert "abcdefg" in it.type("hostile\r", "abcdefg")
        assert "\x1b]" not in it.heard and "\x1b[2J" not in it.heard and "\x9b" not in it.heard
        os.write(it.end, b"slow\r")
        it.until("begun and")
        assert "(stopped)" in it.type("\x03", "(stopped)")
        assert "assistant: begun and" in it.type("/history\r", "assistant: begun and")
        it.type("\x03", "/quit or Ctrl+D leaves")

        it.type("/adapter other\r", "(other answers")
        it.type("/mix plain=0.7 other=0.3\r", "(mix plain=0.7 other=0.3 answers")
        it.type("/persona kind\r", "(kind answers")
        it.type("the plot\r", "kind>")
        it.type("/persona off\r", "(mix plain=0.7 other=0.3 answers")
        it.type("/persona auto\r", "router picks who answers each turn: kind, asker")
        it.type("the plot\r", ", p 0.")
        it.type("/adapter off\r", "answers,")
        it.type("/score on\r", "(each reply is scored by rubric:length)")
        it.type("/retry\r", "(reward +")
        assert "other  " in it.type("/compare other above the film\r", "reward +")
        it.type("/score off\r", "(no score")
        it.type("/system be kind\r", "begins with it")
        it.type("/undo\r", "(taken back: the plot)")
        it.type("/save talk.jsonl\r", "exchange")
        it.type("/clear\r", "(a new conversation)")
        assert "(nothing yet)" in it.type("/history\r", "(nothing yet)")
        it.type("/load talk.jsonl\r", "exchange")
        status = it.type("/status\r", "score ")
        assert "system     be kind" in status and "of 96 tokens" in status and "above" in status
        it.type("/nonsense\r", "unknown command /nonsense")
        shown = it.type("/help\r", "begins another line")
        assert all(f"/{name} " in shown for name in ("adapter", "mix", "compare", "score", "status", "quit"))
        commands = set(re.findall(r"^(/\w+)", HELP, re.M))
        assert {"/adapter", "/save"} < commands and {c for c in commands if c not in it.typed} == {"/quit"}
        os.write(it.end, b"/quit\r")
        assert it.program.wait(60) == 0
    finally:
        os.killpg(it.program.pid, signal.SIGKILL) if it.program.poll() is None else None
        os.close(it.end)
    history = tmp_path / "home" / "chat-history"
    assert "+/status" in history.read_text() and "+in two lines" in history.read_text()
    (row,) = check_file(tmp_path / "talk.jsonl", "sft").records
    assert row.messages[0].content == "be kind" and "hostile" in [m.content for m in row.messages]


def test_thirty_turns_at_a_terminal_run_over_the_context_of_a_real_model(tmp_path):
    """tiny-gpt2 sees 512 tokens: adapters change, are mixed and compared while the oldest turns are dropped."""
    (tmp_path / "home").mkdir()
    it = Terminal(["chat", "tiny-gpt2", "--device", "cpu"], tmp_path)
    try:
        it.type("/set max_new_tokens=12\r", "max_new_tokens=12\r\n")
        voices = {5: "/adapter tiny-critic", 12: "/mix tiny-enthusiast=0.5 tiny-critic=0.5", 20: "/adapter off"}
        for turn in range(1, 31):
            if turn in voices:
                it.type(f"{voices[turn]}\r", " answers, ")
            it.type(f"Scene {turn} of this long film, with its cast and its music and its script, was\r", "model>")
        told = it.seen.count("the context of 512 tokens is full: oldest turns are dropped from now on")
        assert told >= 1  # once for each voice that fills it
        assert "tiny-enthusiast" in it.type("/compare tiny-enthusiast tiny-critic\r", "tiny-critic ")
        status = it.type("/status\r", "score ")
        exchanges, dropped = map(int, re.search(r"exchanges +(\d+), (\d+) of them dropped", status).groups())
        used = int(re.search(r"context +(\d+) of 512 tokens; 12 kept", status)[1])
        assert exchanges == 30 and 0 < dropped < 30 and used <= 512
        assert "Scene 1 of" in it.type("/history\r", "user: Scene 30")
        os.write(it.end, b"/quit\r")
        assert it.program.wait(60) == 0
    finally:
        os.killpg(it.program.pid, signal.SIGKILL) if it.program.poll() is None else None
        os.close(it.end)
