"""Verbs that train."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ..errors import UserError, did_you_mean
from ..runs.progress import folded
from .shared import RUNS, Json, Overrides, examples, loading, print_plan, print_summary

app = typer.Typer()
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress; what went wrong is still said")]


def _begin(quiet: bool) -> None:
    """Before the libraries load, which takes seconds."""
    from ..runs.progress import Progress

    Progress.quiet = quiet
    if not quiet:
        loading()


def _training_verb(verb: str, summary: str, *commands: str) -> None:
    """`peftlab VERB [CONFIG] [key=value ...]`, the same for every recipe that trains."""

    # Unknown options come with the overrides, so that a config's key typed as one is told how to be given.
    @app.command(
        verb, help=summary, epilog=examples(*commands), context_settings={"ignore_unknown_options": True}
    )
    def command(
        context: typer.Context,
        config: Annotated[str | None, typer.Argument(help="a TOML file, a shipped config's name, or key=value")] = None,
        overrides: Overrides = None,
        run: Annotated[str | None, typer.Option(help="name of the run's folder below runs/")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="continue the run from its newest checkpoint")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="show config and sizes; train nothing")] = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from ..recipes.declared import check_config, check_names, refuse_options

        pairs = list(overrides or [])
        options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("-")]
        refuse_options(verb, [*([config] if config else []), *pairs], options)
        if config is not None and "=" in config and not os.path.exists(config):
            pairs, config = [config, *pairs], None
        checked = check_config(verb, config, pairs)
        if not resume:  # of a run that is done, they may be gone
            check_names(checked)
        _begin(quiet)
        from ..recipes.launch import dry_run as show
        from ..recipes.launch import launch
        from ..runs.launched import rank

        if dry_run:
            plan = show(verb, config, pairs)
            if rank() == 0:
                print_plan(plan, as_json)
        else:
            result = launch(verb, config, pairs, RUNS, run, resume)
            if rank() == 0 and (as_json or "finished" not in result):  # of a run done before, one line was said
                print_summary(result, as_json)


for _verb, *_told in (
    (
        "pretrain",
        "Train a small language model from scratch on the training reviews.",
        "peftlab pretrain pretrain-tiny-gpt2",
        "peftlab pretrain train_data=texts.jsonl eval_data=held-out.jsonl --run mine",
    ),
    (
        "sft",
        "Fine-tune a language model with LoRA on text.",
        "peftlab sft sft-tiny",
        "peftlab sft sft-tiny train_data=mine.jsonl eval_data=held-out.jsonl --run mine",
        "peftlab sft sft-tiny --resume",
    ),
    (
        "classify",
        "Fine-tune a classifier with LoRA.",
        "peftlab classify classify-distilbert",
        "peftlab classify train_data=mine.jsonl eval_data=held-out.jsonl labels=bug,praise",
    ),
    (
        "summarize",
        "Teach an encoder-decoder to summarize: prefix tuning, LoRA, or all weights.",
        "peftlab summarize summarize-tiny",
        "peftlab summarize summarize-tiny method=lora",
    ),
    (
        "reward",
        "Train a reward model on pairs of answers: which one is preferred?",
        "peftlab reward reward-tiny",
        "peftlab reward reward-tiny members=3 combine=min",
    ),
    (
        "ppo",
        "Steer a language model with PPO: only its adapter learns.",
        "peftlab ppo ppo-tiny model=runs/sft-tiny want=negative",
        "peftlab ppo ppo-tiny reward=runs/reward-tiny kl_target=6",
        "peftlab ppo ppo-tiny --dry-run",
    ),
    (
        "rloo",
        "Steer a language model by several answers to each prompt, without a critic: only its adapter learns.",
        "peftlab rloo rloo-tiny model=runs/sft-tiny",
        "peftlab rloo rloo-tiny samples_per_prompt=8 prompts_per_step=16",
    ),
    (
        "dpo",
        "Steer a language model with pairs of answers, without a reward model: only its adapter learns.",
        "peftlab dpo dpo-tiny",
        "peftlab dpo dpo-tiny loss=ipo train_data=mine.jsonl eval_data=held-out.jsonl",
    ),
):
    _training_verb(_verb, *_told)


@app.command(epilog=examples("peftlab demo", "peftlab demo --full", "peftlab demo --resume"))
def demo(
    run: Annotated[str | None, typer.Option(help="name of the run's folder below runs/")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a demo that was stopped")] = False,
    full: Annotated[bool, typer.Option("--full", help="then explanations and summaries, too")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole lab in minutes: classify, SFT, reward model, PPO, an independent judge, and a report."""
    _begin(quiet)
    from ..recipes.demo import run_demo

    run_demo(RUNS, run, full=full, resume=resume, as_json=as_json)


@app.command(epilog=examples("peftlab configs", "peftlab configs ppo-tiny"))
def configs(name: Annotated[str | None, typer.Argument(help="show this config's text")] = None) -> None:
    """List the shipped configs, or show one."""
    from ..config import headlines, shipped_configs

    shipped = shipped_configs()
    if name is None:
        for known, told in headlines().items():
            print(folded(f"{known:24} {told}", sys.stdout, 25))
    elif name in shipped:
        print(shipped[name].read_text(), end="")
    else:
        raise UserError(
            f"config {name}: not a shipped config; {did_you_mean(name, shipped) or 'known: ' + ', '.join(shipped)}"
        )
