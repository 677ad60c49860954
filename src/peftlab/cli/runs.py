"""Verbs that show and check runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .shared import RUNS, Device, Json, loading, print_rows, print_value, short

app = typer.Typer()


@app.command()
def runs(as_json: Json = False) -> None:
    """List the runs below runs/ and how they ended."""
    from ..runs.rundir import list_runs

    columns = ("run", "recipe", "status", "started", "reason")
    rows = [{name: s.get(name) for name in columns} | {"seconds": s["time"]["wall_s"]} for s in list_runs(RUNS)]
    if not as_json:
        rows = [row | {"reason": short(row["reason"])} for row in rows]
    print_rows(rows, as_json)


@app.command()
def report(run: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")]) -> None:
    """Render a run's report.html again and print its path."""
    from ..report import render
    from ..runs.rundir import find_run

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
    from ..recipes.inspect import inspect as run_inspect

    run_inspect(RUNS, run, step, prompt, by, listed, as_json)


@app.command()
def doctor(
    stack: Annotated[str, typer.Argument(help="a run, model or adapter to check")] = "tiny-gpt2",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check the environment, and the invariants of a model with adapters; exit 1 where one fails."""
    loading()
    from ..recipes.doctor import run_doctor

    findings = run_doctor(str(RUNS / stack) if (RUNS / stack).is_dir() else stack, device)
    if as_json:
        print_value(findings, True)
    else:
        print_value(findings["environment"], False)
        print_rows([check | {"ok": "yes" if check["ok"] else "NO"} for check in findings["checks"]], False)
    if not all(check["ok"] for check in findings["checks"]):
        raise typer.Exit(1)
