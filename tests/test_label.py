"""`peftlab label`: the journal under any sequence of choices and crashes, the terminal, and the guarded web app."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from commands import peftlab, program
from fastapi import APIRouter
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data.check import check_file
from peftlab.data.labels import Journal, left_of, read_pairs
from peftlab.errors import LabError, UserError
from peftlab.evaluation.intervals import wilson
from peftlab.recipes.label import summary
from peftlab.runs.lock import locked_file
from peftlab.web.app import MAX_BODY, create_app
from peftlab.web.label import label_router

HOSTILE = "</p><script>document.title = 'hacked'</script><img src=x onerror=alert(1)>"
KEY = {"left": "a", "right": "d"}


def rows(count: int) -> list[dict]:
    texts = {"prompt": "Prompt", "chosen": "good", "rejected": "bad"}
    return [{"id": f"p{i}"} | {name: f"{text} {i}" for name, text in texts.items()} for i in range(count)]


def write(folder: Path, *given: dict, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Started:
    """A journal as a start of the program holds it."""

    def __init__(self, prefs: Path, path: Path, seed: int = 0) -> None:
        self.holding = locked_file(path)
        try:
            self.journal = Journal(path, self.holding.__enter__(), read_pairs(prefs), seed)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self.holding.__exit__(None, None, None)


@pytest.fixture
def start(tmp_path):
    """Factory: rows -> the Started of a journal beside them; `start()` again is the next start."""
    running: list[Started] = []

    def begin(*given: dict, seed: int = 0) -> Started:
        if given:
            write(tmp_path, *given)
        while running:
            running.pop().end()
        running.append(Started(tmp_path / "pairs.jsonl", tmp_path / "j.jsonl", seed))
        return running[0]

    yield begin
    for started in running:
        started.end()


STEPS = st.lists(
    st.one_of(
        st.sampled_from(["left", "right", "tie", "skip", "undo", "restart"]),
        st.tuples(st.just("torn"), st.integers(1, 190)),
    ),
    max_size=25,
)


@given(steps=STEPS, seed=st.integers(0, 3))
def test_any_history_leaves_the_state_that_its_choices_make(steps, seed, tmp_path_factory):
    """Against a stack of what was said: restarts and torn tails change nothing, and an undo takes the top."""
    folder = tmp_path_factory.mktemp("journal")
    prefs, path = write(folder, *rows(6)), folder / "j.jsonl"
    said: list[tuple[str, str]] = []
    written = 0
    started = Started(prefs, path, seed)
    for step in steps:
        journal = started.journal
        if step == "restart" or isinstance(step, tuple):
            started.end()
            if isinstance(step, tuple):
                whole = {"choice": "chosen", "id": "p5", "left": "chosen", "time": "now", "texts": "x" * 120}
                with path.open("a") as file:
                    file.write(json.dumps(whole)[: step[1]])
            started = Started(prefs, path, seed)
            assert started.journal.cut == (step[1] if isinstance(step, tuple) else 0)
        elif step == "undo":
            assert journal.undo() == bool(said)
            written += bool(said)
            del said[-1:]
        elif (pair := journal.current()) is not None:
            sides = journal.sides(pair)
            journal.choose(step, 1.5)
            written += 1
            said.append((pair.record.id, {"tie": "tie", "skip": "skip"}.get(step) or sides[step]))
    told = {"good": "chosen", "bad": "rejected"}
    made = [(identity, choice.choice) for identity, choice in started.journal.choices.items()]
    assert made == [(identity, told.get(text.split()[0], text)) for identity, text in said]
    assert started.journal.position == len(lines(path)) == written
    preferred = [text for _, text in said if text[0] in "gb"]
    assert [row["chosen"] for row in started.journal.labelled()] == preferred
    started.end()


def test_the_side_is_a_coin_of_seed_and_id(start):
    first = {seed: [left_of(seed, f"p{i}") for i in range(400)] for seed in (0, 1)}
    assert first[0] != first[1]
    assert all(140 < Counter(sides)["chosen"] < 260 for sides in first.values())
    journal = start(*rows(30)).journal
    shown = [journal.sides(pair)["left"] for pair in journal.pairs]
    assert shown == [start().journal.sides(pair)["left"] for pair in journal.pairs]
    assert {text.split()[0] for text in shown} == {"good", "bad"}


def test_a_choice_is_on_disk_when_choose_returns(start, tmp_path):
    journal = start(*rows(3)).journal
    journal.choose("left", 2.345)
    (line,) = lines(tmp_path / "j.jsonl")
    assert line["id"] == "p0" and line["choice"] == line["left"] and line["seconds"] == pytest.approx(2.345, abs=0.006)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["time"])


def test_where_the_person_differs_the_row_is_turned_round(start):
    row = rows(1)[0] | {"margin": 2.0, "label": 1, "score_chosen": 3, "score_rejected": 1}
    row["parts"] = {"chosen": {"eos": 1}, "rejected": {"eos": 0}}
    journal = start(row).journal
    journal.choose("right" if journal.sides(journal.pairs[0])["left"] == "good 0" else "left", 1)
    assert list(journal.labelled()) == [
        {
            "id": "p0", "prompt": "Prompt 0", "chosen": "bad 0", "rejected": "good 0", "label": 1,
            "score_chosen": 1, "score_rejected": 3, "parts": {"chosen": {"eos": 0}, "rejected": {"eos": 1}},
        }
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r[0].update(chosen="better"), "1: the texts of pair 'p0' changed"),
        (lambda r: r[1].update(chosen=r[1]["rejected"], rejected=r[1]["chosen"]), "2: the texts of pair 'p1' changed"),
        (lambda r: r.pop(0), "1: pair 'p0' is not in the file now"),
    ],
)
def test_a_file_that_changed_under_its_labels_is_refused(start, change, told):
    journal = start(*rows(3)).journal
    journal.choose("left", 1)
    journal.choose("tie", 1)
    changed = rows(3)
    change(changed)
    with pytest.raises(UserError, match=told):
        start(*changed)


def test_new_rows_and_another_order_go_on(start):
    start(*rows(2)).journal.choose("left", 1)
    journal = start(rows(4)[3], *rows(2)).journal
    assert len(journal.choices) == 1 and journal.current().record.id == "p3"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("my notes", "j.jsonl:1: no line of"),
        ("my notes\n", "j.jsonl:1: no line of"),
        ('{"id": "p0", "prompt": "x"}\n', "j.jsonl:1: no line of"),
        ('{"choice": "left", "id": "p0", "left": "chosen", "texts": "HASH"}\n', "j.jsonl:1: choice: 'left' is no"),
        ('{"choice": "undo", "id": "p0", "texts": "HASH"}\n', "j.jsonl:1: takes back pair 'p0'"),
        ('{"choice": "tie", "id": "p0", "left": "chosen", "texts": "HASH"}\n' * 2, "j.jsonl:2: pair 'p0' is labelled"),
        ('{"choice": "tie", "id\n{"choice": "tie", "id": "p0"}\n', "j.jsonl:1: no line of"),
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(start, tmp_path, text, told):
    texts = read_pairs(write(tmp_path, *rows(2)))[0].texts
    (tmp_path / "j.jsonl").write_text(text.replace("HASH", texts))
    with pytest.raises(UserError, match=told):
        start(*rows(2))
    assert (tmp_path / "j.jsonl").read_text() == text.replace("HASH", texts)


@pytest.mark.parametrize("tail", [b"\0" * 40, b'{"choice": "ti\0\0\0\0\0\n', b"\0\0\0\0te\", \"id\": 3}\n", b"{"])
def test_what_a_power_cut_leaves_is_cut_off(start, tmp_path, tail):
    start(*rows(2)).journal.choose("tie", 1)
    whole = (tmp_path / "j.jsonl").read_bytes()
    (tmp_path / "j.jsonl").write_bytes(whole + tail)
    assert start().journal.cut == len(tail)
    assert (tmp_path / "j.jsonl").read_bytes() == whole


def test_a_journal_that_another_program_changed_is_not_written_on(start, tmp_path):
    path = tmp_path / "j.jsonl"
    journal = start(*rows(3)).journal
    journal.choose("tie", 1)
    saved = path.read_bytes()
    for meddle in (lambda: path.write_bytes(saved + b"\n"), path.unlink):
        meddle()
        with pytest.raises(LabError, match="changed or moved"):
            journal.choose("left", 1)
        assert journal.position == 1


def test_wilson():
    """Against the interval's own definition: each end is where the score test of the share is just 5%."""
    for hits, cases in [(0, 5), (5, 5), (14, 18), (1, 1), (500, 1000)]:
        low, high = wilson(hits, cases)
        assert 0 <= low <= hits / cases <= high <= 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(hits / cases - end) / (end * (1 - end) / cases) ** 0.5 == pytest.approx(1.959964)


