"""A model, files and names that want to steer: nothing of it reaches a real terminal, and no browser runs it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import hostile
import pytest
import tiny

from peftlab.recipes.launch import launch
from peftlab.runs.sanitize import BIDI, StreamSanitizer, sanitize

pytestmark = pytest.mark.usefixtures("one_thread")

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
SECONDS = 240  # far more than it takes
REWARD = "def length(prompts, completions, records):\n    return [float(len(c)) for c in completions]\n"
# What the lab itself writes to a terminal: colours, and a panel that is drawn again (ECMA-48: SGR, CUU, ED).
OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\d+A|J)|\r  \d+%|\r {5}\r")  # colours, a live panel, a share that is done
STEERS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}\ud800-\udfff]")
# All commands in one process, which imports the libraries once; standard input is piped, the output a terminal's.
DRIVER = """
import json, sys
from pathlib import Path
from peftlab import cli
from peftlab.recipes.demo import show_samples
from rich.console import Console

for line in json.loads(Path("lines.json").read_text()):
    sys.argv = ["peftlab", *line]
    code = 0
    try:
        show_samples(Console(), Path(line[1]), 3) if line[0] == "samples" else cli.main()
    except SystemExit as end:
        code = end.code or 0
    print(f"\\n<<{line[0]} {line[1] if len(line) > 1 else ''!r}: {code}>>", flush=True)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with `model`, files of the corpus, and runs/ppo that sampled from the one on the others."""
    root = tmp_path_factory.mktemp("hostile")
    model = hostile.speaker(root / "model")
    said = hostile.SAFE_FOR_FILES
    every = "".join(said)
    tiny.write_rows(root / "prompts.jsonl", [{"prompt": f"{piece} asks"} for piece in said])
    texts = [{"id": f"{piece[:9]}{number}", "text": f"{piece} tells"} for number, piece in enumerate([*said, every])]
    tiny.write_rows(root / "texts.jsonl", texts)
    tiny.write_rows(root / "bad.jsonl", [{"text": piece, "label": piece, piece: piece} for piece in hostile.CORPUS])
    sides = {"chosen": f"yes {every}", "rejected": f"no {every}"}
    tiny.write_rows(root / "pairs.jsonl", [{"id": every[:30] + side, "prompt": every} | sides for side in "ab"])
    (root / "lengths.py").write_text(REWARD)
    shop = {"gpt2": str(model), "prompts": str(root / "prompts.jsonl")}
    keys = ["task=custom", "reward=lengths:length", "eval_prompts=8", "max_new_tokens=24", "prompt_tokens=[0,0]"]
    (root / "ppo.json").write_text(json.dumps(tiny.overrides(shop, "ppo", *keys)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        launch("ppo", None, json.loads((root / "ppo.json").read_text()), root / "runs", "ppo")
    failed = json.loads((root / "runs/ppo/summary.json").read_text()) | {"status": "failed", "reason": every}
    shutil.copytree(root / "runs/ppo", root / "runs/failed")
    (root / "runs/failed/summary.json").write_text(json.dumps(failed))
    return root


def at_a_terminal(home: Path, lines: list[list[str]], typed: str) -> str:
    """All that a terminal of 100 columns gets of these commands."""
    (home / "lines.json").write_text(json.dumps(lines))
    end, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=inner, stderr=inner, cwd=home, env=environment
    )
    os.close(inner)
    assert program.stdin
    program.stdin.write(typed.encode())
    program.stdin.close()
    heard, until = b"", time.monotonic() + SECONDS
    while time.monotonic() < until:
        ready, _, _ = select.select([end], [], [], 1)
        try:
            if ready:
                heard += os.read(end, 65536)
        except OSError:  # the other end is closed
            break
    program.kill()
    program.wait()
    os.close(end)
    return heard.decode("utf-8", errors="replace")


def test_nothing_reaches_a_terminal(home):
    name = "".join(hostile.CORPUS).replace("\0", "")
    lines = [
        ["generate", "model", "--prompt", name[:150], "-n", "4", "--max-new-tokens", "40"],
        ["chat", "model"],
        ["ppo", *json.loads((home / "ppo.json").read_text()), "--run", "seen"],
        ["samples", "runs/ppo"],
        ["inspect", "ppo"],
        ["inspect", "ppo", "--list"],
        ["data", "preview", "texts.jsonl", "--for", "sft", "--model", "model", "--rows", "60"],
        ["data", "check", "bad.jsonl", "--for", "classify"],
        ["data", "check", name[:90], "--for", "classify"],
        ["label", "pairs.jsonl"],
        ["eval", "model", "--data", "texts.jsonl"],
        ["runs"],
        ["runs", "--json"],
        ["report", name[:90]],
        ["sft", f"model={name[:90]}", "--run", "x"],
        ["sft", f"{name[:60]}=3"],
        ["configs", name[:60]],
        ["predict", "runs/ppo/adapter", "--text", "tells"],
    ]
    heard = at_a_terminal(home, lines, "hello\n/history\n/status\n/retry\n/quit\na\nq\n")
    ended = re.findall(r"<<(\S+ .*?): (\d+)>>", heard)
    assert len(ended) == len(lines), heard[-2000:]
    wrong = [number for number, (_, code) in enumerate(ended) if code != "0"]
    assert wrong == [7, 8, 13, 14, 15, 16] and {code for _, code in ended} == {"0", "2"}, ended
    assert "Traceback" not in heard
    for line in OWN.sub("", heard).split("\n"):
        assert not (found := STEERS.search(line.rstrip("\r"))), f"{found[0]!r} in {line!r}"
    assert "\x1b[31;45;5m" not in heard
    assert "[/foo]" in heard and "[bold red]" in heard, "markup is shown as it stands"


def test_each_piece_is_dropped_wherever_a_stream_splits_it():
    """Every piece of the corpus between two words, cut at each of its places into two and into single characters."""
    for piece in hostile.CORPUS:
        text = f"before {piece}\nafter"
        shown = sanitize(text)
        assert not STEERS.search(shown) and shown.startswith("before ") and shown.endswith("\nafter"), piece
        for cut in range(len(text) + 1):
            stream = StreamSanitizer()
            assert stream.feed(text[:cut]) + stream.feed(text[cut:]) + stream.flush() == shown, (piece, cut)
        stream = StreamSanitizer()
        assert "".join(map(stream.feed, text)) == shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")
def test_no_script_runs_on_a_page(home):
    """The reports of both runs, opened as files: no script, no request, no other page, nothing hidden."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for run in ("ppo", "failed"):
            page = browser.new_page()
            page.set_default_timeout(20_000)
            asked: list[str] = []
            said: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("dialog", lambda dialog, said=said: (said.append(dialog.message), dialog.dismiss()))
            page.on("console", lambda message, said=said: said.append(message.text))
            place = (home / "runs" / run / "report.html").as_uri()
            if run == "failed":
                (home / "runs/failed/report.html").unlink()
                from peftlab.report import render

                render(home / "runs/failed")
            page.goto(place)
            page.mouse.move(300, 300)
            for unfolded in page.query_selector_all("summary"):
                unfolded.click()
            page.wait_for_timeout(300)
            assert asked == [place] and said == [] and page.url == place
            assert "hacked" not in page.title() and page.evaluate("typeof window.hacked") == "undefined"
            tags = "script, img, iframe, object, embed, link, form, base, meta[http-equiv=refresh]"
            assert page.evaluate(f"document.querySelectorAll('{tags}').length") == 0
            shown = page.inner_text("body")
            assert "<script>document.title='hacked'" in shown and "{{ 7 * 7 }}" in shown, "as text"
            page.close()
        browser.close()
