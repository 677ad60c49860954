"""Adapters: attach, activate, save with a manifest, load with checks, and stack on one base.

An adapter folder is a plain PEFT adapter (adapter_config.json, adapter_model.safetensors) plus `stack.json`, which
names its base and the adapters that lie merged under it (copied to `under/0`, `under/1` ...), plus `manifest.json`
with the sha256 of every file. The lab's own T5 prefix is no PEFT adapter: its weights are `prefix.safetensors`, and its
adapter_config.json has a `peft_type` that PEFT refuses. A reward model's folder is laid out by models/reward_model.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Config
from ..data.tokenize import PLAIN_CHAT
from ..errors import UserError, brief
from ..runs.checkpoint import MANIFEST, verify_manifest, whole_folder, write_manifest
from ..runs.progress import say
from .backbone import Backbone, load_backbone, trunk
from .catalog import resolve
from .prefix import PREFIX_TYPE, PREFIX_WEIGHTS, attach_prefix, own_prefix, prefix_shapes, write_prefix

Kind = Literal["causal", "classifier", "seq2seq", "reward"]
# PEFT's name of each kind; a reward model's LoRA is one of a causal model.
TASK_TYPES: dict[Kind, str] = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_TYPES = ("LORA", "PREFIX_TUNING")  # those of PEFT's that the lab reads
# What adapter_config.json says of sizes; none is larger than a side of the largest tensor.
SIZES = ("r", "num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")


class PolicyLora(Config):
    """Low-rank adaptation, W + (alpha / r) B A (Hu et al. 2021), on the named linear layers.

    Without dropout, which never acts where a policy starts as its reference.
    """

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class Lora(PolicyLora):
    """The same with dropout, for supervised training."""

    dropout: float = Field(default=0.0, ge=0, lt=1)


class LoraVariants(Lora):
    """LoRA and two variants, for supervised training.

    `rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023), so that a larger rank learns as fast as a small one; `dora`
    learns each column's magnitude apart from its direction (Liu et al. 2024), and so adds no plain delta to W.
    """

    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True)
class Stack:
    """What an adapter stands on: kind of model, base name and fingerprint, adapters merged under it, extra facts."""

    kind: Kind
    base: str
    fingerprint: str
    under: tuple[Path, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def stack_over(name: str, under: Stack, tokenizer: Any, **extra: Any) -> Stack:
    """The stack of a new text adapter trained on `name`, whose own stack is `under`: an adapter lies merged below."""
    entry = resolve(name)
    merged = (*under.under, Path(entry.path)) if entry.kind == "adapter" else ()
    template = {"chat_template": "plain"} if tokenizer.chat_template == PLAIN_CHAT else {}
    return Stack("causal", under.base, under.fingerprint, merged, {**extra, **template})


def linear_names(model: nn.Module) -> list[str]:
    """Leaf names of every linear layer inside the transformer (heads and embeddings excluded)."""
    from transformers.pytorch_utils import Conv1D

    linear = (n for n, m in trunk(model).named_modules() if isinstance(m, nn.Linear | Conv1D))
    # A layer that has adapters already appears as NAME.base_layer beside NAME.lora_A.ADAPTER.
    own = {n.removesuffix(".base_layer").rsplit(".", 1)[-1] for n in linear if ".lora_" not in n}
    return sorted(own - {"lm_head"})


def attach(model: nn.Module, lora: PolicyLora, name: str, kind: Kind = "causal", base: str = "") -> Any:
    """A PeftModel with a fresh adapter `name` (another one, when `model` has adapters already); B = 0, so a no-op."""
    from peft import LoraConfig, PeftModel, TaskType

    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = linear_names(plain)
    targets = linear if lora.targets == "all-linear" else lora.targets
    if not targets or not set(targets) <= set(linear):
        raise UserError(f"lora.targets: {targets}: give all-linear, or some of this model's {', '.join(linear)}")
    heads = [n for n, _ in plain.named_children() if n in ("classifier", "pre_classifier", "score")]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout if isinstance(lora, Lora) else 0.0,
        target_modules=targets,
        use_rslora=isinstance(lora, LoraVariants) and lora.rslora,
        use_dora=isinstance(lora, LoraVariants) and lora.dora,
        fan_in_fan_out=type(plain).__name__.startswith("GPT2"),
        task_type=TaskType(TASK_TYPES[kind]),
        modules_to_save=heads or None,
    )
    return _wrap(model, config, name, base)


def attach_decoder_prefix(model: Any, length: int, hidden: int, name: str, base: str = "") -> Any:
    """PEFT's prefix tuning of a T5: trained keys and values for the decoder's self-attention only.

    The encoder and the cross-attention stay as they are (`prefix.attach_prefix` reaches them). Its start is random and
    no no-op. With `hidden`, an MLP makes the prefix while it trains; the result is saved.
    """
    from peft import PrefixTuningConfig, TaskType

    if model.config.model_type not in ("t5", "mt5"):
        raise UserError(f"prefix: works on T5 models, and {base} is a {model.config.model_type}; use method=lora")
    config = PrefixTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=length,
        prefix_projection=hidden > 0,
        encoder_hidden_size=hidden,
        # PEFT takes these from the encoder, and a head's width from that of the model.
        num_layers=model.config.num_decoder_layers,
        num_attention_heads=model.config.num_heads,
        token_dim=model.config.num_heads * model.config.d_kv,
    )
    return _wrap(model, config, name, base)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Module name (as in the plain base) -> LoRA layer."""
    from peft.tuners.lora import LoraLayer

    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def activate(model: nn.Module, *names: str) -> None:
    """Make exactly these adapters act in the forward pass; with none, the bare base.

    Sets the layers' own fields: peft's set_adapter and disable_adapter also flip requires_grad, which would hand
    frozen adapters to the optimizer.
    """
    for layer in lora_layers(model).values():
        layer._active_adapter = list(names)
        layer._disable_adapters = not names


@contextmanager
def only(model: nn.Module, *names: str) -> Iterator[None]:
    """`activate`, for the length of a block."""
    layer = next(iter(lora_layers(model).values()))
    before = () if layer._disable_adapters else tuple(layer._active_adapter)
    activate(model, *names)
    try:
        yield
    finally:
        activate(model, *before)


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by full name (LoRA factors and saved heads, or a prefix)."""
    if own := own_prefix(model):
        return dict(own.named_parameters("prefix"))
    parts = (".lora_A", ".lora_B", ".lora_magnitude_vector", ".modules_to_save", "prompt_encoder")
    marks = tuple(f"{part}.{name}." for part in parts)
    return {n: p for n, p in model.named_parameters() if any(mark in n for mark in marks)}


def save_adapter(model: Any, name: str, folder: Path, stack: Stack, dtype: str = "float32") -> Path:
    """Write adapter `name` of `model` as a plain PEFT folder with its stack and manifest. Nothing touches the Hub.

    The lab's own prefix (`model.prefix`) is written in its own format. `folder` is there whole, or not at all.
    """
    with whole_folder(folder) as place:
        if own := own_prefix(model):
            write_prefix(own, place, stack.base, getattr(torch, dtype))
        else:
            write_peft(model, name, place, stack.base, dtype)
        write_stack(place, stack)
    return folder


def write_peft(model: Any, name: str, folder: Path, base: str, dtype: str = "float32") -> None:
    """Weights and adapter_config.json of adapter `name`, as PEFT reads them: a folder not yet told of its stack."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    stored = {key: value.detach().to("cpu", getattr(torch, dtype)).contiguous() for key, value in tensors.items()}
    save_file(stored, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    model.peft_config[name].base_model_name_or_path = base
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    if isinstance(targets := getattr(config, "target_modules", None), set):  # its order is that of this process
        config.target_modules = sorted(targets)
    config.save_pretrained(str(folder))


def write_stack(folder: Path, stack: Stack) -> None:
    """Copies of the adapters below, stack.json, and last the manifest of all that lies in `folder`."""
    for index, under in enumerate(stack.under):
        shutil.copytree(under, folder / "under" / str(index), dirs_exist_ok=True)
    facts = {"kind": stack.kind, "base": stack.base, "fingerprint": stack.fingerprint, **stack.extra}
    facts["under"] = [f"under/{index}" for index in range(len(stack.under))]
    (folder / "stack.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_manifest(folder)


def read_stack(folder: Path) -> Stack:
    """The stack of an adapter folder; for a foreign PEFT adapter, what its adapter_config.json says."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: not an adapter folder (no adapter_config.json)")
    _verify(folder)
    name = "stack.json" if (folder / "stack.json").is_file() else "adapter_config.json"
    facts = read_facts(folder, name)
    try:
        if name == "adapter_config.json":
            kinds = {task: kind for kind, task in TASK_TYPES.items()}
            return _sound(Stack(kinds.get(str(facts.get("task_type")), "causal"), facts["base_model_name_or_path"], ""))
        inside = facts.pop("under")
        if not isinstance(inside, list):
            raise TypeError("`under` is no list")
        under = tuple(folder / inner for inner in inside)
        if sorted(under) != sorted((folder / "under").glob("*")):
            raise ValueError("`under` does not list the adapters that are there")
        if not all(folder.resolve() in inner.resolve().parents for inner in under):
            raise ValueError("`under` leaves the folder")
        return _sound(Stack(facts.pop("kind"), facts.pop("base"), facts.pop("fingerprint"), under, facts))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter {folder}: {name} is damaged ({error!r}); restore it or train again") from None


def _sound(stack: Stack) -> Stack:
    """The stack, if its facts are of the right kind; else ValueError."""
    names = isinstance(stack.base, str) and isinstance(stack.fingerprint, str)
    if not (stack.kind in get_args(Kind) and names):
        raise ValueError(f"kind {stack.kind!r}, base {stack.base!r}, fingerprint {stack.fingerprint!r}")
    return stack


def adapter_hash(name: str) -> str:
    """sha256 over the weights and JSON files of an adapter, those under it included; empty for a base model.

    stack.json tells the fingerprint of the adapter's base, which loading compares, so this one stands for both.
    """
    entry = resolve(name)
    if entry.kind != "adapter":
        return ""
    digest = hashlib.sha256()
    for file in sorted(Path(entry.path).rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.name != MANIFEST:
            digest.update(f"{file.relative_to(entry.path).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def same_ground(one: Stack, other: Stack) -> bool:
    """Whether two adapters stand on the same weights: one base, and below them adapters of the same bytes."""
    known = one.base == other.base and one.fingerprint == other.fingerprint and len(one.under) == len(other.under)
    pairs = zip(one.under, other.under, strict=False)
    files = (PEFT_WEIGHTS, "adapter_config.json")
    return known and all((a / file).read_bytes() == (b / file).read_bytes() for a, b in pairs for file in files)


def kind_of(name: str) -> str:
    """What a name or folder is by its job: that of its stack for an adapter, else the model's own kind."""
    entry = resolve(name)
    return read_stack(entry.path).kind if entry.kind == "adapter" else entry.kind


def load_adapter(model: Any, folder: Path, name: str, fingerprint: str = "") -> Any:
    """Attach the adapter in `folder` to `model` as `name`, after checking every byte and tensor of it.

    Raises UserError naming the folder and what is wrong: changed bytes, pickle weights, missing or unexpected keys,
    wrong shapes, non-finite values, or another base than it was trained on (`fingerprint` is the base's).
    """
    from peft import PeftConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    stack = read_stack(folder)
    if fingerprint:
        check_base(folder, stack, fingerprint)
    about = read_facts(folder)
    if about.get("peft_type") == PREFIX_TYPE:
        return _load_own_prefix(model, folder, about)
    if about.get("peft_type") not in PEFT_TYPES:
        known = " and ".join(PEFT_TYPES)
        raise UserError(f"adapter {folder}: its peft_type is {about.get('peft_type')!r}; the lab reads {known}")
    tensors = read_weights(folder / PEFT_WEIGHTS)
    _check_sizes(folder, about, tensors)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        # True for a prefix: as it was saved, without the MLP that made it.
        config.inference_mode = config.is_prompt_learning
        model = _wrap(model, config, name, stack.base)
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    except Exception as error:  # PEFT looks at few of these facts before it builds on them, and may fail in any way
        raise UserError(f"adapter {folder}: adapter_config.json does not fit ({brief(error)}); restore it") from error
    check_tensors(folder, tensors, expected)
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)
    return model


def load_stack(
    name: str, *, device: str = "auto", dtype: str = "float32", merge: bool = True
) -> tuple[Backbone, Stack]:
    """A base model or an adapter by name or folder -> a backbone that behaves like it, and the stack it is.

    Adapters under the top one are always merged, in float32. With `merge` the top one is too, unless it is a prefix;
    otherwise the model is a PeftModel whose active adapter is "policy". The extra facts of a model that the lab trained
    whole are those in its config; `peftlab` may mean anything in a stranger's, and only a mapping can be facts.
    """
    entry = resolve(name)
    if entry.kind != "adapter":
        kind: Literal["causal", "seq2seq"] = "seq2seq" if entry.kind == "seq2seq" else "causal"
        backbone = load_backbone(name, kind, device=device, dtype=dtype)
        facts = getattr(backbone.model.config, "peftlab", {})
        return backbone, Stack(kind, name, backbone.fingerprint, extra=facts if isinstance(facts, Mapping) else {})
    folder = Path(entry.path)
    stack = read_stack(folder)
    if stack.kind == "reward":
        raise UserError(f"{name}: is a reward model, which scores answers; try `peftlab predict {name} --input FILE`")
    base = load_under(folder, stack, device)
    model = load_adapter(base.model, folder, "policy", base.fingerprint)
    if merge and lora_layers(model):
        model = model.merge_and_unload()
    model = model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    return Backbone(name, model, base.tokenizer, base.fingerprint), stack


def load_under(folder: Path, stack: Stack, device: str = "auto") -> Backbone:
    """What the adapter in `folder` stands on: its base in float32, with the adapters under it merged.

    Raises UserError where the base of that name is not the one that the adapter was trained on.
    """
    if not (folder / MANIFEST).is_file():
        say(
            f"adapter {folder}: has no {MANIFEST}, so its bytes cannot be told from others; tensor names, shapes and "
            "finite values are all that is checked"
        )
    labels = stack.extra.get("labels", [0, 1])
    if not (isinstance(labels, list) and labels):
        raise UserError(f"adapter {folder}: stack.json says labels {labels!r}; it is a list of names")
    task = "causal" if stack.kind == "reward" else stack.kind
    try:
        base = load_backbone(stack.base, task, device=device, num_labels=len(labels))
    except UserError as error:
        raise UserError(f"adapter {folder}: its base: {error}") from None
    check_base(folder, stack, base.fingerprint)
    model = base.model
    for under in stack.under:
        model = load_adapter(model, under, "under", base.fingerprint)
        if not lora_layers(model):
            raise UserError(f"adapter {under}: is no LoRA, so nothing can stand on it")
        model = model.merge_and_unload()
    if stack.extra.get("chat_template") == "plain":
        base.tokenizer.chat_template = PLAIN_CHAT
    return Backbone(base.name, model.requires_grad_(False).eval(), base.tokenizer, base.fingerprint)


def check_base(folder: Path, stack: Stack, fingerprint: str) -> None:
    """UserError where the adapter in `folder` was trained on another base than the one of this fingerprint."""
    if stack.fingerprint and stack.fingerprint != fingerprint:
        raise UserError(f"adapter {folder}: its {stack.base} is another one ({stack.fingerprint}, not {fingerprint})")


def _verify(folder: Path) -> None:
    """Manifest and stack.json go together; a folder that the lab did not write has neither."""
    ours = [(folder / name).is_file() for name in (MANIFEST, "stack.json")]
    problems = verify_manifest(folder) if any(ours) else []
    if not problems and any(ours) and not all(ours):
        problems = ["stack.json is missing"]
    if problems:
        raise UserError(f"adapter {folder}: {'; '.join(problems)}; restore the folder or train it again")


def read_facts(folder: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    """What a JSON file of an adapter's folder says. UserError where it is damaged."""
    try:
        facts = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"adapter {folder}: {name} is damaged ({error}); restore it") from None
    if not isinstance(facts, dict):
        raise UserError(f"adapter {folder}: {name} is damaged (no object); restore it")
    return facts


def _check_sizes(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """UserError for sizes that the tensors do not have: what is built by them may be larger than the memory."""
    longest = max((side for value in tensors.values() for side in value.shape), default=0)
    ranks = about.get("rank_pattern") or {}
    sizes = {key: about[key] for key in SIZES if key in about} | (ranks if isinstance(ranks, dict) else {})
    for key, size in sizes.items():
        if type(size) is not int or not 0 < size <= longest:
            raise UserError(f"adapter {folder}: adapter_config.json says {key} {size!r}, which its tensors do not have")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of an adapter's folder. UserError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"adapter {file.parent}: no {file.name} (pickle files are not loaded; convert first)")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise UserError(f"adapter {file}: not a readable safetensors file: {error}") from None
    return tensors


def _load_own_prefix(model: Any, folder: Path, about: Mapping[str, Any]) -> Any:
    """Give `model` the prefix in `folder`; a T5 has one at a time."""
    tensors = read_weights(folder / PREFIX_WEIGHTS)
    _check_sizes(folder, {"num_virtual_tokens": None, **about}, tensors)
    shapes = prefix_shapes(model, about["num_virtual_tokens"])
    check_tensors(folder, tensors, {kind: torch.empty(shape, device="meta") for kind, shape in shapes.items()})
    device = next(model.parameters()).device
    attach_prefix(model, {kind: value.to(device) for kind, value in tensors.items()}).requires_grad_(False)
    return model.eval()


def _wrap(model: Any, config: Any, name: str, base: str) -> Any:
    from peft import PeftModel, get_peft_model

    from .quick_lora import quicken

    config.base_model_name_or_path = None  # peft would warn that ours is not the folder the base was read from
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    quicken(model)
    config.base_model_name_or_path = base
    activate(model, name)
    return model.eval()


def check_tensors(folder: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """UserError naming the first tensor that is missing, unknown, of another type or shape, or not finite."""
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has the unknown tensor {extra[0]}"
        raise UserError(f"adapter {folder}: does not fit this model: it {what} ({len(missing) + len(extra)} differ)")
    for key, value in given.items():
        if not value.is_floating_point():
            raise UserError(f"adapter {folder}: {key} holds {value.dtype}, which are no weights")
        if value.shape != expected[key].shape:
            raise UserError(f"adapter {folder}: {key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
        if not torch.isfinite(value).all():
            raise UserError(f"adapter {folder}: {key} holds NaN or infinity; the file is not usable")
