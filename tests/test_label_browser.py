"""The labelling page in a real browser: Chromium, headless, driven by keys and clicks as a person would."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftlab.data.check import check_file

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")
HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"


class Server:
    """`peftlab label --web` as a program of its own, and the URL that it prints."""

    def __init__(self, prefs: Path) -> None:
        command = [sys.executable, "-m", "peftlab.cli", "label", str(prefs), "--web"]
        self.program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
        self.url = self.program.stdout.readline().split()[1]

    def end(self, signum: int) -> int:
        self.program.send_signal(signum)
        self.program.stdout.read()
        return self.program.wait(30)


@pytest.fixture
def prefs(tmp_path) -> Path:
    answers = {"chosen": "A bold, tender film with a fine cast.", "rejected": f"Dull. {HOSTILE}"}
    rows = [{"id": f"p{i}", "prompt": f"Review {i}: was it any good?"} | answers for i in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def context() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Containers run as root, where Chromium's own sandbox cannot start.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(20_000)
        yield context
        browser.close()


@pytest.fixture
def serve(prefs) -> Iterator:
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(prefs))
        return servers[-1]

    yield start
    for server in servers:
        server.end(signal.SIGKILL)


def journal(prefs: Path) -> list[dict]:
    return [json.loads(line) for line in prefs.with_name("pairs.labels.jsonl").read_text().splitlines()]


def wait_for(page, done: int) -> None:
    """Until the page shows that many pairs done, and takes the next choice."""
    page.wait_for_selector("body[data-busy=false]")
    page.wait_for_selector(f"#count:text-is('{done} of 20')")
    page.wait_for_selector("body[data-busy=false]")


def test_twenty_pairs_with_a_kill_at_the_eleventh(prefs, serve, context):
    server, page = serve(), context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    wait_for(page, 0)
    assert "token" not in page.url
    for done in range(10):
        assert page.text_content("#prompt") == f"Review {done}: was it any good?"
        assert HOSTILE in page.text_content("#left") + page.text_content("#right")
        # The better answer by the arrow keys, except for a tie by its button and a skip by its key.
        better = "ArrowLeft" if "tender" in page.text_content("#left") else "ArrowRight"
        if done == 3:
            page.click("#choose-tie")
        else:
            page.keyboard.press("s" if done == 4 else better)
        wait_for(page, done + 1)
    assert complaints == [] and page.title() == "Label pairs · PEFT Lab"
    assert not page.is_visible("#agreement-text")

    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    page.keyboard.press("ArrowLeft")  # for the eleventh pair: nobody is there to take it
    page.wait_for_selector("#alert:visible")
    assert "does not answer" in page.text_content("#alert") and len(journal(prefs)) == 10

    server = serve()
    page.goto(server.url)
    wait_for(page, 10)
    for done in range(10, 20):
        page.click("#choose-left")
        wait_for(page, done + 1)
    page.wait_for_selector("#done:visible")
    assert re.search(r"Agreement with the file\d+ of 18, \d+% \(95% interval", page.text_content("#result"))
    made = journal(prefs)
    assert [row["id"] for row in made] == [f"p{i}" for i in range(20)]
    assert [row["choice"] for row in made[:10]] == ["chosen"] * 3 + ["tie", "skip"] + ["chosen"] * 5
    assert all(row["choice"] == row["left"] for row in made[10:])

    page.click("#finish")
    page.wait_for_selector("#closed:visible")
    assert server.program.wait(30) == 0
    found = check_file(prefs.with_name("pairs.labelled.jsonl"), "preferences")
    assert not found.bad and len(found.records) == 18


def test_two_tabs_and_an_undo(prefs, serve, context):
    server, first, second = serve(), context.new_page(), context.new_page()
    for page in (first, second):
        page.goto(server.url)
        wait_for(page, 0)
    first.keyboard.press("ArrowLeft")
    wait_for(first, 1)
    second.evaluate("document.getElementById('choose-right').click()")  # a click on the pair that was labelled just now
    wait_for(second, 1)
    assert "another tab" in second.text_content("#status")
    assert second.text_content("#prompt").startswith("Review 1:") and len(journal(prefs)) == 1
    second.keyboard.press("u")
    wait_for(second, 0)
    assert [row["choice"] for row in journal(prefs)][1:] == ["undo"]
    assert server.end(signal.SIGINT) == 130
    assert prefs.with_name("pairs.labelled.jsonl").read_text() == ""
