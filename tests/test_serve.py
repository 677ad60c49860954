"""`peftlab serve` through the official client: a real server on a socket, with models of two layers behind it."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import tiny
import torch
from commands import peftlab
from serving import Server, adapter

from peftlab.data.check import check_file
from peftlab.models.adapter_files import load_stack
from peftlab.models.adapters import LoraVariants
from peftlab.models.backbone import causal_logits
from peftlab.recipes.serve import Shelf
from peftlab.sampling.sampler import Decoding, Sampler
from peftlab.web.app import MAX_API_BODY

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "a-key-of-this-test"
ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
SECRET = "the film was a secret"


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> SimpleNamespace:
    """A base, an adapter on it, one that stands on that adapter, and what serves all three."""
    folder = tmp_path_factory.mktemp("serve")
    base = str(tiny.causal_folder(folder / "base"))
    one = adapter(base, folder / "one", 1)
    over = adapter(base, folder / "over", 2, (Path(one),))
    shelf = Shelf("cpu", max_batch=8, want="positive")
    speakers, scorers = shelf.open([base, one, over, "rubric:length + 2*rubric:ended"])
    return SimpleNamespace(base=base, one=one, over=over, shelf=shelf, speakers=speakers, scorers=scorers)


@pytest.fixture(scope="module")
def server(house, tmp_path_factory) -> Iterator[Server]:
    running = Server(house, tmp_path_factory.mktemp("server"))
    yield running
    running.end()


@pytest.mark.parametrize("line", ["p(imdb-sentiment)", "imdb-sentiment", "0.5*p(imdb-sentiment)", "rubric:ended"])
def test_every_line_of_a_reward_scores(line):
    speakers, (scorer,) = Shelf("cpu", max_batch=8, want="positive").open([line])
    assert not speakers and len(scorer.score(["the film"], [" is good ."])[0]) == 1


@pytest.fixture
def started(house, tmp_path) -> Iterator[Any]:
    """Factory of servers with other limits."""
    running: list[Server] = []

    def start(**limits: Any) -> Server:
        running.append(Server(house, tmp_path, **limits))
        return running[-1]

    yield start
    for one in running:
        one.end()


@pytest.fixture
def held(monkeypatch, house) -> Iterator[threading.Event]:
    """No row gets on, until the event is set."""
    batch = next(iter(house.shelf.batches.values()))
    release, choose = threading.Event(), batch.choose
    monkeypatch.setattr(batch, "choose", lambda: release.wait(60) and choose())
    yield release
    release.set()


def greedy(name: str, prompt: str, count: int = 12) -> str:
    """What the stack, merged, says to a prompt."""
    backbone, _ = load_stack(name, device="cpu")
    sampler = Sampler(backbone.model, backbone.tokenizer)
    ids = backbone.tokenizer(prompt)["input_ids"]
    return sampler.texts(sampler.sample([ids], [0], Decoding(count, 0.0)))[0]


def test_every_stack_says_what_its_merged_copy_says(server, house):
    assert [model.id for model in server.client.models.list()][:3] == [house.base, house.one, house.over]
    assert len(house.shelf.batches) == 1, "one base for all three"
    said = []
    for name in (house.base, house.one, house.over):
        reply = server.client.completions.create(model=name, prompt="the film was", **ASKED)
        said.append(reply.choices[0].text)
        assert said[-1] == greedy(name, "the film was")
    assert len(set(said)) == 3


def test_what_is_no_sum_of_deltas_has_a_copy_of_its_own(house, tmp_path):
    variant = adapter(house.base, tmp_path / "dora", 3, lora=LoraVariants(r=4, alpha=8, dora=True))
    shelf = Shelf("cpu", max_batch=8, want="positive")
    plain, own = shelf.open([house.base, variant])[0]
    assert plain.batch is not own.batch and own.blend == ()
    ids = own.encode("the film was")
    said = own.batch.sampler.sample([ids], [0], Decoding(12, 0.0))
    assert own.batch.sampler.texts(said)[0] == greedy(variant, "the film was") != greedy(house.base, "the film was")


def test_a_chat_is_one_text_for_a_model_without_a_template(server, house):
    turns = [
        {"role": "user", "content": "the film"},
        {"role": "assistant", "content": " was"},
        {"role": "developer", "content": [{"type": "text", "text": "good"}]},
    ]
    reply = server.client.chat.completions.create(model=house.one, messages=turns, **ASKED)
    assert reply.choices[0].message.content == greedy(house.one, "the film was\ngood")
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == reply.usage.total_tokens
    assert reply.choices[0].finish_reason in ("stop", "length") and reply.object == "chat.completion"


def test_a_stream_is_the_reply_in_pieces(server, house):
    asked = {
        "model": house.one,
        "messages": [{"role": "user", "content": "a movie"}],
        "n": 2,
        "seed": 5,
        "max_tokens": 20,
        "temperature": 1.3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = server.client.chat.completions.create(**asked)
    options = {"include_usage": True}
    texts, tokens, finish, usage = ["", ""], [[], []], [None, None], None
    for event in server.client.chat.completions.create(**asked, stream=True, stream_options=options):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            finish[choice.index] = choice.finish_reason
    assert usage == whole.usage
    for index, choice in enumerate(whole.choices):
        assert (texts[index], finish[index]) == (choice.message.content, choice.finish_reason)
        assert "".join(token.token for token in tokens[index]) == texts[index]
        assert [t.token for t in tokens[index]] == [t.token for t in choice.logprobs.content]


def test_choices_are_draws_of_their_own_seeds(server, house):
    asked = {"model": house.base, "prompt": "it was", "max_tokens": 10, "temperature": 1.0, "top_p": 0.9}
    four = server.client.completions.create(**asked, n=4, seed=7).choices
    assert [choice.index for choice in four] == [0, 1, 2, 3] and len({choice.text for choice in four}) > 1
    alone = [server.client.completions.create(**asked, seed=7 + i).choices[0].text for i in range(4)]
    assert [choice.text for choice in four] == alone
    two = server.client.completions.create(**asked | {"prompt": ["it was", "a film"]}, n=2, seed=7).choices
    assert [choice.text for choice in two[:2]] == alone[:2] and len(two) == 4


def test_a_stop_ends_the_reply_before_it(server, house):
    asked = {"model": house.base, "prompt": "the", "max_tokens": 30, "temperature": 0}
    whole = server.client.completions.create(**asked).choices[0].text
    stop = whole[7:10]
    for stream in (False, True):
        reply = server.client.completions.create(**asked, stop=["never there", stop], stream=stream)
        choices = [event.choices[0] for event in reply] if stream else reply.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(server, house):
    prompt = "the plot was"
    reply = server.client.completions.create(
        model=house.over, prompt=prompt, max_tokens=15, temperature=0.5, seed=3, logprobs=4
    )
    told = reply.choices[0].logprobs
    backbone, _ = load_stack(house.over, device="cpu")
    ids = backbone.tokenizer(prompt)["input_ids"]
    said = Sampler(backbone.model, backbone.tokenizer).sample([ids], [3], Decoding(15, 0.5))
    count = len(told.tokens)
    logits = causal_logits(backbone.model, said.ids, said.mask, said.completion_ids.shape[1])[0, :count]
    wanted = logits.log_softmax(-1)
    chosen = wanted.gather(-1, said.completion_ids[0, :count, None])[:, 0]
    assert torch.allclose(torch.tensor(told.token_logprobs), chosen, atol=1e-4)
    best = [max(top.values()) for top in told.top_logprobs]
    assert torch.allclose(torch.tensor(best), wanted.amax(-1), atol=1e-4)
    assert "".join(told.tokens) == reply.choices[0].text
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(count)]


def test_fifty_at_once_are_answered_as_if_alone(server, house):
    """Of three stacks, with seeds, temperatures and lengths of their own, in a batch of 8."""

    def ask(i: int) -> str:
        name = (house.base, house.one, house.over)[i % 3]
        reply = server.client.completions.create(
            model=name,
            prompt="the film was " + "so " * (i % 7) + "good",
            max_tokens=4 + i % 20,
            seed=i,
            temperature=(0, 0.7, 1.0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
        )
        return reply.choices[0].text

    alone = [ask(i) for i in range(0, 50, 5)]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(ask, range(50)))
    assert together[::5] == alone


BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "nobody"}, 404, "model"),
    ({"model": "rubric:length + 2*rubric:ended"}, 400, "model"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 96}, 400, "prompt"),
    ({"prompt": "the " * 200}, 400, "prompt"),
    ({"prompt": [[5, 320]]}, 400, "prompt"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 9}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 17}, 400, "n"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"logit_bias": {"5": 1}}, 400, None),
    ({"echo": True}, 400, None),
    ({"extra_body": {"colour": "red"}}, 400, None),
]


@pytest.mark.parametrize(("change", "status", "param"), BAD)
def test_what_is_wrong_is_told_in_openais_shape(server, house, change, status, param):
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.completions.create(**{"model": house.base, "prompt": "a film", **ASKED, **change})
    assert caught.value.status_code == status and caught.value.type == "invalid_request_error"
    assert (caught.value.param or "").partition(".")[0] == (param or "") and caught.value.message
    assert isinstance(caught.value, openai.NotFoundError if status == 404 else openai.BadRequestError)


def test_half_a_surrogate_pair_is_no_text(server, house):
    """JSON can spell it; the official client cannot."""
    said = [{"role": "user", "content": "\ud800"}]
    for path, body in {
        "/v1/completions": {"model": house.base, "prompt": "\ud800"},
        "/v1/chat/completions": {"model": house.base, "messages": said},
        "/v1/score": {"model": "rubric:length + 2*rubric:ended", "prompt": "a film", "completion": ["\ud800"]},
    }.items():
        status, _, told = server.send("POST", path, body)
        assert status == 400 and "surrogate" in told["error"]["message"], path
    status, _, told = server.send("POST", "/v1/completions", {"model": house.base, "prompt": "a", "stop": [7]})
    assert status == 400 and told["error"]["param"].startswith("stop") and "function" not in str(told)


def test_what_changes_nothing_is_taken(server, house):
    reply = server.client.completions.create(
        model=house.base, prompt="a film", user="me", frequency_penalty=0, best_of=1, echo=False, **ASKED
    )
    assert reply.choices[0].text == greedy(house.base, "a film")


def test_scores_come_with_their_parts(server):
    body = {"model": "rubric:length + 2*rubric:ended", "prompt": "a film", "completion": [" was good.", " was"]}
    status, _, told = server.send("POST", "/v1/score", body)
    assert status == 200
    for row in told["data"]:
        assert row["score"] == pytest.approx(row["parts"]["length"] + 2 * row["parts"]["ended"])
    assert told["data"][0]["score"] != told["data"][1]["score"]
    assert server.send("POST", "/v1/score", body | {"extra": 1})[0] == 400


def test_a_client_that_leaves_gives_its_row_back(server, house, held):
    for stream in (True, False):
        body = json.dumps({"model": house.base, "prompt": "the", "max_tokens": 60, "stream": stream}).encode()
        client = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.until(lambda: server.health()["running"] == 1)
        client.close()
        server.until(lambda: server.batch.rows and server.worker._running[server.batch.rows[0]].ticket.left)
        held.set()
        server.until(lambda: server.health()["running"] == 0)
        held.clear()


def test_a_hundred_slow_clients_leave_health_alone(server, house):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    for number, client in enumerate(clients):
        client.sendall(head.encode() if number % 2 else f"{head}Content-Length: 1000\r\n\r\n".encode() + b'{"model"')
    assert server.health()["status"] == "ok"
    assert server.client.completions.create(model=house.base, prompt="a", **ASKED).choices[0].text
    for client in clients:
        client.close()


def test_a_full_queue_is_told_and_when_to_come_back(started, house, held):
    server = started(max_queue=2)
    with ThreadPoolExecutor(10) as pool:
        asked = {"model": house.base, "prompt": "a film", **ASKED}
        waiting = [pool.submit(server.client.completions.create, **asked) for _ in range(10)]
        server.until(lambda: server.worker.running + server.worker.waiting == 10)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.BadRequestError):
            server.client.completions.create(**asked, n=11)
        held.set()
        assert len({reply.result().choices[0].text for reply in waiting}) == 1


def test_what_takes_too_long_is_told(started, house, held):
    server = started(timeout=0.2)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            server.client.completions.create(model=house.base, prompt="a film", stream=stream, **ASKED)
        assert caught.value.status_code == 503 and caught.value.code == "timeout"
    held.set()
    server.until(lambda: server.health()["running"] == 0)


def test_a_model_that_fails_is_told_and_the_next_request_works(server, house, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(server.batch, "choose", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            server.client.completions.create(model=house.base, prompt="a film", **ASKED)
    assert server.client.completions.create(model=house.base, prompt="a film", **ASKED).choices[0].text
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_key_opens_the_api_and_nothing_else(started, house):
    server = started(key=KEY)
    assert server.client.completions.create(model=house.base, prompt="a", **ASKED).choices[0].text
    for wrong in ("wrong", KEY[:-1], server.token[:-1]):
        with pytest.raises(openai.AuthenticationError):
            server.as_program(wrong).completions.create(model=house.base, prompt="a", **ASKED)
        with pytest.raises(openai.AuthenticationError):
            server.as_program(wrong).models.list()
    assert server.send("GET", "/v1/models")[0] == 401
    for path in ("/", "/lab/models", "/static/lab.js"):
        assert server.send("GET", path, Authorization=f"Bearer {KEY}")[0] == 403
    assert server.send("GET", "/v1/models", Cookie=f"peftlab-{server.port}={server.token}")[0] == 200
    assert server.send("GET", "/health")[0] == 200


def test_other_sites_are_kept_out(server, house):
    """Without a key: a page of another site may reach this port, by its own name or by ours."""
    body = {"model": house.base, "prompt": "a", **ASKED}
    own = f"127.0.0.1:{server.port}"
    assert server.send("POST", "/v1/completions", body)[0] == 200
    assert server.send("POST", "/v1/completions", body, Host=f"evil.example:{server.port}")[0] == 403
    assert server.send("GET", "/health", Host=f"evil.example:{server.port}")[0] == 403
    assert server.send("POST", "/v1/completions", body, Origin="http://evil.example")[0] == 403
    assert server.send("POST", "/v1/completions", body, Sec_Fetch_Site="cross-site")[0] == 403
    assert server.send("GET", "/v1/models", Sec_Fetch_Site="cross-site")[0] == 403
    assert server.send("POST", "/v1/completions", body, Content_Type="text/plain")[0] == 400
    assert server.send("POST", "/v1/completions", body, Origin=f"http://{own}")[0] == 200
    for path in ("/", "/lab/models", "/static/lab.js"):
        assert server.send("GET", path)[0] == 403, "pages need the token"
    for path in ("/v1", "/v1/", "/v1/embeddings", "/v1/../lab/models", "/docs", "/openapi.json"):
        assert server.send("GET", path)[0] in (403, 404)


def test_a_body_may_be_so_long_and_no_longer(server):
    body = json.dumps({"model": "x", "prompt": "a" * MAX_API_BODY}).encode()
    for _ in range(2):
        status, headers, told = server.send("POST", "/v1/completions", body)
        assert status == 413 and told["error"]["type"] == "invalid_request_error"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert server.send("POST", "/v1/completions", b"{")[0] == 400


def test_the_log_tells_what_a_request_cost_and_not_what_it_said(server, house):
    before = len(server.log)
    server.client.completions.create(model=house.one, prompt=SECRET, **ASKED)
    server.until(lambda: len(server.log) > before)
    row = server.log[-1]
    assert row["status"] == 200 and row["model"] == house.one and row["completion_tokens"] <= 12
    assert row["seconds"] >= row["first_s"] >= row["queued_s"] >= 0
    assert SECRET not in json.dumps(server.log)
    server.app.texts = True
    server.client.completions.create(model=house.one, prompt=SECRET, **ASKED)
    server.until(lambda: SECRET in json.dumps(server.log[-1]))
    server.app.texts = False
    server.send("GET", f"/?token={server.token}")
    server.until(lambda: server.log[-1]["path"] == "/")
    assert server.token not in json.dumps(server.log)


def test_a_preference_is_a_pair_and_a_line_of_the_journal(server, house, monkeypatch):
    def prefer(choice: str, left: str = " is good") -> tuple[int, Any]:
        body = {
            "messages": [{"role": "user", "content": "a film"}],
            "choice": choice,
            "seconds": 1.5,
            "left": {"model": house.base, "text": left},
            "right": {"model": house.one, "text": " is bad"},
        }
        status, _, told = server.send("POST", "/lab/preference", body, Authorization=f"Bearer {server.token}")
        return status, told

    assert [prefer(choice) for choice in ("right", "tie", "left")] == [(200, {"kept": n}) for n in (1, 2, 3)]
    assert prefer("both")[0] == 422
    for left in ("", " is bad", "a\x04b"):
        assert prefer("left", left)[0] == 400
    kept = server.folder
    found = check_file(kept / "kept.labelled.jsonl", "preferences")
    assert not found.bad and [pair.chosen for pair in found.records] == [" is bad", " is good"]
    waiting = {"id": "file-1", "prompt": "a film", "chosen": " is long", "rejected": " is short"}
    with (kept / "kept.jsonl").open("a") as file:
        file.write(json.dumps(waiting) + "\n")
    assert prefer("left", " is fine") == (200, {"kept": 5})
    choices = [json.loads(line) for line in (kept / "kept.labels.jsonl").read_text().splitlines()]
    assert len(choices) == 4 and "file-1" not in {choice["id"] for choice in choices}, "it waits for a person"
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    done = peftlab("label {file}", file=str(kept / "kept.jsonl"))
    assert done.code == 0 and "3 with a winner, 1 tied" in done.out, "`peftlab label` goes on from the same files"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--host 0.0.0.0", "needs a key"),
        ("--host 0.0.0.0 --api-key-env NO_SUCH_VARIABLE_OF_OURS", "holds no key"),
        ("--api-key-file /no/such/file", "cannot be read"),
        ("--max-batch 0", "--max-batch 0"),
        ("--timeout 0", "--timeout"),
        ("{base}", "stands there twice"),
        ("--prefs pairs.csv", "ends in .jsonl"),
        ("nobody-knows-this", "nobody-knows-this"),
    ],
)
def test_what_cannot_be_served_is_refused(house, line, told):
    done = peftlab(f"serve {house.base} {line} --port 0".format(base=house.base))
    assert done.code == 2 and told in done.err and "Traceback" not in done.err
