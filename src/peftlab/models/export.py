"""What other programs read: a stack as one plain PEFT adapter of its original base, or as one plain model.

A LoRA adds s B A to a weight, and a stack adds several. Their sum is one LoRA again: the A below each other, the s B
beside each other, so ranks add up and nothing is approximated (DoRA rescales the sum, and so has none).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LabError, UserError
from .adapter_files import load_adapter, load_stack, read_weights
from .adapters import lora_layers
from .backbone import Backbone, load_backbone, quiet_loading, trunk
from .catalog import resolve
from .classifier import TextClassifier
from .prefix import PREFIX_TYPE
from .reward_model import RewardModel, critic_start
from .reward_scale import Scale
from .stacks import PEFT_WEIGHTS, TASK_TYPES, Stack, check_base, read_facts, read_stack

LIMIT = 1e-4  # of the largest difference between two logits that are meant to be equal
NOISE = 1e-5  # the same as a share of the largest logit: float32 rounds large ones more coarsely
FACTOR = re.compile(r"\.lora_[AB]\.weight$")
SCORE = "score"  # transformers' name of a causal model's classification head


class NoAdapter(UserError):
    """The stack is no sum of LoRAs, so no single adapter equals it; a merged model may."""


def write_adapter(name: str, folder: Path) -> Stack:
    """Write what `name` stands for as one PEFT LoRA on its original base, with its tokenizer; the stack that it was.

    A classifier's temperature is in its head, a reward model's scale too: its logit is what `predict` calls score.
    NoAdapter where the stack has no such form, UserError where it has no exact form at all.
    """
    from safetensors.torch import save_file

    entry = resolve(name)
    if entry.kind != "adapter":
        raise NoAdapter(f"{name}: is a whole model, which no adapter stands for; give --as merged")
    place = Path(entry.path)
    stack = read_stack(place)
    _check_parts(name, place, stack)
    base = _base(place, stack)
    model = base.model
    parts = [f"part{number}" for number in range(len(stack.under) + 1)]
    for part, source in zip(parts, (*stack.under, place), strict=True):
        model = load_adapter(model, source, part, base.fingerprint)
    factors = {name: _joined(layer, parts) for name, layer in lora_layers(model).items()}
    heads = _reward_head(name, place, stack, base) if stack.kind == "reward" else _class_head(place, stack)
    tensors = {
        f"{layer}.lora_{side}.weight": value
        for layer, pair in factors.items()
        for side, value in zip("AB", pair, strict=True)
    }
    config = _config(model, {layer: len(a) for layer, (a, _) in factors.items()}, heads, stack)
    config.fan_in_fan_out = model.peft_config[parts[-1]].fan_in_fan_out
    stored = {f"base_model.model.{key}": value.contiguous() for key, value in (tensors | heads).items()}
    save_file(stored, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))
    return stack


def write_merged(name: str, folder: Path) -> Stack:
    """Write what `name` stands for as one plain transformers model with its tokenizer; the stack that it was."""
    model: Any
    entry = resolve(name)
    stack = read_stack(Path(entry.path)) if entry.kind == "adapter" else None
    if stack is not None and stack.kind == "reward":
        write_adapter(name, folder)
        model, tokenizer = plain_model(folder, stack).merge_and_unload(), _base(Path(entry.path), stack).tokenizer
        for file in folder.iterdir():
            file.unlink()
        model.config.peftlab = {"ending": tokenizer.eos_token}  # for WholeReward
    elif stack is not None and stack.kind == "classifier":
        classifier = TextClassifier.load(name, device="cpu")
        model, tokenizer = classifier.model, classifier.tokenizer
        with torch.no_grad():
            for parameter in model.get_submodule(_last_head(model)).parameters():
                parameter.div_(classifier.temperature)
        model.config.id2label = dict(enumerate(classifier.labels))
        model.config.label2id = {label: number for number, label in enumerate(classifier.labels)}
    else:
        if stack is not None:
            _refuse_prefix(name, _about(Path(entry.path)))
        backbone, stack = load_stack(name, device="cpu")
        model, tokenizer = backbone.model, backbone.tokenizer
        if stack.kind == "seq2seq" and stack.extra:
            model.config.peftlab = dict(stack.extra)  # the format of its summaries, as in a model trained whole
    with quiet_loading():
        model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return stack


def plain_model(folder: Path, stack: Stack) -> Any:
    """The export in `folder` as a stranger loads it, by transformers and PEFT alone, in float32 on the CPU."""
    import transformers
    from peft import PeftModel

    of_adapter = (folder / "adapter_config.json").is_file()
    auto: Any = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }.get(stack.kind, transformers.AutoModelForSequenceClassification)
    source, options = (resolve(stack.base).path, load_options(stack, folder)) if of_adapter else (folder, {})
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks for a property by its old name
        model: Any = auto.from_pretrained(str(source), dtype=torch.float32, **options)
        return (PeftModel.from_pretrained(model, str(folder)) if of_adapter else model).eval()


def load_options(stack: Stack, folder: Path) -> dict[str, Any]:
    """What `from_pretrained` of the base has to be told for the adapter in `folder`."""
    from transformers import AutoTokenizer

    if stack.kind not in ("reward", "classifier"):
        return {}
    pad = AutoTokenizer.from_pretrained(str(folder)).pad_token_id
    return {"num_labels": 1 if stack.kind == "reward" else len(_labels(stack)), "pad_token_id": pad}


@torch.no_grad()
def check_equal(name: str, folder: Path, stack: Stack) -> float:
    """The largest difference between a logit of the stack `name`, as the lab loads it, and of its export in `folder`.

    LabError where it is more than rounding: LIMIT, or for logits above 10 the share NOISE of the largest.
    """
    expected, ids = _own_logits(name, stack)
    given = _logits(plain_model(folder, stack), stack, ids)
    difference = float((given - expected).abs().max())
    if not difference <= max(LIMIT, NOISE * float(expected.abs().max())):  # NaN too
        raise LabError(f"{name}: its export differs by {difference:.2g} in a logit, so it was not kept: report this")
    return difference


def _own_logits(name: str, stack: Stack) -> tuple[Tensor, Tensor]:
    """Logits of the lab's own stack, and the token ids (2, 24) that they are of."""
    if stack.kind == "reward":
        reward = RewardModel.load(name, "cpu")
        ids = _some_ids(reward.net.model, reward.tokenizer)
        return reward.scale.scores(reward.net(ids, torch.ones_like(ids))[:, None])[:, None], ids
    backbone, _ = load_stack(name, device="cpu")
    ids = _some_ids(backbone.model, backbone.tokenizer)
    temperature = stack.extra.get("temperature", 1.0) if stack.kind == "classifier" else 1.0
    return _logits(backbone.model, stack, ids) / temperature, ids


