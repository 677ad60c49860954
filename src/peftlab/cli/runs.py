"""Verbs that show, compare, check, prune and share runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..runs.progress import folded, folded_text
from .shared import (
    RUNS,
    Device,
    Json,
    cell,
    examples,
    in_bytes,
    loading,
    print_figures,
    print_rows,
    print_value,
    short,
)

app = typer.Typer()
runs_app = typer.Typer(
    help="List, show, compare, prune and track the runs below runs/.",
    epilog=examples(
        "peftlab runs", "peftlab runs show ppo-tiny", "peftlab runs diff sft-tiny ppo-tiny",
        "peftlab runs prune --dry-run",
    ),
    invoke_without_command=True,
)
app.add_typer(runs_app, name="runs")


@runs_app.callback()
def runs(context: typer.Context, as_json: Json = False) -> None:
    """List, show, compare and prune the runs below runs/; without a verb: list."""
    if context.invoked_subcommand is None:
        runs_list(as_json)


@runs_app.command("list", epilog=examples("peftlab runs list --json"))
def runs_list(as_json: Json = False) -> None:
    """List the runs below runs/ and how they ended."""
    from ..runs.summary import list_runs

    rows = [
        {name: run[name] for name in ("run", "recipe", "status")}
        | {"seconds": run["time"]["wall_s"], "started": run.get("started"), "reason": run.get("reason")}
        for run in list_runs(RUNS)
    ]
    if not as_json:
        rows = [row | _told(row) for row in rows]
    print_rows(rows, as_json, may_go=("started", "seconds"))


def _told(row: dict[str, Any]) -> dict[str, str | int | None]:
    """What a person reads of a run in a line: whole seconds, the minute it began in (UTC), the reason.

    Of a reason of many lines the first, which says what is wrong, and the last, which says what to do about it.
    """
    from ..runs.summary import minute

    lines, seconds = (row["reason"] or "").splitlines(), row["seconds"]
    return {
        "seconds": None if seconds is None else round(seconds),
        "started": minute(str(row["started"] or "")) or None,
        "reason": " ... ".join(lines if len(lines) < 3 else [lines[0], lines[-1]]) or None,
    }


@runs_app.command("show", epilog=examples("peftlab runs show ppo-tiny", "peftlab runs show demo/ppo"))
def runs_show(
    run: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")], as_json: Json = False
) -> None:
    """Show a run in short: how it ended, the keys you chose, its figures and files, and what to type next."""
    from ..recipes.show import show_run
    from ..runs.summary import minute

    found = show_run(RUNS, run)
    if as_json:
        print_value(found, True)
        return
    seconds, step = found["time"]["wall_s"], found["step"]
    times = [f"{seconds:.0f} s"] if seconds is not None else []
    times += [f"last step {cell(step)}"] if step is not None and found["status"] != "done" else []
    times += [f"began {minute(found['started'])}"] if found["started"] else []
    print(", ".join([f"{found['run']}: {found['recipe']}", found["status"], *times]))
    for line in filter(None, (found["reason"], found["alarms"])):
        print(folded_text(line, sys.stdout))
    print("\nconfig, where it differs from the defaults" if found["config"] else "\nconfig: all defaults")
    print_value(found["config"], False)
    print()
    print_figures(found)
    print()
    print(folded(f"{found['folder']}: {' '.join(found['files'])}", sys.stdout, 2))
    resumes = found["processes"] > 1 and any(line.endswith(" --resume") for line in found["next"])
    again = f"; launch the resume in {found['processes']} processes, as the run began" if resumes else ""
    print(f"\nnext{again}", *found["next"], sep="\n  ")


@runs_app.command("diff", epilog=examples("peftlab runs diff sft-tiny ppo-tiny"))
def runs_diff(
    a: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")],
    b: Annotated[str, typer.Argument(help="another")],
    as_json: Json = False,
) -> None:
    """Show the config keys in which two runs differ, and their figures beside each other.

    Of runs of different recipes what both have; what one has alone is counted, and --json names it.
    """
    from ..runs.compare import diff_runs
    from ..runs.rundir import find_run

    found = diff_runs(find_run(RUNS, a), find_run(RUNS, b))
    if as_json:
        print_value(found, True)
        return
    for side, run in zip("ab", found["runs"], strict=True):
        unmeasured = "" if run["status"] == "done" else " (no result: that is measured at a run's end)"
        print(f"{side}: {run['run']}, {run['recipe']}, {run['status']}{unmeasured}")
    alone = _only_shared(found) if found["runs"][0]["recipe"] != found["runs"][1]["recipe"] else []
    print()
    print_rows([row | {side: short(cell(row[side]), 36) for side in "ab"} for row in found["config"]], False)
    print()
    figures = [
        {"metric": row["metric"], **{side: _with_interval(row[side], row[f"interval_{side}"]) for side in "ab"}}
        for row in found["metrics"]
    ]
    if figures:
        print_rows(figures, False)
    else:
        print("no figure that both have")
    if alone:
        print("", *alone, sep="\n")


def _only_shared(found: dict[str, Any]) -> list[str]:
    """Takes from the tables of `diff_runs` the rows that one run has alone; a line a run counts them."""
    sizes = {}
    for table, word in (("config", "key"), ("metrics", "figure")):
        for side, other in ("ab", "ba"):
            sizes[side, word] = sum(row[other] is None for row in found[table])
        found[table] = [row for row in found[table] if None not in (row["a"], row["b"])]
    counts = {side: [f"{n} {word}{'' if n == 1 else 's'}" for (one, word), n in sizes.items() if one == side and n]
              for side in "ab"}
    return [f"only in {side}: {', '.join(said)} (--json names them)" for side, said in counts.items() if said]


@runs_app.command(
    "prune",
    epilog=examples(
        "peftlab runs prune --dry-run", "peftlab runs prune --keep 3 --yes", "peftlab runs prune --status failed"
    ),
)
def runs_prune(
    keep: Annotated[int, typer.Option(help="leave the newest so many of them alone")] = 0,
    status: Annotated[
        list[str] | None, typer.Option(help="whole runs that ended so: failed, stopped, killed or done")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would go; delete nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    as_json: Json = False,
) -> None:
    """Delete the checkpoints of runs that are done (`eval --checkpoint` reads them), or whole runs by --status.

    What another run was trained on stays, and so does a run that a process works in.
    """
    from ..runs.prune import plan, remove

    items = plan(RUNS, keep, status or [])
    going = [item for item in items if not item.users]
    size = sum(item.size for item in going)
    rows = [
        {
            "run": item.run,
            "status": item.status,
            "what": "checkpoints" if item.checkpoints else "the run",
            "bytes": item.size,
            "stays_for": list(item.users),
        }
        for item in items
    ]
    if not as_json:
        shown = zip(rows, items, strict=True)
        print_rows(
            [row | {"bytes": in_bytes(item.size), "stays_for": ", ".join(item.users) or None} for row, item in shown],
            False,
        )
    if going and not dry_run and not yes:
        _ask(len(going), size, as_json)
    for item in going if not dry_run else []:
        remove(item)
    if as_json:
        print_value({"dry_run": dry_run, "items": rows, "bytes": size}, True)
    elif going:
        print(f"{'would free' if dry_run else 'freed'} {in_bytes(size)}")


@runs_app.command(
    "track",
    epilog=examples(
        "peftlab runs track ppo-tiny --to tensorboard", "peftlab runs track ppo-tiny --to trackio --follow"
    ),
)
def runs_track(
    run: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")],
    to: Annotated[str, typer.Option(help="tensorboard or trackio, which pip installs")],
    output: Annotated[
        Path | None, typer.Option(help="of tensorboard: the folder of its files; default: tensorboard/RUN")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run ends")] = False,
) -> None:
    """Hand a run's figures to TensorBoard or trackio; with --follow while it trains."""
    from ..runs.rundir import find_run
    from ..runs.track import track

    rows, shown = track(find_run(RUNS, run), to, output, follow)
    print(f"{rows} rows of {run}; to see them: {shown}")


