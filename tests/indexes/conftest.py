import pytest

from sparsemem.indexes import upkeep


@pytest.fixture
def told(monkeypatch):
    """What upkeep has warned of; a test that expects it clears the list, or fails."""
    messages, real = [], upkeep.tell

    def tell(message):
        messages.append(message)
        real(message)

    monkeypatch.setattr(upkeep, "tell", tell)
    yield messages
    assert messages == []
