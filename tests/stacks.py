"""Adapters of one small base that say different things, and personas that speak with them; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from peftlab.models.adapter_files import load_stack, save_adapter
from peftlab.models.adapters import Lora, LoraVariants, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.stacks import Stack

KINDS = {
    "plain": Lora(r=4, alpha=8), "other": Lora(r=2, alpha=6, targets=["c_attn"]), "above": Lora(r=3, alpha=3),
    "rslora": LoraVariants(r=4, alpha=8, rslora=True), "dora": LoraVariants(r=4, alpha=8, dora=True),
    "dora-above": LoraVariants(r=4, alpha=8, dora=True), "template": Lora(r=2, alpha=2),
}


def adapters(base: str, place: Path) -> dict[str, str]:
    """Name -> folder below `place`: plain ones, those "above" that lie over "plain", and variants."""
    made: dict[str, str] = {}
    for seed, (name, lora) in enumerate(KINDS.items()):
        under = (Path(made["plain"]),) if name.endswith("above") else ()
        backbone, _ = load_stack(made["plain"] if under else base, device="cpu")
        model = attach(backbone.model, lora, "policy", base=base)
        _draw(model, seed)
        extra = {"chat_template": "plain"} if name == "template" else {}
        stack = Stack("causal", base, backbone.fingerprint, under, extra)
        made[name] = str(save_adapter(model, "policy", place / name, stack))
    return made


def router(base: str, folder: Path, labels: list[str]) -> str:
    """A classifier of `labels` with random weights."""
    backbone = load_backbone(base, "classifier", device="cpu", num_labels=len(labels))
    model = attach(backbone.model, KINDS["plain"], "policy", "classifier", base)
    _draw(model, 0)
    extra = {"labels": labels, "max_length": 32}
    return str(save_adapter(model, "policy", folder, Stack("classifier", base, backbone.fingerprint, (), extra)))


def personas(base: str, place: Path) -> Path:
    """Three in place/personas, whose adapters go by the folders' names: a chat runs in `place`."""
    folder = place / "personas"
    folder.mkdir()
    told = {
        "kind": f'base = "{base}"\nsystem = "be kind"\n[mix]\nplain = 0.5\nother = 0.5\n',
        "asker": f'base = "{base}"\nadapter = "other"\nprompt = "Is {{text}} good?"\n',
        "large": f'base = "{base}"\n[decoding]\nmax_new_tokens = 96\n',
    }
    for name, text in told.items():
        decoding = "" if "decoding" in text else "[decoding]\nmax_new_tokens = 5\n"
        (folder / f"{name}.toml").write_text(f'name = "{name}"\n{text}{decoding}')
    return folder


def _draw(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if ".lora_" in key and "magnitude" not in key:
            parameter.data.normal_(0, 0.3)