def _ask(count: int, size: int, as_json: bool) -> None:
    """Ends the verb where the person at the terminal says no; UserError where there is none to ask."""
    if as_json or not sys.stdin.isatty():
        raise UserError("runs prune: deletes nothing unasked; give --yes, or --dry-run to see what would go")
    if not typer.confirm(f"delete {count} of them, {in_bytes(size)}?", err=True):
        raise typer.Exit


@app.command(epilog=examples("peftlab report ppo-tiny"))
def report(run: Annotated[str, typer.Argument(help="a run's name below runs/, or its folder")]) -> None:
    """Render a run's report.html again and print its path."""
    from ..report import render
    from ..runs.rundir import find_run

    print(render(find_run(RUNS, run)))


@app.command(
    epilog=examples("peftlab inspect ppo-tiny --list", "peftlab inspect ppo-tiny --step 20 --prompt 0 --by kl")
)
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


@app.command(
    epilog=examples(
        "peftlab export ppo-tiny --as adapter --output my-adapter",
        "peftlab export ppo-tiny --as merged --output my-model",
    )
)
def export(
    source: Annotated[str, typer.Argument(help="a run, adapter or model: a name or a folder")],
    form: Annotated[str, typer.Option("--as", help="adapter, merged, hub-folder or gguf-ready")],
    output: Annotated[Path, typer.Option(help="the folder to write, which is not there yet")],
    as_json: Json = False,
) -> None:
    """Write what was trained as other programs read it; its logits are compared with the lab's own first.

    adapter: one plain PEFT adapter for the original base. merged: a plain transformers model. hub-folder: the adapter,
    or where there is none the model, with a model card. gguf-ready: merged, and the command that makes a GGUF of it.
    """
    loading()
    from ..recipes.export import export as run_export

    done = run_export(RUNS, source, form, output)
    if as_json:
        print_value(done, True)
        return
    parts = f", made of {done['adapters']}," if (done["adapters"] or 1) > 1 else ""
    print(
        f"{done['folder']}: {done['holds']}{parts} on {done['base']}, {in_bytes(done['bytes'])}; largest difference "
        f"of a logit {done['largest_difference']:.1g}\n\n{done['load']}"
    )
    if done["next"]:
        print(f"\nnext, beside a clone of llama.cpp:\n  {done['next']}")


