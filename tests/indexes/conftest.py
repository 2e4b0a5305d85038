import pytest

from sparsemem.indexes import upkeep
from sparsemem.indexes.device_faiss import GpuEngine
from tests.oracles.device_kind import on_device


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


@pytest.fixture
def device_engine(request):
    """On a CPU, FAISS on a CPU is taken; on a GPU it has to be FAISS GPU."""
    if "cuda" in request.node.name and not GpuEngine.there():
        pytest.skip("needs FAISS GPU")
    with on_device():
        yield
