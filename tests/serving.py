"""A server of the lab on a socket of this process, and adapters to serve."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

import openai
import torch

from peftlab.models.adapter_files import save_adapter
from peftlab.models.adapters import PolicyLora, adapter_parameters, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.stacks import Stack
from peftlab.recipes.served_preferences import Preferences
from peftlab.web.api import Api, api_router
from peftlab.web.app import Programs, create_app
from peftlab.web.log import Log
from peftlab.web.page import page_router
from peftlab.web.serve import Listener
from peftlab.web.worker import Worker

SMALL = PolicyLora(r=4, alpha=8)


def adapter(base: str, folder: Path, seed: int, under: tuple[Path, ...] = (), lora: PolicyLora = SMALL) -> str:
    """A LoRA that says something else than its base."""
    backbone = load_backbone(base, device="cpu")
    model = attach(backbone.model, lora, "policy", base=base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "policy").items():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return str(save_adapter(model, "policy", folder, Stack("causal", base, backbone.fingerprint, under)))


class Server:
    """The app on a socket, run by a thread; `log` gains its lines."""

    def __init__(self, house: Any, folder: Path, key: str | None = None, max_queue: int = 64, timeout: float = 60):
        self.log, self.folder = list[dict[str, Any]](), folder
        self.batch = next(iter(house.shelf.batches.values()))
        self.worker = Worker([self.batch], max_queue)
        self.listener = Listener("127.0.0.1")
        self.port, self.token = self.listener.port, self.listener.token
        api = Api(self.worker, house.speakers, house.scorers, timeout)
        routers = [api_router(api), page_router(api, Preferences(folder / "kept.jsonl"))]
        app = create_app(self.token, self.port, routers, Programs(key))
        self.app = Log(app, self.log.append)
        self.worker.start()
        self._thread = threading.Thread(target=self.listener.run, args=(self.app,), daemon=True)
        self._thread.start()
        self.client = self.as_program(key or "none")
        self.until(lambda: self.health()["status"] == "ok")

    def as_program(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of a request of a program, or of whatever its headers say."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given = {"Content-Type": "application/json"} | given
        connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), given)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, json.loads(text or "null")

    def health(self) -> dict[str, Any]:
        with contextlib.suppress(ConnectionRefusedError):
            return self.send("GET", "/health")[2]
        return {"status": "not yet"}

    def until(self, true: Any) -> None:
        """Wait for something that other threads bring about."""
        for _ in range(3000):
            if true():
                return
            time.sleep(0.01)
        raise AssertionError("it did not come")

    def end(self) -> None:
        self.listener.stop()
        self._thread.join(30)
        self.worker.close()
        self.listener.close()
