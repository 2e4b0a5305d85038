"""An index that is kept on its rows' device, with FAISS on a CPU in place of FAISS GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from sparsemem.indexes.device_faiss import ENGINES, Engine
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.row_dictionary import Kind, Manner


def on_device() -> AbstractContextManager[Any]:
    """Indices made inside are kept on the device of their rows, also on a CPU."""
    return mock.patch.dict(ENGINES, cpu=Engine)


class DeviceKind(Kind):
    """A kind that is kept on its rows' device."""

    def index(self, table: RowTable, metric: Metric, manner: Manner) -> Any:
        with on_device():
            return super().index(table, metric, manner)

    def derivation(self) -> type:
        from sparsemem.indexes.device_derived import DeviceDerived

        return DeviceDerived