# The terminal.


def test_the_terminal_labels_and_goes_on(tmp_path):
    prefs = write(tmp_path, *rows(5))
    keys = [KEY["left" if left_of(0, f"p{i}") == "chosen" else "right"] for i in range(5)]
    first = program("label {p}", text=f"{keys[0]}\nwhat\nt\nu\nu\n{keys[0]}\nTie\n", p=str(prefs))
    assert first.code == 0, first.err
    assert "expected one of" in first.out and "2 of 5 pairs are labelled" in first.out
    assert [row["choice"] for row in lines(tmp_path / "pairs.labels.jsonl")] == [
        "chosen", "tie", "undo", "undo", "chosen", "tie"
    ]
    wrong = {"a": "d", "d": "a"}[keys[2]]
    second = program("label {p}", text=f"{wrong}\ns\n{keys[4]}\nu\n{keys[4]}\nq\n", p=str(prefs))
    assert "Prompt 2" in second.out and "Prompt 0" not in second.out and "all pairs are labelled" in second.out
    assert "3 with a winner, 1 tied, 1 skipped" in second.out
    assert "agrees with the file's order in 2 of 3: 0.667 (95% interval 0.208 to 0.939)" in second.out
    found = check_file(tmp_path / "pairs.labelled.jsonl", "preferences")
    assert not found.bad and [r.chosen for r in found.records] == ["good 0", "bad 2", "good 4"]
    assert program("label {p}", text="", p=str(prefs)).code == 0


