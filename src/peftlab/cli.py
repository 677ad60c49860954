"""The command line: verbs call recipes. No logic lives here, and torch is imported only inside verbs that need it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import Interrupted, LabError, UserError

RUNS = Path("runs")
app = typer.Typer(
    name="peftlab",
    help="Shape the behaviour of language models with adapters on one frozen base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Check, preview and build data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs that override the config")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]


def main() -> None:
    """Entry point: errors of the user's become one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Its warnings are about what the lab does on purpose: packed rows without a mask, GPT-2's default loss.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except Interrupted as error:
        _fail(error, 128 + error.signum)
    except LabError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


def _fail(message: object, code: int) -> None:
    from .runs.progress import say
    from .runs.sanitize import sanitize

    say(f"peftlab: {sanitize(str(message))}")
    sys.exit(code)


def _loading() -> None:
    """The libraries take seconds to import, and a model some more: on a terminal that is said at once."""
    if sys.stderr.isatty():
        print("loading ...", file=sys.stderr, flush=True)


def _training_verb(verb: str, summary: str) -> None:
    """`peftlab VERB [CONFIG] [key=value ...]`, the same for every recipe that trains."""

    @app.command(verb, help=summary)
    def command(
        config: Annotated[str | None, typer.Argument(help="a TOML file, a shipped config's name, or key=value")] = None,
        overrides: Overrides = None,
        run: Annotated[str | None, typer.Option(help="name of the run's folder below runs/")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="continue the run from its newest checkpoint")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="show config and sizes; train nothing")] = False,
        as_json: Json = False,
    ) -> None:
        _loading()
        from .recipes.launch import dry_run as show
        from .recipes.launch import launch

        pairs = list(overrides or [])
        if config is not None and "=" in config and not Path(config).exists():
            pairs, config = [config, *pairs], None
        if dry_run:
            _print_plan(show(verb, config, pairs), as_json)
        else:
            result = launch(verb, config, pairs, RUNS, run, resume)
            _print_summary(result, as_json)


for _verb, _summary in {
    "pretrain": "Train a small language model from scratch on the training reviews.",
    "sft": "Fine-tune a language model with LoRA on text.",
    "classify": "Fine-tune a classifier with LoRA.",
    "summarize": "Teach an encoder-decoder to summarize: prefix tuning, LoRA, or all weights.",
    "reward": "Train a reward model on pairs of answers: which one is preferred?",
    "ppo": "Steer a language model with PPO: only its adapter learns.",
    "rloo": "Steer a language model by several answers to each prompt, without a critic: only its adapter learns.",
    "dpo": "Steer a language model with pairs of answers, without a reward model: only its adapter learns.",
}.items():
    _training_verb(_verb, _summary)


@app.command()
def demo(
    run: Annotated[str | None, typer.Option(help="name of the run's folder below runs/")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a demo that was stopped")] = False,
    full: Annotated[bool, typer.Option("--full", help="then explanations and summaries, too")] = False,
    as_json: Json = False,
) -> None:
    """The whole lab in minutes: classify, SFT, reward model, PPO, an independent judge, and a report."""
    _loading()
    from .recipes.demo import run_demo

    run_demo(RUNS, run, full=full, resume=resume, as_json=as_json)


@app.command()
def pull(names: Annotated[list[str], typer.Argument(help="imdb, minilm-distilbert, smollm2-135m")]) -> None:
    """Fetch data and models into the cache ahead of time (they are fetched on first use anyway)."""
    from .recipes.tools import pull_names

    for name, path in pull_names(names).items():
        print(f"{name}: {path}")


@app.command()
def models(as_json: Json = False) -> None:
    """List the models and adapters that load by name."""
    from .recipes.tools import model_rows

    rows = model_rows()
    if not as_json:
        rows = [row | {"size": f"{row['size'] / 1e6:.1f} MB"} for row in rows]
    _print_rows(rows, as_json)


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="a JSONL, CSV or Parquet file")],
    kind: Annotated[str, typer.Option("--for", help="sft, classify, summarize, preferences or prompts")],
    columns: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, where the file's name is another")] = None,
    labels: Annotated[str | None, typer.Option(help="the classes in order, as in negative,neutral,positive")] = None,
) -> None:
    """Check every row of a file in one pass, before any model loads."""
    from .data.check import class_names, column_pairs, scan_file

    rows = bad = 0
    for line, found in scan_file(Path(file), kind, class_names(labels), column_pairs(columns or [])):
        rows += 1
        if isinstance(found, str):
            bad += 1
            print(f"{file}:{line}: {found}")
    print(f"{rows} rows, {bad} bad")
    if bad:
        raise typer.Exit(2)


