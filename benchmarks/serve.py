"""`peftlab serve` over HTTP: many requests at once beside the same ones one by one, and how quick /health stays.

One JSON line a row. `serve`: `ours_s` is what all requests at once take, `peer_s` ("one by one") the same requests
after each other; medians of alternating rounds. `health`: `ours_s` is the longest of 20 looks while `batch` clients
hold half-sent requests open and the model writes.

    python benchmarks/serve.py [--models tiny-gpt2] [--requests 50] [--tokens 32] [--max-batch 32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from peftlab.recipes.serve import Shelf
from peftlab.web.api import Api, api_router
from peftlab.web.app import Programs, create_app
from peftlab.web.serve import Listener
from peftlab.web.worker import Worker

SLOW_CLIENTS, LOOKS = 100, 20


def ask(port: int, model: str, number: int, tokens: int) -> int:
    """One request; how many tokens came."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"model": model, "prompt": f"Film number {number} was", "max_tokens": tokens, "seed": number}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    told = json.loads(connection.getresponse().read())
    connection.close()
    assert "usage" in told, told
    return int(told["usage"]["completion_tokens"])


def seconds(run: Callable[[], object]) -> float:
    """What a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def look(port: int) -> None:
    """One request to /health."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def slowest_look(port: int, busy: Callable[[], object]) -> float:
    """The longest of LOOKS at /health, with SLOW_CLIENTS connected and the model at work."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(SLOW_CLIENTS)]
    for client in slow:
        client.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b'{"model"')
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(busy)
        longest = max(seconds(lambda: look(port)) for _ in range(LOOKS))
        work.result()
    for client in slow:
        client.close()
    return longest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["tiny-gpt2"])
    parser.add_argument("--device", default="cpu")
    for name, value in (("requests", 50), ("tokens", 32), ("max-batch", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    shelf = Shelf(args.device, args.max_batch, "positive")
    speakers, _ = shelf.open(args.models)
    worker, listener = Worker(list(shelf.batches.values()), args.requests), Listener("127.0.0.1")
    app = create_app(listener.token, listener.port, [api_router(Api(worker, speakers, timeout=3600))], Programs())
    worker.start()
    server = threading.Thread(target=listener.run, args=(app,))
    server.start()

    def one(number: int) -> int:
        return ask(listener.port, args.models[number % len(args.models)], number, args.tokens)

    def together() -> int:
        with ThreadPoolExecutor(args.requests) as pool:
            return sum(pool.map(one, range(args.requests)))

    def after_each_other() -> int:
        return sum(map(one, range(args.requests)))

    try:
        tokens = together()  # warm as well
        ours, peer = [], []
        for _ in range(args.rounds):
            ours.append(seconds(together))
            peer.append(seconds(after_each_other))
        about = {"device": args.device, "dtype": "float32", "model": " ".join(args.models)}
        mid = statistics.median(ours), statistics.median(peer)
        row = {"what": "serve", **about, "batch": args.requests, "tokens": tokens, "ours_s": round(mid[0], 3)}
        row |= {"peer": "one by one", "peer_s": round(mid[1], 3), "ratio": round(mid[1] / mid[0], 2)}
        print(json.dumps(row), flush=True)
        longest = slowest_look(listener.port, together)
        print(json.dumps({"what": "health", **about, "batch": SLOW_CLIENTS, "ours_s": round(longest, 4)}))
    finally:
        listener.stop()
        server.join()
        worker.close()
        listener.close()


if __name__ == "__main__":
    main()