@app.command(epilog=examples("peftlab push ppo-tiny OWNER/NAME"))
def push(
    source: Annotated[str, typer.Argument(help="a run, adapter or model: a name or a folder")],
    repo_id: Annotated[str, typer.Argument(help="on the Hub: OWNER/NAME")],
    public: Annotated[bool, typer.Option("--public", help="where it is new, for everyone to see")] = False,
    as_json: Json = False,
) -> None:
    """Upload what `export --as hub-folder` writes to the Hugging Face Hub; a new repository is private."""
    loading()
    from ..recipes.export import push as run_push

    done = run_push(RUNS, source, repo_id, public)
    print_value(done, as_json)


@app.command(epilog=examples("peftlab doctor", "peftlab doctor ppo-tiny --json"))
def doctor(
    stack: Annotated[str, typer.Argument(help="a run, model or adapter to check")] = "tiny-gpt2",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check the environment, and the invariants of a model with adapters; exit 1 where one fails."""
    loading()
    from ..models.catalog import named
    from ..recipes.doctor import run_doctor

    environment, checks = run_doctor(named(stack), device)
    if as_json:
        records = [check.record() for check in checks]
        print_value({"schema_version": 1, "environment": environment, "checks": records}, True)
    else:
        print_value(environment, False)
        print()
        # A limit with what the value is to be to it, as in "<= 1e-05"; a check that fails shouts.
        words = {True: "yes", False: "NO"}
        told = [c.record() | {"limit": f"{c.bound} {cell(c.limit)}", "ok": words[c.ok]} for c in checks]
        print_rows(told, False)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _with_interval(value: float | None, ends: list[float] | None) -> str:
    return cell(value) + (f" ({' to '.join(map(cell, ends))})" if ends else "")