def test_the_terminal_shows_texts_and_obeys_none(tmp_path):
    row = {"prompt": "a\x9b31mred", "chosen": "[bold]x[/bold] \u202eabc", "rejected": "y \x9d0;title\x9c z"}
    done = program("label {p}", p=str(write(tmp_path, row)))
    assert done.code == 0 and "[bold]x[/bold] abc" in done.out and "ared" in done.out and "title" not in done.out
    assert not re.search("[\x1b\x80-\x9f\u202e]", done.out)


def test_label_needs_no_torch():
    code = "import sys, peftlab.cli, peftlab.recipes.label, peftlab.web.label, peftlab.web.serve\n"
    code += "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("web", ["", "--web"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_everything_saved(tmp_path, signum, web):
    prefs = write(tmp_path, *rows(3))
    program("label {p}", text="a\n", p=str(prefs))
    (tmp_path / "pairs.labelled.jsonl").unlink()
    command = [sys.executable, "-m", "peftlab.cli", "label", str(prefs), *web.split()]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown = b""
    while (b"Ctrl+C ends" if web else b"q quit >") not in shown:
        shown += os.read(running.stdout.fileno(), 4096)
    running.send_signal(signum)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signum
    assert b"1 of 3 pairs are labelled and saved; the same command goes on" in err and b"Traceback" not in err
    assert [row["id"] for row in lines(tmp_path / "pairs.labelled.jsonl")] == ["p0"]


def refused(line: str, **names: str) -> str:
    outcome = peftlab(line, **names)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    return outcome.err


def test_what_cannot_be_labelled_is_refused(tmp_path):
    prefs = write(tmp_path, *rows(2))
    p, folder = str(prefs), str(tmp_path)
    bad = write(tmp_path, rows(1)[0], {"prompt": "x", "chosen": "y"}, name="bad.jsonl")
    assert f"{bad}:2: rejected: missing" in refused("label {bad}", bad=str(bad))
    assert not (tmp_path / "bad.labels.jsonl").exists()
    assert "no such file" in refused("label {folder}/none.jsonl", folder=folder)
    assert "holds no pair" in refused("label {e}", e=str(write(tmp_path, name="e.jsonl")))
    assert "ends in .jsonl" in refused("label {folder}/x.csv", folder=folder)
    assert "would write over" in refused("label {p} --output {p}", p=p)
    own = write(tmp_path, *rows(2), name="a.labelled.jsonl")
    assert "would write over" in refused("label {own} --output {folder}/a.labels.jsonl", own=str(own), folder=folder)
    assert "without its journal" in refused("label {p} --output {folder}/a.labels.jsonl", p=p, folder=folder)
    assert "cannot be opened" in refused("label {p} --output {folder}/no/x.jsonl", p=p, folder=folder)
    assert "with --web only" in refused("label {p} --port 80", p=p)
    assert prefs.read_text() == "".join(json.dumps(row) + "\n" for row in rows(2))


