"""Verbs that fetch, check, show and build data and models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..runs.progress import folded_text
from .shared import Device, Json, Overrides, examples, loading, print_rows, print_value

app = typer.Typer()
data_app = typer.Typer(
    help="Check, preview and build data.",
    epilog=examples("peftlab data check rows.jsonl --for sft", "peftlab data preview imdb:train --for sft"),
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")


@app.command(epilog=examples("peftlab pull imdb smollm2-135m"))
def pull(names: Annotated[list[str], typer.Argument(help="imdb, minilm-distilbert, smollm2-135m")]) -> None:
    """Fetch data and models into the cache ahead of time (they are fetched on first use anyway)."""
    from ..recipes.shelf import pull_names

    for name, path in pull_names(names).items():
        print(f"{name}: {path}")


@app.command(epilog=examples("peftlab models", "peftlab models --json"))
def models(as_json: Json = False) -> None:
    """List the models and adapters that load by name."""
    from ..recipes.shelf import model_rows

    rows = model_rows()
    if not as_json:
        rows = [row | {"size": f"{row['size'] / 1e6:.1f} MB"} for row in rows]
    print_rows(rows, as_json)


@data_app.command(
    "check",
    epilog=examples(
        "peftlab data check rows.jsonl --for sft",
        "peftlab data check stars.csv --for classify --columns text=review --labels bad,good",
    ),
)
def data_check(
    file: Annotated[str, typer.Argument(help="a JSONL, CSV or Parquet file")],
    kind: Annotated[str, typer.Option("--for", help="sft, classify, summarize, preferences or prompts")],
    columns: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, where the file's name is another")] = None,
    labels: Annotated[str | None, typer.Option(help="the classes in order, as in negative,neutral,positive")] = None,
) -> None:
    """Check every row of a file in one pass, before any model loads.

    A pipe gets a line for every bad row; a terminal the first few of each mistake, and how many more there are.
    """
    from ..data.check import BadRows, class_names, column_pairs, scan_file
    from ..data.sources import check_command, refuse_source

    refuse_source(file, kind)
    names, mapped = class_names(labels), column_pairs(columns or [])
    rows, bad = 0, BadRows(fold=sys.stdout.isatty())
    for line, found in scan_file(Path(file), kind, names, mapped):
        rows += 1
        if isinstance(found, str):
            for text in bad.lines(f"{file}:{line}", found):
                print(text)
    if more := bad.rest():
        print(*more, f"`{check_command(file, kind, names, mapped)} | less` lists every bad row", sep="\n")
    print(f"{rows} rows, {bad.count} bad")
    if not rows:
        raise UserError(f"{file}: holds no rows; a job takes one at least")
    if bad.count:
        raise typer.Exit(2)


@data_app.command(
    "preview",
    epilog=examples(
        "peftlab data preview rows.jsonl --for sft --model tiny-gpt2 max_length=128",
        "peftlab data preview imdb:train --for classify --rows 1",
        "peftlab data preview sft-tiny",
    ),
)
def data_preview(
    spec: Annotated[str, typer.Argument(help="a file, imdb:train, OWNER/NAME:SPLIT; or a config: its train_data")],
    kind: Annotated[
        str | None, typer.Option("--for", help="sft, classify, summarize, preferences or prompts; a config says it")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="whose tokenizer; default: the config's or the job's own")] = None,
    rows: Annotated[int, typer.Option(help="rows to show in full")] = 3,
    as_json: Json = False,
) -> None:
    """Show what a model will see: tokens, those that count for the loss, what is cut, and lengths."""
    loading()
    from ..models.catalog import named
    from ..recipes.preview import preview

    found = preview(spec, kind, model and named(model), rows, overrides or [])
    if as_json:
        print_value(found, True)
        return
    from rich.console import Console

    from ..recipes.preview_view import show

    show(found, Console())
    print_rows(found["lengths"], False)


def _build_verb(what: str, summary: str) -> None:
    """`peftlab data WHAT`, the same options for every data set that is built from the reviews."""

    example = f"peftlab data {what} --rows 200 --held-out 50 --output {what}"

    @data_app.command(what, help=summary, epilog=examples(example))
    def command(
        output: Annotated[Path, typer.Option(help="folder to write into")],
        maker: Annotated[str, typer.Option(help="extractive, model, or both: the first serves where the model fails")]
        = "both",
        model: Annotated[str, typer.Option(help="a chat model: a run, a name or a folder")] = "smollm2-135m",
        classifier: Annotated[str, typer.Option(help="a sentiment classifier, likewise")] = "imdb-sentiment",
        rows: Annotated[int, typer.Option(help="reviews to draw for training")] = 9_000,
        held_out: Annotated[int, typer.Option(help="reviews to draw for evaluation")] = 1_100,
        samples: Annotated[int, typer.Option(help="texts that the model writes of a review")] = 4,
        batch_size: Annotated[int, typer.Option(help="texts written at a time")] = 256,
        temperature: float = 0.6,
        seed: int = 0,
        device: Device = "auto",
        dtype: Annotated[str, typer.Option(help="the model's: float32 or bfloat16")] = "float32",
    ) -> None:
        from ..models.catalog import named
        from ..recipes.makers import BuildOptions, build_data, card

        options = BuildOptions(
            maker, named(model), named(classifier), rows, held_out, samples, batch_size, temperature, seed, device,
            dtype,
        )
        print(folded_text(card(build_data(what, options, output)), sys.stdout))


for _verb, _summary in {
    "explanations": "Build pairs of a review and why it is positive or negative.",
    "gist": "Build pairs of a review and what it says in one sentence.",
}.items():
    _build_verb(_verb, _summary)


@data_app.command(
    "preferences",
    epilog=examples(
        "peftlab data preferences --policy tiny-gpt2 --prompts mine.jsonl --scorer imdb-sentiment --output mine",
        "peftlab data preferences --policy runs/sft-tiny --prompts imdb:train --prompt-tokens 2,8 --output pairs",
    ),
)
def data_preferences(
    policy: Annotated[str, typer.Option(help="a run, causal model or adapter that answers: a name or a folder")],
    prompts: Annotated[str, typer.Option(help="data as in a config: imdb:train, imdb-explanations:train, a file")],
    output: Annotated[Path, typer.Option(help="folder to write into, or the .jsonl file of the training pairs")],
    k: Annotated[int, typer.Option(help="answers to sample of each prompt")] = 4,
    scorer: Annotated[str, typer.Option(help="rubric, or a reward as in imdb-sentiment + rubric:length")] = "rubric",
    want: Annotated[str, typer.Option(help="of a classifier: positive, negative, or label: the prompt's own")]
    = "positive",
    weight: Annotated[list[str] | None, typer.Option(help="PART=NUMBER of the rubric; default: mean of all")] = None,
    min_margin: Annotated[float, typer.Option(help="least difference of the two scores")] = 0.1,
    pairs_per_prompt: Annotated[int, typer.Option(help="most pairs of a prompt; the widest margins stay")] = 3,
    held_out: Annotated[float, typer.Option(help="prompts of the test pairs: a share below 1, or a number")] = 0.1,
    limit: Annotated[int | None, typer.Option(help="only this many prompts, a seeded sample")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="LOW,HIGH: openings of so many tokens; default: whole")]
    = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(help="answers sampled at a time")] = 128,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="the policy's: float32 or bfloat16")] = "float32",
) -> None:
    """Build pairs of a policy's own answers, the better one by a score, for `dpo` and reward models."""
    loading()
    from ..models.catalog import named
    from ..recipes.build_preferences import PreferenceOptions, band, build_preferences, weights_of
    from ..recipes.preferences_card import card
    from ..rewards.spec import with_runs

    scorer = scorer if scorer == "rubric" else with_runs(scorer)
    options = PreferenceOptions(
        named(policy), prompts, output, k, scorer, want, weights_of(weight or []), min_margin, pairs_per_prompt,
        held_out, limit, band(prompt_tokens), max_new_tokens, temperature, seed, batch_size, device, dtype,
    )
    print(folded_text(card(build_preferences(options)), sys.stdout))