def _some_ids(model: Any, tokenizer: Any) -> Tensor:
    """Random tokens, none of which pads: a plain classifier reads at the last that is no padding."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size - 1, (2, 24), generator=draw)
    return ids + (ids >= tokenizer.pad_token_id).long()


def _logits(model: Any, stack: Stack, ids: Tensor) -> Tensor:
    decoder = {"decoder_input_ids": ids} if stack.kind == "seq2seq" else {}
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits
    return logits


def _base(place: Path, stack: Stack) -> Backbone:
    task = "causal" if stack.kind == "reward" else stack.kind
    base = load_backbone(stack.base, task, device="cpu", num_labels=len(_labels(stack)))
    check_base(place, stack, base.fingerprint)
    return base


def _labels(stack: Stack) -> list[Any]:
    return list(stack.extra.get("labels", [0, 1]))


def _check_parts(name: str, place: Path, stack: Stack) -> None:
    """NoAdapter where one of the stack's adapters is more than a LoRA (but for a classifier's head)."""
    if stack.kind == "reward" and len(Scale.of(name, stack.extra).members) > 1:
        raise UserError(f"{name}: is an ensemble of reward models, and a plain model has one head: no form is equal")
    for source in (*stack.under, place):
        about = _about(source)
        _refuse_prefix(name, about)
        if about.get("use_dora"):
            raise NoAdapter(
                f"{name}: {source} is a DoRA, which rescales the sum of weight and LoRA, so no one adapter equals the "
                "stack; give --as merged"
            )
        whole = {key for key in read_weights(source / PEFT_WEIGHTS) if not FACTOR.search(key)}
        if whole and not (stack.kind == "classifier" and source == place):
            raise NoAdapter(f"{name}: {source} trains {min(whole)} beside its LoRA; give --as merged")


def _about(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter whose bytes are checked."""
    read_stack(folder)
    return read_facts(folder)


