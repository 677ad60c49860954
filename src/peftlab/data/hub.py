"""Why the Hub did not give something, in words: its libraries have a dozen classes for it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

TOO_MANY = 429  # HTTP
# Class -> what it means; the first that an error is, or one that it came from.
MEANINGS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and it was not downloaded before",
    "GatedRepoError": "its terms are to be accepted on its page there, then `hf auth login`",
    "RepositoryNotFoundError": "it has none of that name, or a private one, for which `hf auth login`",
    "DatasetNotFoundError": "it has none of that name, or a private one, for which `hf auth login`",
    "RevisionNotFoundError": "it has no such version",
    "HFValidationError": "that is no name there",
    "TimeoutException": "it did not answer in time",
    "TransportError": "it cannot be reached",
    "ConnectionError": "it cannot be reached",
    "LocalEntryNotFoundError": "it cannot be reached",
}


def refusal(error: BaseException) -> str:
    """What this error of huggingface_hub or datasets means; of one that is not known, what it says, cut."""
    chain = list(_chain(error))
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    known = next((words for name, words in MEANINGS.items() if name in kinds), "")
    if any(getattr(one, "errno", None) == errno.ENOSPC for one in chain):
        known = "no space is left on this disk"
    elif any(getattr(getattr(one, "response", None), "status_code", 0) == TOO_MANY for one in chain):
        known = "it has had too many requests; try again later"
    return known or " ".join(str(error).split())[:200] or "without a word"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