@data_app.command("preview")
def data_preview(
    spec: Annotated[str, typer.Argument(help="data as in a config: a file, imdb:train, OWNER/NAME:SPLIT")],
    kind: Annotated[str, typer.Option("--for", help="sft, classify, summarize, preferences or prompts")],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="whose tokenizer; default: the job's own model")] = None,
    rows: Annotated[int, typer.Option(help="rows to show in full")] = 3,
    as_json: Json = False,
) -> None:
    """Show what a model will see: tokens, those that count for the loss, what is cut, and lengths."""
    _loading()
    from .recipes.preview import preview

    found = preview(spec, kind, model, rows, overrides or [])
    if as_json:
        _print(found, True)
        return
    from rich.console import Console

    from .recipes.preview_view import show

    show(found, Console())
    _print_rows(found["lengths"], False)


def _build_verb(what: str, summary: str) -> None:
    """`peftlab data WHAT`, the same options for every data set that is built from the reviews."""

    @data_app.command(what, help=summary)
    def command(
        output: Annotated[Path, typer.Option(help="folder to write into")],
        maker: Annotated[str, typer.Option(help="extractive, model, or both: the first serves where the model fails")]
        = "both",
        model: Annotated[str, typer.Option(help="a chat model by name or folder")] = "smollm2-135m",
        classifier: Annotated[str, typer.Option(help="a sentiment classifier by name or folder")] = "imdb-sentiment",
        rows: Annotated[int, typer.Option(help="reviews to draw for training")] = 9_000,
        held_out: Annotated[int, typer.Option(help="reviews to draw for evaluation")] = 1_100,
        samples: Annotated[int, typer.Option(help="texts that the model writes of a review")] = 4,
        batch_size: Annotated[int, typer.Option(help="texts written at a time")] = 256,
        temperature: float = 0.6,
        seed: int = 0,
        device: Device = "auto",
        dtype: Annotated[str, typer.Option(help="the model's: float32 or bfloat16")] = "float32",
    ) -> None:
        from .recipes.makers import BuildOptions, build_data, card

        options = BuildOptions(
            maker, model, classifier, rows, held_out, samples, batch_size, temperature, seed, device, dtype
        )
        print(card(build_data(what, options, output)))


for _verb, _summary in {
    "explanations": "Build pairs of a review and why it is positive or negative.",
    "gist": "Build pairs of a review and what it says in one sentence.",
}.items():
    _build_verb(_verb, _summary)


