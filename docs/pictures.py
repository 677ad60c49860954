"""Takes the pictures in docs/pictures from the real programs: `python docs/pictures.py [--run RUN] [--only NAME ...]`.

`--run` is a PPO run, by default the one that `make demo` leaves. It needs Chromium on the PATH; playwright drives it,
and pyte, a terminal in memory, shows what a program wrote to its 80 columns.
"""

from __future__ import annotations

import argparse
import fcntl
import html
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).resolve().parent / "pictures"
PEFTLAB = [sys.executable, "-m", "peftlab.cli"]
COLUMNS, WIDE, PHONE = 80, 1280, 400
# What xterm's sixteen colours look like here; a brown is pyte's word for yellow.
COLOURS = {
    "black": "#16181c", "red": "#f07178", "green": "#8bc48a", "brown": "#e3c078", "blue": "#82aaff",
    "magenta": "#d7a0f0", "cyan": "#7fd1d8", "white": "#d5d7db", "brightblack": "#878d98",
}  # fmt: skip
PAGE = """<meta charset="utf-8"><style>body {{ margin: 0; background: #16181c }}
pre {{ margin: 0; padding: 14px 18px; width: max-content; color: #d5d7db }}
pre {{ font: 14px/1.32 "DejaVu Sans Mono", monospace }}
</style><pre>{}</pre>"""


