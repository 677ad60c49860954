"""The page of `peftlab serve` in a real browser: Chromium, headless, driven by keys and clicks as a person would."""

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
import tiny
from serving import adapter

from peftlab.data.check import check_file

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")
HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"
IDLE = "body[data-busy=false]"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The URL that `peftlab serve` prints, and the folder it works in."""
    folder = tmp_path_factory.mktemp("page")
    base = tiny.causal_folder(folder / "base")
    adapter(str(base), folder / "one", 1)
    # Names as a person gives them: relative ones.
    command = [sys.executable, "-m", "peftlab.cli", "serve", "base", "one", "rubric:length", "--port", "0"]
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
    )
    printed = ""
    while "Ctrl+C ends" not in printed:
        line = program.stdout.readline()
        assert line, program.stderr.read()
        printed += line
    yield re.search(r"open (\S+)", printed)[1], folder
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 130 and "Traceback" not in err
    rows = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert rows and "the film" not in err and "token=" not in err


@pytest.fixture
def page(served) -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Containers run as root, where Chromium's own sandbox cannot start.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1100, "height": 760})
        context.set_default_timeout(30_000)
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(served[0])
        page.wait_for_selector(IDLE)
        assert "token" not in page.url
        yield page
        assert complaints == [] and page.title() == "PEFT Lab"
        browser.close()


def say(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector(IDLE)


def stream(text: str) -> str:
    """A reply of one token, as the server would send it."""
    told = {"token": text, "logprob": -9.0, "bytes": [], "top_logprobs": []}
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [told]}, "finish_reason": "stop"}
    return f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"


def test_a_conversation_by_keys_alone(page):
    page.click("#settings summary")
    page.fill("#max-tokens", "12")
    page.select_option("#scorer", "rubric:length")
    say(page, f"the film {HOSTILE}"[:60])
    page.wait_for_selector(".note:has-text('score')")
    reply = page.text_content(".answer .text")
    assert len(reply) > 3 and re.search(r"\d+ tokens.*mean log-probability", page.text_content(".note"))

    page.keyboard.press("Shift+Tab")  # from the message to the reply, whose first token tells its numbers
    numbers = [page.text_content("#readout")]
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        numbers.append(page.text_content("#readout"))
    assert all(re.match(rf'token {i} ".*": log-probability [−\d.]+, [\d.e+-]+%', n) for i, n in enumerate(numbers, 1))
    page.keyboard.press("End")
    assert page.evaluate("document.querySelectorAll('.token.at').length") == 1
    page.focus("#text")
    assert page.text_content("#readout").strip() == ""

    page.fill("#max-tokens", "6")
    say(page, "it was")
    assert page.locator("#turns > li").count() == 4
    page.click("#new")
    assert page.locator("#turns > li").count() == 0


def test_two_models_side_by_side_and_a_choice_that_is_kept(page, served):
    page.check("#compare")
    says = {"base": " a dull film", "one": " a fine film"}  # random models say what no file of pairs may hold
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=stream(says[route.request.post_data_json["model"]]))
    )
    for number, key in enumerate(("2", "t", "1"), 1):
        say(page, "the film was")
        page.wait_for_selector("#judge:visible")
        left, right = page.locator(".theirs").last.locator(".answer").all()
        titles = [left.locator("h2").text_content(), right.locator("h2").text_content()]
        a, b = left.bounding_box(), right.bounding_box()
        assert a["x"] + a["width"] <= b["x"] and a["y"] == b["y"], "side by side"
        assert b["y"] + b["height"] <= page.locator("footer").bounding_box()["y"], "the footer covers neither"
        assert right.locator(".text").text_content() == says["one"].strip(), "no indentation"
        if number == 3:
            page.set_viewport_size({"width": 400, "height": 760})
            buttons = [button.bounding_box()["y"] for button in page.locator("[data-choice]").all()]
            assert len(buttons) == 3 and len(set(buttons)) == 1, "the three choices stand in one row on a phone"
        page.keyboard.press(key)
        page.wait_for_selector(f".note:has-text('kept as pair {number}')")
        page.wait_for_selector(IDLE)
    assert titles == ["Left: base", "Right: one"]
    found = check_file(served[1] / "preferences.labelled.jsonl", "preferences")
    assert not found.bad and [pair.chosen for pair in found.records] == [says["one"], says["base"]]
    # The better answer went on as the model's turn, of a tie the left one.
    assert found.records[1].prompt == "the film was a fine film\nthe film was a dull film\nthe film was"
    page.set_viewport_size({"width": 420, "height": 760})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out on a phone"


def test_what_a_model_says_is_text_and_an_error_takes_the_turn_back(page):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream(HOSTILE)))
    say(page, "the film")
    assert page.text_content(".answer .text") == HOSTILE
    assert "p3" in page.get_attribute("#turns .token", "class")
    broken = 'data: {"error": {"message": "the model failed"}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=broken))
    say(page, "once more")
    assert page.text_content("#alert-text") == "the model failed"
    assert page.input_value("#text") == "once more" and page.locator("#turns > li").count() == 2
    page.unroute("**/v1/chat/completions")
    page.fill("#text", "")


def test_a_reply_can_be_stopped(page):
    page.click("#settings summary")
    page.fill("#max-tokens", "90")
    page.fill("#text", "the film")
    page.press("#text", "Enter")
    page.wait_for_selector("#turns .token", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector(IDLE)
    assert page.text_content(".note")
