"""The verb that serves what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import Device, examples, loading

app = typer.Typer()


@app.command(
    epilog=examples(
        "peftlab serve tiny-gpt2 ppo-tiny imdb-sentiment",
        "peftlab serve ppo-tiny --host 0.0.0.0 --api-key-file key.txt",
    )
)
def serve(
    stacks: Annotated[
        list[str] | None,
        typer.Argument(help="runs, models, adapters, personas and rewards; default: smollm2-135m"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; another than this machine's needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one")] = 8000,
    api_key_env: Annotated[str | None, typer.Option(help="the environment variable that holds the API key")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="the file that holds the API key")] = None,
    max_batch: Annotated[int, typer.Option(help="answers that are written at a time, on each base")] = 32,
    max_queue: Annotated[int, typer.Option(help="answers that may wait; one more is refused with 429")] = 64,
    timeout: Annotated[float, typer.Option(help="seconds that a request may take")] = 120.0,
    want: Annotated[str, typer.Option(help="the class that sentiment classifiers score")] = "positive",
    prefs: Annotated[Path, typer.Option(help="JSONL that gains a pair where you prefer an answer on the page")] = Path(
        "preferences.jsonl"
    ),
    log_texts: Annotated[bool, typer.Option("--log-texts", help="log prompts too")] = False,
    device: Device = "auto",
) -> None:
    """Serve models by OpenAI's API, and a page to talk with them and compare them.

    Each name is a model. Those of one base share it.
    """
    loading()
    from ..recipes.serve import ServeOptions
    from ..recipes.serve import serve as run_serve

    options = ServeOptions(
        host, port, api_key_env, api_key_file, max_batch, max_queue, timeout, log_texts, prefs, want, device
    )
    run_serve(stacks or ["smollm2-135m"], options)
