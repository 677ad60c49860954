"""`peftlab export` and `peftlab push`: what was trained, in a form that other programs read, checked to be equal."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from ..data.hub import refusal
from ..errors import LabError, UserError
from ..models.catalog import named, resolve
from ..models.export import NoAdapter, check_equal, load_options, write_adapter, write_merged
from ..models.stacks import Stack, kind_of
from ..report.read import RunFiles, read_run
from ..runs.atomic import full_disk, write_text
from ..runs.checkpoint import whole_folder
from .export_card import Export, card, usage

FORMS = ("adapter", "merged", "hub-folder", "gguf-ready")


def export(root: Path, name: str, form: str, output: Path) -> dict[str, Any]:
    """Write run, adapter or model `name` into the new folder `output`; what `--json` prints.

    The folder is there whole or not at all, and only after its logits were found equal to those of the lab's own stack.
    UserError where the folder is there already, or where `name` has no such form.
    """
    if form not in FORMS:
        raise UserError(f"--as {form}: give one of {', '.join(FORMS)}")
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: is there already; give a folder that is not")
    above = next(place for place in output.absolute().parents if place.exists())
    if not above.is_dir():
        raise UserError(f"--output {output}: {above} is a file; give a folder")
    source, run = _source(root, name)
    title = run.name.replace("/", "-") if run else Path(name).name
    with full_disk(output), whole_folder(output) as folder:
        stack, is_adapter, difference = _write(source, form, folder)
        options = load_options(stack, folder) if is_adapter else {}
        made = Export(title, stack, is_adapter, difference, options, _gguf(form, str(output)))
        if form in ("hub-folder", "gguf-ready"):
            write_text(folder / "README.md", card(made, run))
    whole = os.path.abspath(output)  # what is printed runs wherever it is pasted: a notebook may stand elsewhere
    return {
        "folder": str(output),
        "as": form,
        "holds": "adapter" if is_adapter else "model",
        "base": stack.base,
        "adapters": len(stack.under) + 1 if is_adapter else None,
        "largest_difference": difference,
        "bytes": sum(file.stat().st_size for file in output.iterdir()),
        "load": usage(made, whole, os.path.abspath(resolve(stack.base).path)),
        "next": _gguf(form, whole),
    }


def push(root: Path, name: str, repo_id: str, public: bool) -> dict[str, Any]:
    """Upload the hub-folder of `name` to the Hub as `repo_id`, private unless `public`.

    UserError where this machine is offline by its settings or has no token; LabError where the Hub refuses.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: is no name on the Hub ({error}); give OWNER/NAME") from None
    instead = "`peftlab export --as hub-folder` writes what would be pushed"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"push: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it, or {instead}")
    if get_token() is None:
        raise UserError(f"push: no token of the Hub on this machine; `hf auth login` stores one. Without it, {instead}")
    with tempfile.TemporaryDirectory() as place:
        told = export(root, name, "hub-folder", Path(place) / "hub")
        api = HfApi()
        try:
            api.create_repo(repo_id, private=not public, exist_ok=True)
            done = api.upload_folder(repo_id=repo_id, folder_path=told["folder"], commit_message=f"peftlab push {name}")
        except Exception as error:  # unreachable, refused, another's: huggingface_hub has a class for each
            raise LabError(f"push: the Hub did not take it ({refusal(error)}); {instead}") from None
    return {"repo": repo_id, "url": str(done), "holds": told["holds"], "bytes": told["bytes"]}


def _source(root: Path, name: str) -> tuple[str, RunFiles | None]:
    """What `models.catalog` resolves, and the run that it is of; UserError for a run that left no model."""
    place = named(name, root)
    folder = Path(place)
    of_run = folder.parent if folder.name in ("adapter", "model") else folder
    if not (of_run / "config.toml").is_file():
        return place, None
    resolve(place)
    return place, read_run(of_run)


def _write(source: str, form: str, folder: Path) -> tuple[Stack, bool, float]:
    """The stack that was written, whether as an adapter, and its largest difference from the lab's own."""
    if form == "gguf-ready" and (kind := kind_of(source)) != "causal":
        raise UserError(f"--as gguf-ready: {source} is a {kind}; this is for models that continue text")
    is_adapter = form in ("adapter", "hub-folder")
    try:
        stack = (write_adapter if is_adapter else write_merged)(source, folder)
    except NoAdapter:  # what is no adapter goes to the Hub whole
        if form != "hub-folder":
            raise
        stack, is_adapter = write_merged(source, folder), False
    return stack, is_adapter, check_equal(source, folder, stack)


def _gguf(form: str, output: str) -> str | None:
    """The command that makes one GGUF file of a folder, from beside a clone of llama.cpp."""
    if form != "gguf-ready":
        return None
    script = "llama.cpp/convert_hf_to_gguf.py"
    return shlex.join(["python", script, output, "--outfile", f"{output}.gguf", "--outtype", "f16"])
