"""Adapters on disk: written with their stack and manifest, and loaded after every byte and tensor was checked.

What a folder holds is told in models/stacks.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.tokenize import PLAIN_CHAT
from ..errors import UserError, brief
from ..runs.checkpoint import MANIFEST, whole_folder
from ..runs.progress import say
from .adapters import adapter_parameters, lora_layers, wrap
from .backbone import Backbone, load_backbone
from .catalog import resolve
from .prefix import PREFIX_TYPE, PREFIX_WEIGHTS, attach_prefix, own_prefix, prefix_shapes, write_prefix
from .stacks import PEFT_WEIGHTS, Stack, check_base, read_facts, read_stack, write_stack

PEFT_TYPES = ("LORA", "PREFIX_TUNING")  # those of PEFT's that the lab reads
# What adapter_config.json says of sizes; none is larger than a side of the largest tensor.
SIZES = ("r", "num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")


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
        model = wrap(model, config, name, stack.base)
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


def _check_sizes(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """UserError for sizes that the tensors do not have: what is built by them may be larger than the memory."""
    longest = max((side for value in tensors.values() for side in value.shape), default=0)
    ranks = about.get("rank_pattern") or {}
    sizes = {key: about[key] for key in SIZES if key in about} | (ranks if isinstance(ranks, dict) else {})
    for key, size in sizes.items():
        if type(size) is not int or not 0 < size <= longest:
            raise UserError(f"adapter {folder}: adapter_config.json says {key} {size!r}, which its tensors do not have")


def _load_own_prefix(model: Any, folder: Path, about: Mapping[str, Any]) -> Any:
    """Give `model` the prefix in `folder`; a T5 has one at a time."""
    tensors = read_weights(folder / PREFIX_WEIGHTS)
    _check_sizes(folder, {"num_virtual_tokens": None, **about}, tensors)
    shapes = prefix_shapes(model, about["num_virtual_tokens"])
    check_tensors(folder, tensors, {kind: torch.empty(shape, device="meta") for kind, shape in shapes.items()})
    device = next(model.parameters()).device
    attach_prefix(model, {kind: value.to(device) for kind, value in tensors.items()}).requires_grad_(False)
    return model.eval()
