"""The model card of an export: what it is, how to load it, its data, config, figures, limits and licence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.catalog import Entry, resolve
from ..models.stacks import Stack
from ..report.read import RunFiles, as_number
from ..runs.metrics import EVALUATION, METRICS, healthy_text
from ..runs.sanitize import sanitize

LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}  # in the Hub's spelling
# What the package index's models are on the Hub: other bytes of the same models.
UPSTREAM = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm-distilbert": "sentence-transformers/all-MiniLM-L6-v2",
}
AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
TASKS = {"causal": "text-generation", "seq2seq": "summarization"}
WHAT = {
    "causal": "It continues text.",
    "seq2seq": "It writes summaries.",
    "classifier": "It sorts texts into classes.",
    "reward": "It scores an answer to a prompt: its one logit is the reward, read at the EOS behind the answer.",
}
POLICIES = ("ppo", "rloo", "dpo")


@dataclass(frozen=True)
class Export:
    """What was written: its title, the stack, whether as one adapter, and the largest difference of a logit.

    `options`: what the base's `from_pretrained` is told; `command`: what makes a GGUF file of it, where that is meant.
    """

    title: str
    stack: Stack
    is_adapter: bool
    difference: float
    options: Mapping[str, Any]
    command: str | None = None


def usage(made: Export, place: str, base: str) -> str:
    """Python that loads the export at `place` without the lab, an adapter on the model at `base`."""
    auto = AUTO.get(made.stack.kind, "AutoModelForSequenceClassification")
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    if made.is_adapter:
        options = "".join(f", {key}={value!r}" for key, value in made.options.items())
        lines = ["from peft import PeftModel", *lines, f"base = {auto}.from_pretrained({base!r}{options})"]
        lines.append(f"model = PeftModel.from_pretrained(base, {place!r}).eval()")
    else:
        lines.append(f"model = {auto}.from_pretrained({place!r}).eval()")
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({place!r})"])


def card(made: Export, run: RunFiles | None) -> str:
    """The card as Markdown, with the metadata that the Hub reads in front."""
    from huggingface_hub import ModelCardData

    base = resolve(made.stack.base)
    data = ModelCardData(
        license=LICENCES.get(base.licence, "unknown"),
        base_model=_hub_id(base),
        library_name="peft" if made.is_adapter else "transformers",
        pipeline_tag=TASKS.get(made.stack.kind, "text-classification"),
        tags=["peftlab", *(["lora"] if made.is_adapter else []), *([run.summary["recipe"]] if run else [])],
        model_name=made.title,
        eval_results=_results(made, run) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(made, run, base)) + "\n"


def _body(made: Export, run: RunFiles | None, base: Entry) -> Iterator[str]:
    adapters = len(made.stack.under) + 1
    of = f"{adapters} LoRA adapters in one" if adapters > 1 else "A LoRA adapter"
    origin = f" by `peftlab {run.summary['recipe']}`" if run else ""
    yield f"# {made.title}"
    yield ""
    yield f"{of if made.is_adapter else 'A model'}, made with PEFT Lab{origin}. {WHAT[made.stack.kind]}"
    if labels := made.stack.extra.get("labels"):
        yield "Classes, in order: " + ", ".join(f"`{_cell(label)}`" for label in labels) + "."
    yield f"Base: {_base_words(base)}. Largest difference of a logit from the original: {made.difference:.1g}."
    yield from ["", "## Load it", "", "```python", usage(made, made.title, _hub_id(base) or _own_name(base)), "```"]
    if made.command:
        yield from ["", "## Make a GGUF file", "", f"```sh\n{made.command}\n```"]
    if run:
        yield from _of_run(run)
    yield from ["", "## Limits", "", *_limits(made, run), "", "## Licence", ""]
    yield f"The base is under: {base.licence}. The texts of the data belong to their authors."


def _of_run(run: RunFiles) -> Iterator[str]:
    """Data, figures and config of the run."""
    yield from ["", "## Data", "", "| data | rows | sha256 |", "|---|---|---|"]
    for name, facts in run.environment.get("data", {}).items():
        yield f"| `{_cell(_without_folders(name))}` | {facts.get('rows')} | `{str(facts.get('sha256'))[:16]}` |"
    yield from ["", "## Figures", "", "On held-out rows; before: the same measure of the model that it began as.", ""]
    yield from ["| metric | before | after | 95% interval | healthy |", "|---|---|---|---|---|"]
    before, intervals = run.table("baseline"), run.table("intervals")
    for name, value in run.table("metrics").items():
        ends = " to ".join(map(_number, intervals.get(name) or []))
        healthy = healthy_text(METRICS[name]) if name in METRICS else ""
        yield f"| `{_cell(name)}` | {_number(before.get(name))} | {_number(value)} | {ends} | {healthy} |"
    known = [METRICS[name] for name in run.table("metrics") if name in METRICS]
    yield from ["", *(f"- `{entry.name}`: {entry.definition}" for entry in known)]
    packages = run.environment.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages)
    yield from ["", "## Config", "", f"`{run.summary['recipe']}`, {versions}:", "", "```toml"]
    yield from [sanitize(run.config_toml).strip(), "```"]


def _limits(made: Export, run: RunFiles | None) -> Iterator[str]:
    yield "- It is as able, and as ill-informed, as its base; nothing here was tested for safety or for fairness."
    if run is None:
        yield "- No run stands beside it, so no data and no figures are told."
        return
    yield f"- One run, of one seed ({run.config.get('seed')}): another differs, and other texts differ more."
    if run.summary["recipe"] in POLICIES:
        reward = run.config.get("reward") or "pairs of preferred and rejected answers"
        yield f"- It learned to please a score (`{_cell(reward)}`), not to be right; `eval/kl` is the price."
    if made.stack.kind == "classifier":
        yield f"- Texts over {made.stack.extra.get('max_length')} tokens were read as their opening and ending only."
    if made.stack.kind == "reward":
        yield "- A score compares answers to one prompt; it is no measure of quality between prompts."


def _results(made: Export, run: RunFiles | None) -> list[Any]:
    """The held-out figures as the Hub's model index takes them."""
    from huggingface_hub import EvalResult

    if run is None or not run.config.get("eval_data"):
        return []
    spec = _without_folders(str(run.config["eval_data"]))
    figures = {name: as_number(value) for name, value in run.table("metrics").items()}
    return [
        EvalResult(
            task_type=TASKS.get(made.stack.kind, "text-classification"),
            dataset_type=re.split(r"[:.]", spec)[0],
            dataset_name=spec,
            metric_type=name.partition("/")[2],
            metric_name=name,
            metric_value=value,
        )
        for name, value in figures.items()
        if value is not None and name.startswith(EVALUATION)
    ]