@data_app.command("preferences")
def data_preferences(
    policy: Annotated[str, typer.Option(help="a causal model or adapter that answers: a name or a folder")],
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
    _loading()
    from .recipes.build_preferences import PreferenceOptions, band, build_preferences, weights_of
    from .recipes.preferences_card import card

    options = PreferenceOptions(
        policy, prompts, output, k, scorer, want, weights_of(weight or []), min_margin, pairs_per_prompt, held_out,
        limit, band(prompt_tokens), max_new_tokens, temperature, seed, batch_size, device, dtype,
    )
    print(card(build_preferences(options)))


@app.command()
def configs(name: Annotated[str | None, typer.Argument(help="show this config's text")] = None) -> None:
    """List the shipped configs, or show one."""
    from .config import shipped_configs

    shipped = shipped_configs()
    if name is None:
        for known, path in shipped.items():
            print(f"{known:24} {path.read_text().splitlines()[0].removeprefix('# ')}")
    elif name in shipped:
        print(shipped[name].read_text(), end="")
    else:
        raise UserError(f"config {name}: not a shipped config; known: {', '.join(shipped)}")


@app.command()
def generate(
    stack: Annotated[str, typer.Argument(help="a model or adapter: a name or a folder")],
    prompt: Annotated[str, typer.Option(help="the text to continue")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="completions to sample")] = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with a model or an adapter."""
    _loading()
    from .recipes.tools import generate_texts

    rows = generate_texts(stack, prompt, count, max_new_tokens, temperature, top_p, seed, device)
    if as_json:
        _print(rows, True)
    else:
        from .runs.sanitize import sanitize

        for row in rows:
            print(sanitize(row["prompt"] + row["text"]) + "\n")


@app.command()
def predict(
    adapter: Annotated[str, typer.Argument(help="an adapter: a bundled name or a folder")],
    text: Annotated[str | None, typer.Option(help="predict this one text")] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="JSONL with a `text` (or `prompt`, or `document`) a row; rewards: prompt and completion"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL to write, one row per input row, in order")] = None,
    device: Device = "auto",
) -> None:
    """Run an adapter on a text or on a file."""
    _loading()
    from .recipes.predict import predict as run_predict

    run_predict(adapter, text, input, output, device)


@app.command("eval")
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
    from .data.check import column_pairs

    mapped = column_pairs(columns or [])  # before the libraries load
    _loading()
    from .recipes.evaluate import PolicyOptions, run_eval

    options = PolicyOptions(samples, checkpoint, against, by, tie_margin, frontier, reference_samples, chart)
    found = run_eval(RUNS, stacks, data, limit, device, mapped, options)
    if as_json:
        _print(found, True)
        return
    _print({name: value for name, value in found.items() if not isinstance(value, dict | list)}, False)
    print()
    if frontier:
        from .recipes.frontier import frontier_rows

        _print_rows(frontier_rows(found), False)
        return
    baseline = found.get("baseline", {})
    _print_rows([{"metric": name, **({"baseline": baseline.get(name)} if baseline else {}), "value": value,
                  "95% interval": _interval(found, name)} for name, value in found["metrics"].items()], False)


@app.command()
def chat(
    stack: Annotated[str, typer.Argument(help="a model or adapter: a name or a folder")] = "smollm2-135m",
    system: Annotated[str, typer.Option(help="system text, where the model's template has one")] = "",
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Talk with a model or an adapter; /help lists what you can do there."""
    _loading()
    from .recipes.tools import open_chat

    open_chat(stack, system, seed, device).run()


@app.command()
def label(
    prefs: Annotated[Path, typer.Argument(help="JSONL rows with prompt, chosen and rejected")],
    output: Annotated[Path | None, typer.Option(help="journal of the choices; default: PREFS.labels.jsonl")] = None,
    web: Annotated[bool, typer.Option("--web", help="label on a page in your browser")] = False,
    port: Annotated[int, typer.Option(help="of the page, on 127.0.0.1; 0 takes any free one")] = 0,
    seed: Annotated[int, typer.Option(help="draws which answer stands on the left")] = 0,
) -> None:
    """Judge pairs of answers yourself, and go on where you stopped; PREFS.labelled.jsonl holds them in your order."""
    from .recipes.label import label as run_label

    run_label(prefs, output, web, port, seed)


@app.command()
def runs(as_json: Json = False) -> None:
    """List the runs below runs/ and how they ended."""
    from .runs.rundir import list_runs

    columns = ("run", "recipe", "status", "started", "reason")
    rows = [{name: s.get(name) for name in columns} | {"seconds": s["time"]["wall_s"]} for s in list_runs(RUNS)]
    if not as_json:
        rows = [row | {"reason": _short(row["reason"])} for row in rows]
    _print_rows(rows, as_json)


@app.command()
def report(run: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")]) -> None:
    """Render a run's report.html again and print its path."""
    from .report import render
    from .runs.rundir import find_run

    print(render(find_run(RUNS, run)))


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")],
    step: Annotated[int | None, typer.Option(help="default: the last one recorded")] = None,
    prompt: Annotated[str | None, typer.Option(help="its number in that step, from 0, or its id")] = None,
    by: Annotated[str | None, typer.Option(help="what colours the tokens: advantage, kl or reward")] = None,
    listed: Annotated[bool, typer.Option("--list", help="list what is recorded")] = False,
    as_json: Json = False,
) -> None:
    """Show a recorded rollout of ppo or rloo token by token, and the run's alarms."""
    from .recipes.inspect import inspect as run_inspect

    run_inspect(RUNS, run, step, prompt, by, listed, as_json)


@app.command()
def doctor(
    stack: Annotated[str, typer.Argument(help="a run, model or adapter to check")] = "tiny-gpt2",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check the environment, and the invariants of a model with adapters; exit 1 where one fails."""
    _loading()
    from .recipes.doctor import run_doctor

    findings = run_doctor(str(RUNS / stack) if (RUNS / stack).is_dir() else stack, device)
    if as_json:
        _print(findings, True)
    else:
        _print(findings["environment"], False)
        _print_rows([check | {"ok": "yes" if check["ok"] else "NO"} for check in findings["checks"]], False)
    if not all(check["ok"] for check in findings["checks"]):
        raise typer.Exit(1)


def _print(value: Any, as_json: bool) -> None:
    if as_json or not isinstance(value, dict):
        print(json.dumps(value, indent=1))
        return
    width = max(map(len, value), default=0)
    for key, item in value.items():
        print(f"{key:{width}}  {_cell(item)}")


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """A dry run for a person: the config as a file would have it, then the sizes of the job."""
    if as_json:
        _print(plan, True)
        return
    from .config import to_toml

    print(f"config\n\n{to_toml(plan['config'])}\nsizes\n")
    _print({name: size for name, size in plan.items() if name != "config"}, False)


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print(summary, True)
        return
    rows = [
        {"metric": name, "before": summary["baseline"].get(name), "after": value,
         "95% interval": _interval(summary, name)}
        for name, value in summary["metrics"].items()
    ]
    _print_rows(rows, False)
    print(f"\n{summary['run']}: {summary['status']} in {summary['time']['wall_s']:.0f} s; report: "
          f"{RUNS / summary['run'] / 'report.html'}")


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A plain table whose columns are as wide as their widest cell; readable when piped."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("(none)")
        return
    table = [list(rows[0]), *[[_cell(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(rows[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _short(reason: str | None, most: int = 60) -> str | None:
    """The first line of a reason, cut: one that lists bad rows would push every column off the screen."""
    line = (reason or "").partition("\n")[0]
    return (line if len(line) <= most else line[: most - 3] + "...") or None


def _interval(found: dict[str, Any], name: str) -> str | None:
    """The 95% interval of a metric of a summary or an evaluation, to the digits of its figure; None without one."""
    interval = found["intervals"].get(name)
    return None if interval is None else " to ".join(map(_cell, interval))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return str(value)


if __name__ == "__main__":
    main()