class Terminal:
    """A program at a pseudo-terminal of 80 columns, and its screen."""

    def __init__(self, command: list[str], folder: Path, rows: int, **env: str) -> None:
        self.screen = pyte.Screen(COLUMNS, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
        shown = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | env
        self.program = subprocess.Popen(
            [*PEFTLAB, *command], stdin=inner, stdout=inner, stderr=inner, cwd=folder, env=os.environ | shown
        )
        os.close(inner)

    def until(self, text: str | None, seconds: float = 300) -> None:
        """Read until `text` is the screen's last written line, or until the program ends."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if not select.select([self.end], [], [], 0.5)[0]:
                lines = [line for line in self.screen.display if line.strip()]
                if text and lines and lines[-1].strip() == text:
                    return
                continue
            try:
                self.stream.feed(os.read(self.end, 1 << 16))
            except OSError:  # how Linux says that the program is gone
                self.program.wait(60)
                return
        raise TimeoutError("\n".join(self.screen.display))

    def type(self, keys: str) -> None:
        """Type a line, and wait for the next prompt."""
        os.write(self.end, keys.encode() + b"\r")
        time.sleep(0.3)
        self.until("you>")

    def close(self) -> None:
        """End the program, if it has not."""
        if self.program.poll() is None:
            self.program.send_signal(signal.SIGTERM)
            self.program.wait(60)
        os.close(self.end)

    def page(self) -> str:
        """The screen as a page, less the empty lines at its end."""
        written = [number for number, line in enumerate(self.screen.display) if line.strip()]
        lines = []
        for row in range(max(written) + 1):
            cells = [self.screen.buffer[row][column] for column in range(COLUMNS)]
            runs = groupby(cells, key=lambda cell: cell._replace(data=""))
            lines.append("".join(_run("".join(cell.data for cell in run), look) for look, run in runs))
        return PAGE.format("\n".join(lines))


def _run(text: str, look: Any) -> str:
    """Characters of one look as HTML."""
    front, back = (COLOURS.get(c, c if c == "default" else f"#{c}") for c in (look.fg, look.bg))
    if look.reverse:
        front, back = "#16181c" if back == "default" else back, "#d5d7db" if front == "default" else front
    style = [f"color: {front}" * (front != "default"), f"background: {back}" * (back != "default")]
    style += ["font-weight: 700" * look.bold, "text-decoration: underline" * look.underscore]
    return f'<span style="{"; ".join(filter(None, style))}">{html.escape(text)}</span>'


@contextmanager
def server(command: list[str], folder: Path) -> Iterator[str]:
    """The URL of a page that a program serves while the block runs."""
    with subprocess.Popen(
        [*PEFTLAB, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
    ) as program:  # fmt: skip
        assert program.stdout is not None
        found = next(filter(None, (re.search(r"http://\S+token=\S+", line) for line in program.stdout)))
        try:
            yield found[0]
        finally:
            program.send_signal(signal.SIGINT)


class Camera:
    """Takes pictures with a browser, of what the programs show in `folder` and of the PPO run `run`."""

    def __init__(self, browser: Browser, out: Path, folder: Path, run: Path, phone: bool, dark: bool) -> None:
        self.browser, self.out, self.folder, self.run = browser, out, folder, run
        self.width = PHONE if phone else WIDE
        self.scheme: Any = "dark" if dark else "light"

    def page(self, height: int = 800) -> Page:
        page = self.browser.new_page(viewport={"width": self.width, "height": height}, color_scheme=self.scheme)
        page.set_default_timeout(60_000)
        return page

    def terminal(self, name: str, terminal: Terminal) -> None:
        page = self.page()
        page.set_content(terminal.page())
        page.locator("pre").screenshot(path=self.out / f"{name}.png")
        terminal.close()

    def chat(self) -> None:
        """A conversation: an adapter, two answers side by side, and their scores."""
        chat = Terminal(["chat", "tiny-gpt2", "--seed", "4"], self.folder, 36)
        chat.until("you>")
        for line in (
            "/set max_new_tokens=28", "The music was", "/score on", "/compare tiny-enthusiast tiny-critic",
            "/mix tiny-enthusiast=0.5 tiny-critic=0.5", "/retry",
        ):  # fmt: skip
            chat.type(line)
        self.terminal("chat", chat)

    def inspect(self) -> None:
        """A recorded rollout in the terminal."""
        shown = Terminal(["inspect", str(self.run), "--prompt", "0"], self.folder, 60)
        shown.until(None)
        self.terminal("inspect", shown)

    def report(self) -> None:
        """The report: figures, and a rollout token by token."""
        page = self.page(height=700)
        page.goto((self.run / "report.html").as_uri())
        page.screenshot(path=self.out / "report.png")
        page.set_viewport_size({"width": min(self.width, 860), "height": 900})
        rollout = page.locator("section[id$=rollouts] .rollout:visible").nth(-3)  # the second of the last step
        rollout.locator("summary").click()
        rollout.screenshot(path=self.out / "report-tokens.png")
        page.close()

    def serve(self) -> None:
        """The page of `peftlab serve`: a reply with its tokens, then two answers to one message."""
        names = ["tiny-gpt2", "tiny-enthusiast", "tiny-critic", "imdb-sentiment", "--port", "0"]
        with server(["serve", *names], self.folder) as url:
            page = self.page(height=800)
            page.goto(url)
            idle = "body[data-busy=false]"
            page.wait_for_selector(idle)
            page.click("#settings summary")
            page.fill("#max-tokens", "40")
            page.fill("#seed", "7")
            page.select_option("#scorer", "imdb-sentiment")
            page.click("#settings summary")
            turns = (("The film was", ["tiny-gpt2"]), ("The ending", ["tiny-enthusiast", "tiny-critic"]))
            for message, models in turns:
                page.select_option("#left-model", models[0])
                if len(models) == 2:
                    page.check("#compare")
                    page.select_option("#right-model", models[1])
                page.fill("#text", message)
                page.press("#text", "Enter")
                page.wait_for_selector(f".theirs:has(h2:has-text('{models[-1]}')) .note:has-text('score')")
                page.wait_for_selector(idle)
            page.locator(".theirs .answer").last.locator(".token").nth(3).hover()
            page.screenshot(path=self.out / "serve.png")
            page.close()

    def label(self) -> None:
        """The labelling page: two answers of the run to one prompt."""
        rows = [json.loads(line) for line in (self.run / "samples.jsonl").read_text().splitlines()]
        sides = {side: [row for row in rows if row["side"] == side] for side in ("before", "after")}
        pairs = [
            {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
            for b, a in zip(sides["before"][:40], sides["after"][:40], strict=True)
        ]
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        with server(["label", "pairs.jsonl", "--web", "--seed", "1"], self.folder) as url:
            page = self.page(height=620)
            page.goto(url)
            for done, key in enumerate(("ArrowLeft", "ArrowRight", "t")):
                page.wait_for_selector(f"#count:has-text('{done} of')")
                page.keyboard.press(key)
            page.wait_for_selector("#count:has-text('3 of')")
            page.screenshot(path=self.out / "label.png")
            page.close()


SHOTS: dict[str, Callable[[Camera], None]] = {
    "chat": Camera.chat, "inspect": Camera.inspect, "report": Camera.report, "serve": Camera.serve,
    "label": Camera.label,
}  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--run", type=Path, default=Path("runs/demo/ppo"))
    asked.add_argument("--only", choices=SHOTS, nargs="+", default=list(SHOTS))
    asked.add_argument("--output", type=Path, default=HERE)
    asked.add_argument("--phone", action="store_true", help=f"pages at {PHONE} pixels")
    asked.add_argument("--dark", action="store_true", help="pages in their dark colours")
    given = asked.parse_args()
    chromium = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])))
    given.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        # Containers run as root, where Chromium's own sandbox cannot start. Grey letters make smaller files.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-lcd-text"])
        place = Path(folder)
        camera = Camera(browser, given.output.resolve(), place, given.run.resolve(), given.phone, given.dark)
        for name in given.only:
            SHOTS[name](camera)
        browser.close()


if __name__ == "__main__":
    main()
