"""The chat, and the personas that it speaks as."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .shared import Device, Json, cell, examples, loading, print_rows

app = typer.Typer()
personas_app = typer.Typer(
    help="List, show, make and check personas.",
    epilog=examples("peftlab personas list", "peftlab personas show critic"),
    no_args_is_help=True,
)
app.add_typer(personas_app, name="personas")


@app.command(
    epilog=examples(
        "peftlab chat sft-tiny", "peftlab chat --persona critic", "peftlab chat tiny-gpt2 --reward rubric:length"
    )
)
def chat(
    stack: Annotated[
        str | None, typer.Argument(help="a run, model or adapter: a name or a folder [default: smollm2-135m]")
    ] = None,
    persona: Annotated[
        str | None, typer.Option(help="who answers: a name of `peftlab personas list`, a .toml file, or auto")
    ] = None,
    system: Annotated[str, typer.Option(help="system text; default: the persona's")] = "",
    reward: Annotated[str, typer.Option(help="what /score shows, as in a config of ppo")] = "imdb-sentiment",
    router: Annotated[str, typer.Option(help="the classifier that picks for --persona auto")] = "persona-router",
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Talk with a model, an adapter or a persona; /help lists what you can do there."""
    loading()
    from ..models.catalog import named
    from ..recipes.chat import open_chat

    open_chat(stack and named(stack), persona, system, seed, device, reward, router).run()


@personas_app.command("list", epilog=examples("peftlab personas list"))
def personas_list(as_json: Json = False) -> None:
    """List the personas in ./personas, in the home folder and in the package; the first of a name counts."""
    from ..models.personas import load_persona, persona_files

    rows = []
    for name, path in persona_files().items():
        try:
            found = load_persona(str(path))
            voice = found.adapter or " ".join(f"{n}={w:g}" for n, w in found.mix.items()) or "-"
            row = {"persona": name, "base": found.base, "adapter": voice, "description": found.description}
        except UserError as error:
            row = {"persona": name, "base": "-", "adapter": "-", "description": f"broken: {error}"}
        rows.append(row | ({"file": str(path)} if as_json else {}))
    print_rows(rows, as_json)


@personas_app.command("show", epilog=examples("peftlab personas show critic"))
def personas_show(name: Annotated[str, typer.Argument(help="a persona's name, or its file")]) -> None:
    """Show a persona as its file would spell it, with its decoding whole."""
    from ..models.personas import as_file, load_persona

    print(as_file(load_persona(name)), end="")


@personas_app.command(
    "new",
    epilog=examples(
        "peftlab personas new polite --base tiny-gpt2 --adapter tiny-enthusiast",
        "peftlab personas new mixed --adapter runs/one=0.6 --adapter runs/two=0.4",
    ),
)
def personas_new(
    name: Annotated[str, typer.Argument(help="its name; the file is personas/NAME.toml")],
    base: Annotated[str, typer.Option(help="the model that its adapters stand on")] = "smollm2-135m",
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME, a folder or a run; several as NAME=WEIGHT make a mix")
    ] = None,
    system: Annotated[str, typer.Option(help="system text")] = "",
    description: Annotated[str, typer.Option(help="one line, for lists")] = "",
    home: Annotated[bool, typer.Option("--home", help="into the home folder, for use in any folder")] = False,
) -> None:
    """Write a persona of your own, to be edited; an existing file is left alone."""
    from ..models.catalog import named
    from ..models.personas import new_persona

    parts = [text.partition("=") for text in adapter or []]
    adapters = [named(stack) + equals + weight for stack, equals, weight in parts]
    print(new_persona(name, named(base), adapters, system, description, home))


@personas_app.command("check", epilog=examples("peftlab personas check", "peftlab personas check mine.toml"))
def personas_check(
    names: Annotated[list[str] | None, typer.Argument(help="names or .toml files; default: all of them")] = None,
) -> None:
    """Check files, adapters and bases of personas, before any model loads; exit 2 where one cannot speak."""
    loading()
    from ..models.personas import persona_files
    from ..recipes.chat import check_persona

    bad = 0
    for name in names or [str(path) for path in persona_files().values()]:
        problem = check_persona(name)
        bad += bool(problem)
        print(cell(f"{Path(name).stem}: {problem or 'ok'}"))
    if bad:
        raise typer.Exit(2)