def test_a_second_process_on_one_journal_is_refused(tmp_path):
    prefs = write(tmp_path, *rows(2))
    with locked_file(tmp_path / "pairs.labels.jsonl"):
        assert "is in use by another process" in refused("label {p}", p=str(prefs))


def test_a_port_that_is_taken_is_refused(tmp_path):
    from peftlab.web.serve import Loopback

    p, taken = str(write(tmp_path, *rows(1))), Loopback()
    assert f"--port {taken.port}" in refused("label {p} --web --port {n}", p=p, n=str(taken.port))
    assert "--port 99999" in refused("label {p} --web --port 99999", p=p)
    taken.close()


# The web app.

TOKEN, BASE = "a-token-of-this-start", "http://127.0.0.1:4321"


class Tab:
    """A client of the app that has the token, and the journal behind it."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.finished = journal, threading.Event()
        router = label_router(journal, "pairs.jsonl", lambda: summary(journal), self.finished.set)
        crash = APIRouter()
        crash.add_api_route("/crash", lambda: 1 / 0)
        self.app = create_app(TOKEN, 4321, [router, crash])
        self.stranger = TestClient(self.app, base_url=BASE, follow_redirects=False, raise_server_exceptions=False)
        self.client = TestClient(
            self.app, base_url=BASE, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False
        )

    def state(self) -> dict:
        return self.client.get("/label/state").json()

    def choose(self, state: dict, choice: str = "left", **more: object):
        body = {"id": state["pair"]["id"], "position": state["position"], "choice": choice, "seconds": 1.0}
        return self.client.post("/label/choose", json=body | more)


@pytest.fixture
def tab(start):
    row = {"id": HOSTILE, "prompt": HOSTILE, "chosen": HOSTILE + "1", "rejected": HOSTILE + "2"}
    return Tab(start(row, *rows(4)).journal)


def told(reply, status: int) -> str:
    """The message of an error, whose shape is the same for all."""
    assert reply.status_code == status
    (found,) = reply.json().values()
    assert found.keys() == {"type", "message"} and reply.json().keys() == {"error"}
    return found["message"]


PATHS = ["/", "/label", "/label/state", "/static/label.js", "/docs", "/openapi.json", "/crash"]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_served_without_the_token(tab, path):
    for wrong in ("Bearer ", "Bearer wrong", "Bearer tökén".encode(), f"Bearer {TOKEN[:-1]}"):
        assert "token" in told(tab.stranger.get(path, headers={"Authorization": wrong}), 403)
    assert "token" in told(tab.stranger.get(path, headers={"Cookie": "peftlab-4321=x"}), 403)
    assert "token" in told(tab.stranger.get(path + "?token="), 403)
    assert "token" in told(tab.stranger.post(path, json={}), 403)


@pytest.mark.parametrize("host", ["evil.example:4321", "127.0.0.1", "127.0.0.1:99", "127.0.0.1.evil.example:4321", ""])
def test_another_host_is_refused_with_the_token_too(tab, host):
    assert "answers to" in told(tab.client.get("/label/state", headers={"Host": host}), 403)


@pytest.mark.parametrize(
    ("port", "host", "right", "wrong"),
    [
        (80, "127.0.0.1", ["127.0.0.1", "localhost", "[::1]", "localhost:80"], ["evil.example", "127.0.0.1:81"]),
        (4321, "127.0.0.2", ["127.0.0.2:4321", "127.0.0.1:4321", "LOCALHOST:4321"], ["127.0.0.3:4321", "127.0.0.2"]),
    ],
)
def test_this_host_is_known_by_each_name_that_it_has(port, host, right, wrong):
    """A client leaves out HTTP's own port; another address of this machine may be listened to."""
    client = TestClient(create_app(TOKEN, port, [], host=host), headers={"Authorization": f"Bearer {TOKEN}"})
    found = {name: client.get("/static/label.js", headers={"Host": name}).status_code for name in right + wrong}
    assert found == dict.fromkeys(right, 200) | dict.fromkeys(wrong, 403)


def test_the_token_of_the_url_becomes_a_cookie(tab):
    reply = tab.stranger.get(f"/label?token={TOKEN}")
    assert reply.status_code == 303 and reply.headers["location"] == "/label"
    assert {"httponly", "samesite=strict"} <= set(reply.headers["set-cookie"].lower().split("; "))
    assert tab.stranger.get("/label").status_code == 200  # by the cookie now
    away = tab.stranger.get(f"{BASE}//evil.example/x?token={TOKEN}")
    assert away.headers["location"].startswith("/evil")