def _without_folders(data: str) -> str:
    """Data as a config names it, files without the folders of this disk."""
    parts = re.split(r"\s*\+\s*", data)
    files = re.compile(r"\.(jsonl|csv|parquet)\b")
    return " + ".join(part.rpartition("/")[2] if files.search(part) else part for part in parts)


def _hub_id(base: Entry) -> str | None:
    """The base's name on the Hub, None where it has none."""
    return base.name if base.origin == "hub" else UPSTREAM.get(base.name)


def _own_name(base: Entry) -> str:
    """The base's name without the folders of this disk."""
    return sanitize(Path(base.name).absolute().name if base.origin == "path" else base.name)


def _base_words(base: Entry) -> str:
    if base.origin == "hub":
        return f"`{base.name}`"
    if base.origin == "path":
        return f"`{_cell(_own_name(base))}`, a model of its own, in a folder of that name"
    same = f", of the same weights as `{UPSTREAM[base.name]}` but for rounding" if base.name in UPSTREAM else ""
    return f"`{base.name}`, whose folder `peftlab pull {base.name}` prints{same}"


def _number(value: Any) -> str:
    number = as_number(value)
    return "-" if number is None else f"{number:.4g}"


def _cell(text: Any) -> str:
    """Text of the user's between backticks in a table."""
    return " ".join(sanitize(str(text)).split()).replace("`", "'").replace("|", "/")
