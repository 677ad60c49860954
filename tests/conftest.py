"""What every test runs under: no Hub, few threads, the same seeds.

PEFTLAB_HOME stays the user's, so that the tests share what was pulled before.
"""

from __future__ import annotations

import os
import random
import sys

# Before anything imports torch, transformers or datasets: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One number for the tests and the programs they start: the last bit of a sum follows the number of threads. It is one,
# since test files run side by side, and threads that wait for each other take many times longer on tensors this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Machines differ in speed and are shared: no deadlines, and the same examples each time.
settings.register_profile("peftlab", deadline=None, derandomize=True)
settings.load_profile("peftlab")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same seeds, whichever tests ran before it."""
    random.seed(0)
    # A test that needs neither library does not pay for importing it.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def tiny_causal():
    """Factory: "gpt2" or "llama" -> (a random model of two layers in eval mode, its 64-token tokenizer).

    Weights are large enough that distributions are far from uniform.
    """
    import tiny

    return tiny.causal


@pytest.fixture(scope="module")
def one_thread():
    """For modules of tiny models: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    import tiny

    with tiny.one_thread():
        yield


@pytest.fixture
def split(monkeypatch):
    """This CPU as a device on which splitting pays."""
    from peftlab.models import packed, quick_lora, roles

    for module in (packed, quick_lora, roles):
        monkeypatch.setattr(module, "splits_pay", lambda device: True)