@pytest.mark.parametrize("path", [*PATHS, "/label?token=wrong", f"/label?token={TOKEN}"])
def test_every_reply_has_the_security_headers(tab, path):
    for client in (tab.client, tab.stranger):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["script-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


def test_errors_have_one_shape(tab):
    told(tab.client.get("/none"), 404)
    told(tab.client.get("/static/none.js"), 404)
    told(tab.client.get("/static/../app.py"), 404)
    told(tab.client.get("/label/choose"), 405)
    assert "ZeroDivisionError" in told(tab.client.get("/crash"), 500)


@pytest.mark.parametrize(
    "more", [{"choice": "chosen"}, {"seconds": -1}, {"seconds": "NaN"}, {"position": "x"}, {"extra": 1}, {"id": 3}]
)
def test_a_malformed_choice_is_refused(tab, more):
    told(tab.choose(tab.state(), **more), 422)
    assert tab.state()["position"] == 0


def test_a_body_must_be_json_short_and_from_our_own_page(tab):
    body = json.dumps({"id": HOSTILE, "position": 0, "choice": "left", "seconds": 1})
    post, json_type = tab.client.post, {"Content-Type": "application/json"}
    told(post("/label/choose", content=body), 415)
    told(post("/label/choose", content=body, headers={"Content-Type": "text/plain"}), 415)
    told(post("/label/choose", content=body, headers=json_type | {"Origin": "http://127.0.0.1:99"}), 403)
    told(post("/label/choose", content=body, headers=json_type | {"Origin": "null"}), 403)
    told(post("/label/choose", content=body + " " * MAX_BODY, headers=json_type), 413)
    told(post("/label/choose", content=iter([b" " * 4096] * 17), headers=json_type), 413)  # no Content-Length
    told(post("/label/choose", content=b"{", headers=json_type), 422)
    assert tab.state()["position"] == 0
    assert post("/label/choose", content=body, headers=json_type | {"Origin": BASE}).status_code == 200


def test_a_reply_never_tells_which_answer_is_the_chosen_one(tab):
    assert tab.state()["pair"].keys() == {"id", "prompt", "left", "right"}


def test_a_choice_is_on_disk_before_its_reply(tab):
    for number in range(1, 4):
        reply = tab.choose(tab.state(), "tie")
        assert reply.json()["position"] == number == len(lines(tab.journal.path))


def test_a_stale_tab_changes_nothing(tab):
    old = tab.state()
    assert tab.choose(old).status_code == 200
    told(tab.choose(old), 409)  # the same click twice, or another tab
    told(tab.choose(tab.state() | {"pair": old["pair"]}), 409)  # the right position with another pair
    for path in ("/label/undo", "/label/finish"):
        told(tab.client.post(path, json={"position": old["position"]}), 409)
    assert tab.state()["position"] == len(lines(tab.journal.path)) == 1 and not tab.finished.is_set()


def test_many_tabs_at_once_write_each_choice_once(tab):
    old, codes = tab.state(), []
    threads = [threading.Thread(target=lambda: codes.append(tab.choose(old).status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] + [409] * 7
    assert len(lines(tab.journal.path)) == 1


def test_undo_and_finish(tab):
    told(tab.client.post("/label/undo", json={"position": 0}), 409)
    first = tab.state()["pair"]
    while (state := tab.state())["pair"]:
        tab.choose(state)
    assert state["done"] == state["total"] == 5 and state["summary"]["left"] == 5
    for _ in range(5):
        state = tab.client.post("/label/undo", json={"position": state["position"]}).json()
    assert state["position"] == 10 and state["done"] == 0 and state["pair"] == first
    assert tab.client.post("/label/finish", json={"position": 10}).status_code == 200 and tab.finished.is_set()


def test_a_full_disk_is_told_and_nothing_counts(tab, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert "No space left" in told(tab.choose(tab.state()), 500)
    assert tab.state()["position"] == 0 and lines(tab.journal.path) == []
    assert tab.choose(tab.state()).status_code == 200


def test_the_page_is_fixed_and_its_script_puts_texts_in_as_text(tab):
    page, script = tab.client.get("/label").text, tab.client.get("/static/label.js").text
    assert "script>document" not in page and not re.search(r"<script>|\son\w+=|style=|https?:|//\w", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\.style\b|https?:", script)
