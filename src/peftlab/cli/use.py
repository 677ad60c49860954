"""Verbs that use what was trained."""

from __future__ import annotations

import shlex
import sys
from os.path import isfile
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..runs.progress import counting, folded_text, say
from ..runs.sanitize import sanitize
from .shared import RUNS, Device, Json, examples, interval, loading, print_rows, print_value

app = typer.Typer()


@app.command(
    epilog=examples('peftlab generate ppo-tiny --prompt "This film" -n 3'),
    context_settings={"allow_extra_args": True},  # a prompt that is typed as an argument is told where it goes
)
def generate(
    context: typer.Context,
    stack: Annotated[str, typer.Argument(help="a run, model or adapter: a name or a folder")],
    prompt: Annotated[str, typer.Option(help="the text to continue; default: a text of its own")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="completions to sample")] = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with a model or an adapter."""
    if context.args:
        given = shlex.join(["--prompt", " ".join(context.args)])
        raise UserError(f"generate: takes one argument, the model; a prompt goes behind --prompt, as in {given}")
    loading()
    from ..models.catalog import named
    from ..recipes.tools import generate_texts

    rows = generate_texts(named(stack), prompt, count, max_new_tokens, temperature, top_p, seed, device)
    if not prompt:
        say("generate: no prompt, so the model began a text of its own; --prompt TEXT gives it one to continue")
    if as_json:
        print_value(rows, True)
    else:
        for row in rows:
            print(folded_text(sanitize(row["prompt"] + row["text"]), sys.stdout) + "\n")


@app.command(
    epilog=examples(
        'peftlab predict imdb-sentiment --text "A lovely, lovely film."',
        "peftlab predict reward-tiny --input answers.jsonl --output scores.jsonl",
    ),
    context_settings={"allow_extra_args": True},  # a file or a text typed as an argument is told where it goes
)
def predict(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="a run, an adapter or a model: a name or a folder")],
    text: Annotated[str | None, typer.Option(help="predict this one text")] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="JSONL, CSV or Parquet, a `text` (or `prompt`, or `document`) a row; rewards: prompt and completion"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL to write, one row per input row, in order")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, where the data's name is another")] = None,
    device: Device = "auto",
) -> None:
    """Run an adapter or a model on a text or on a file."""
    from ..data.check import column_pairs

    _refuse_arguments(adapter, context.args)
    mapped = column_pairs(columns or [])  # before the libraries load
    loading()
    from ..models.catalog import named
    from ..recipes.predict import predict as run_predict

    run_predict(named(adapter), text, input, output, device, mapped)


def _refuse_arguments(adapter: str, more: list[str]) -> None:
    """UserError, with the command to type, where a file or a text stands among the arguments of `predict`."""
    from ..config import DATA
    from ..runs.typed import typed

    files = [word for word in (adapter, *more) if word.lower().endswith(DATA) or word in more and isfile(word)]
    if not (files or more):
        return
    name, *rest = [word for word in (adapter, *more) if word not in files] or ["ADAPTER"]
    what, option = ("a file", ["--input", files[0]]) if files else ("a text", ["--text", " ".join(rest)])
    command = typed("predict", name, *option)
    raise UserError(f"predict: takes one argument, the adapter; {what} goes behind {option[0]}:\n  {command}")


@app.command(
    "eval",
    epilog=examples(
        "peftlab eval imdb-judge --data imdb:test --limit 200",
        "peftlab eval ppo-tiny --against tiny-gpt2 --limit 50",
        "peftlab eval ppo-tiny rloo-tiny --frontier",
    ),
)
def evaluate(
    stacks: Annotated[list[str], typer.Argument(help="a run, model or adapter; several runs with --frontier")],
    data: Annotated[
        str | None,
        typer.Option(help="held-out data: NAME:SPLIT or a file; default: the run's, imdb:test or imdb-gist:test"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only this many rows, a seeded sample")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, where the data's name is another")] = None,
    samples: Annotated[int, typer.Option(help="of a policy: answers to each prompt")] = 1,
    checkpoint: Annotated[int | None, typer.Option(help="of a policy: a step that was kept; default: its end")] = None,
    against: Annotated[str | None, typer.Option(help="win rate of a policy against this run, adapter or model")] = None,
    by: Annotated[
        str | None, typer.Option(help="what answers are compared by: a measure, or a reward; default: the judge")
    ] = None,
    tie_margin: Annotated[float, typer.Option(help="scores this near tie")] = 0.01,
    frontier: Annotated[bool, typer.Option("--frontier", help="draw what runs of a policy gained for their KL")]
    = False,
    reference_samples: Annotated[int, typer.Option(help="of --frontier: answers of the reference to each prompt")]
    = 64,
    chart: Annotated[Path, typer.Option(help="of --frontier: the SVG to write, and JSON beside it")]
    = Path("frontier.svg"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out data.

    A classifier's accuracy, F1 and ECE, a summarizer's ROUGE, a reward model's accuracy on pairs of answers, a language
    model's perplexity, or, where rows are prompts with completions and labels, how its own answers explain the labels.
    Of a run of ppo, rloo or dpo: its policy beside its reference, on the run's held-out prompts.
    """
    from ..data.check import column_pairs
    from ..data.sources import require_known

    mapped = column_pairs(columns or [])  # before the libraries load
    if data is not None:
        require_known(data)
    loading()
    from ..recipes.evaluate import PolicyOptions, run_eval

    options = PolicyOptions(samples, checkpoint, against, by, tie_margin, frontier, reference_samples, chart)
    with counting():
        found = run_eval(RUNS, stacks, data, limit, device, mapped, options)
    if as_json:
        print_value(found, True)
        return
    print_value({name: value for name, value in found.items() if not isinstance(value, dict | list)}, False)
    print()
    if frontier:
        from ..recipes.frontier import frontier_rows

        print_rows(frontier_rows(found), False)
        return
    baseline = found.get("baseline", {})
    print_rows([{"metric": name, **({"baseline": baseline.get(name)} if baseline else {}), "value": value,
                  "95% interval": interval(found, name)} for name, value in found["metrics"].items()], False)


@app.command(epilog=examples("peftlab label pairs.jsonl", "peftlab label pairs.jsonl --web"))
def label(
    prefs: Annotated[Path, typer.Argument(help="JSONL rows with prompt, chosen and rejected")],
    output: Annotated[Path | None, typer.Option(help="journal of the choices; default: PREFS.labels.jsonl")] = None,
    web: Annotated[bool, typer.Option("--web", help="label on a page in your browser")] = False,
    port: Annotated[int, typer.Option(help="of the page, on 127.0.0.1; 0 takes any free one")] = 0,
    seed: Annotated[int, typer.Option(help="draws which answer stands on the left")] = 0,
) -> None:
    """Judge pairs of answers yourself, and go on where you stopped; PREFS.labelled.jsonl holds them in your order."""
    from ..recipes.label import label as run_label

    run_label(prefs, output, web, port, seed)
