"""The notebooks run offline from top to bottom, and their cells assert what they teach; what is kept is small."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
# Facts that the text rests on: what a notebook's cells check themselves, and a change of the text must not lose.
ASSERTED = {
    "rlhf-in-one-sitting": [
        "assert rollout.exact_kl.abs().max() == 0.0",
        "assert ppo.first.kl == 0.0",
        "assert roles.frozen_hash() == base_before",
        "assert has > had + 0.3",
    ],
    "lora-prefix-and-what-they-change": [
        "assert torch.equal(fresh, bare_logits)",
        "assert torch.linalg.matrix_rank(delta) == 4",
        "assert apart < 1e-5 * live.abs().max()",
        'assert (reading > 0) == (kind == "encoder") and saying > 0',
        "assert torch.equal(encoded, bare_encoded) and torch.equal(logits, bare_said)",
    ],
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def shown(code: list[dict]) -> list[str]:
    """What each cell printed."""
    return ["".join(text for output in cell["outputs"] for text in output.get("text", [])) for cell in code]


def test_a_fresh_kernel_runs_it_offline(notebook, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PEFTLAB_HOME", str(HERE / "nowhere"))  # nothing was pulled: bundled models only
    execute = importlib.util.spec_from_file_location("execute", HERE / "execute.py")
    program = importlib.util.module_from_spec(execute)
    execute.loader.exec_module(program)
    ran = [cell for cell in program.executed(notebook).cells if cell["cell_type"] == "code"]  # raises where one fails
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    assert not [o for cell in ran for o in cell["outputs"] if o.get("name") == "stderr"], "no warning meets a reader"
    assert not (HERE / "nowhere").exists()
    printed = ["".join(output.get("text", "") for output in cell["outputs"]) for cell in ran]
    # Figures hang on the machine, down to which texts are sampled; which cells print does not.
    assert [bool(text) for text in printed] == [bool(text) for text in shown(cells(notebook, "code"))]


def test_it_asserts_what_it_teaches(notebook):
    code = "\n".join("".join(cell["source"]) for cell in cells(notebook, "code"))
    assert [fact for fact in ASSERTED[notebook.stem] if fact not in code] == []


def test_what_is_kept_is_whole_small_and_of_no_machine(notebook):
    code = cells(notebook, "code")
    assert all(cell["execution_count"] == number for number, cell in enumerate(code, 1)), "run notebooks/execute.py"
    kinds = {(output["output_type"], output.get("name")) for cell in code for output in cell["outputs"]}
    assert kinds == {("stream", "stdout")}
    assert notebook.stat().st_size < 100_000
    assert max(len(line) for text in shown(code) for line in text.splitlines()) <= 120
    assert not re.search(r"/(?:tmp|work|home|root|Users)/", notebook.read_text(encoding="utf-8"))


def test_its_links_and_equations_are_whole(notebook):
    for cell in cells(notebook, "markdown"):
        text = "".join(cell["source"])
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            assert (HERE / target).exists(), target
        assert text.count("$$") % 2 == 0 and text.replace("$$", "").count("$") % 2 == 0


def test_both_are_told_of():
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 2 and all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