def _refuse_prefix(name: str, about: Mapping[str, Any]) -> None:
    if about.get("peft_type") == PREFIX_TYPE:
        raise UserError(
            f"{name}: is a prefix of the lab's own, which lies in no weight and which PEFT does not read; `peftlab "
            "predict` uses it, and method=lora trains what can be exported"
        )
    if about.get("peft_type") != "LORA":
        raise UserError(f"{name}: is a prefix of PEFT's, which lies in no weight; PEFT reads its folder as it is")


def _joined(layer: Any, parts: list[str]) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) of one LoRA with scale 1 that adds what these adapters of the layer add together."""
    own = [part for part in parts if part in layer.lora_A]
    a = torch.cat([layer.lora_A[part].weight for part in own])
    b = torch.cat([layer.scaling[part] * layer.lora_B[part].weight for part in own], 1)
    return a.detach(), b.detach()


def _config(model: Any, ranks: Mapping[str, int], heads: Mapping[str, Tensor], stack: Stack) -> Any:
    """PEFT's description: alpha = r everywhere, so that PEFT's scale alpha / r is 1."""
    from peft import LoraConfig, TaskType

    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=["set below"],
        task_type=TaskType("SEQ_CLS" if stack.kind == "reward" else TASK_TYPES[stack.kind]),
        modules_to_save=sorted({key.rsplit(".", 1)[0].rsplit(".", 1)[-1] for key in heads}) or None,
        inference_mode=True,
    )
    config.base_model_name_or_path = stack.base
    leaves = {layer.rsplit(".", 1)[-1] for layer in ranks}
    plain = (name.removeprefix("base_model.model.") for name, _ in model.named_modules())
    named = {name for name in plain if name.rsplit(".", 1)[-1] in leaves}
    config.target_modules = sorted(leaves if named == set(ranks) else ranks)
    return config


def _class_head(place: Path, stack: Stack) -> dict[str, Tensor]:
    """The head that a classifier's adapter brings, its logits divided by the temperature; empty for other kinds."""
    tensors = {
        key.removeprefix("base_model.model."): value.float()
        for key, value in read_weights(place / PEFT_WEIGHTS).items()
        if not FACTOR.search(key)
    }
    last = SCORE if f"{SCORE}.weight" in tensors else "classifier"
    temperature = float(stack.extra.get("temperature", 1.0))
    return {key: value / temperature if key.startswith(f"{last}.") else value for key, value in tensors.items()}


def _last_head(model: nn.Module) -> str:
    return SCORE if hasattr(model, SCORE) else "classifier"


def _reward_head(name: str, place: Path, stack: Stack, base: Backbone) -> dict[str, Tensor]:
    """`score` of transformers' classifier with one label, and the final norm that brings the bias which it has not.

    w (x + b w / |w|^2) = w x + b: what the head adds to each score, the norm's bias can add before it.
    """
    if base.tokenizer.pad_token_id == base.tokenizer.eos_token_id:
        raise UserError(
            f"{name}: scores at the EOS, with which the tokenizer of {stack.base} also pads; a plain classifier skips "
            "padding, so it would read elsewhere: no form is equal"
        )
    head = critic_start(str(place), (base, stack)).head.linear  # with the scale of the scores
    weight, bias = head.weight.detach(), head.bias.detach()
    model = base.model
    norms = {n: m for n, m in trunk(model).named_children() if isinstance(m, nn.LayerNorm) and m.bias is not None}
    if not norms:
        raise UserError(
            f"{name}: its head has a bias, for which a plain classifier on {type(trunk(model)).__name__} has no place: "
            "no form is equal"
        )
    last, norm = list(norms.items())[-1]
    prefix = f"{model.base_model_prefix}.{last}"
    shifted = norm.bias.detach() + bias * weight[0] / weight.square().sum()
    return {f"{SCORE}.weight": weight, f"{prefix}.weight": norm.weight.detach(), f"{prefix}.bias": shifted}
