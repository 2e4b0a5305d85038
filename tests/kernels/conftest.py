"""What the tests of whole sequences share."""

import pytest

from sparsemem.models.sam import SAMCell


@pytest.fixture
def form(monkeypatch):
    """form("reference" | "steps" | "sequence"): what runs from here on; sequences at first."""
    at_once = SAMCell.sequence

    def choose(name):
        monkeypatch.setenv("SPARSEMEM_KERNELS", "reference" if name == "reference" else "auto")
        taken = at_once if name == "sequence" else lambda *_: None
        monkeypatch.setattr(SAMCell, "sequence", taken)

    choose("sequence")
    return choose


@pytest.fixture
def taken(monkeypatch):
    """How many steps were taken at once, by call; 0: it had to be one by itself."""
    record, at_once = [], SAMCell.sequence

    def sequence(self, input, state):
        result = at_once(self, input, state)
        record.append(0 if result is None else result[0].shape[1])
        return result

    monkeypatch.setattr(SAMCell, "sequence", sequence)
    return record
