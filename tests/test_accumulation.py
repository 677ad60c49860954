"""A batch in parts is the batch: of every supervised recipe, to the rounding of a sum in another order."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from peftlab.config import load_config
from peftlab.errors import UserError
from peftlab.recipes import RECIPES, load
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SUPERVISED = [verb for verb in RECIPES if "accumulate" in load(verb).CONFIG.model_fields]
# Five steps of 8 rows; the last batch of an epoch is short. Dropout would draw other masks.
LONG = ["batch_size=8", "max_steps=7", "lr=1e-3"]
MORE = {"pretrain": ["dropout=0"], "sft": ["max_length=16", "train_limit=29"]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("parts")
    shop = tiny.workshop(root) | {"root": str(root)}
    launch("classify", None, tiny.overrides(shop, "classify"), root, "judge")
    return shop


def go(shop: dict[str, str], verb: str, parts: int) -> Path:
    judged = [f"judge={shop['root']}/judge"] if "judge" in load(verb).CONFIG.model_fields else []
    pairs = tiny.overrides(shop, verb, *LONG, *MORE.get(verb, []), *judged, f"accumulate={parts}")
    launch(verb, None, pairs, Path(shop["root"]) / str(parts), verb)
    return Path(shop["root"]) / str(parts) / verb


@pytest.mark.parametrize("verb", SUPERVISED)
def test_eight_parts_of_one_row_are_one_part_of_eight(shop, verb):
    whole, parts = go(shop, verb, 1), go(shop, verb, 8)
    losses = [[row["train/loss"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]
              for run in (whole, parts)]
    assert losses[0] and losses[1] == pytest.approx(losses[0], abs=1e-5)
    ends = [{name: value for file in sorted(run.glob("*/*.safetensors")) for name, value in load_file(file).items()}
            for run in (whole, parts)]
    for name, value in ends[0].items():
        assert ends[1][name].float().numpy() == pytest.approx(value.float().numpy(), abs=2e-4), name


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="accumulate: 3 equal parts do not make a batch_size of 8"):
        load_config(load("sft").CONFIG, None, ["batch_size=8", "accumulate=3"])
