"""The table that readers without its lock see change."""

import threading

import torch

from sparsemem.indexes.table import RowTable


def test_live_rows_are_listed_while_marks_change():
    table = RowTable(torch.zeros(4_000, 2), torch.ones(4_000, dtype=torch.bool))
    stop = threading.Event()

    def change():
        start = 0
        while not stop.is_set():
            table.live[start : start + 50] = bool(start % 3)
            start = (start + 37) % 3_900

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for _ in range(2_000):  # `nonzero` on the marks themselves fails, or worse, within tens
            ids = table.live_ids()
            assert bool((ids[1:] > ids[:-1]).all())
            block, rows = table.block(0, 2_000)
            assert len(block) == len(rows)
    finally:
        stop.set()
        writer.join()


def test_live_ids():
    live = torch.tensor([True, False, True, True, False])
    assert RowTable(torch.zeros(5, 2), live).live_ids().tolist() == [0, 2, 3]
    assert RowTable(torch.zeros(5, 2), torch.zeros(5, dtype=torch.bool)).live_ids().tolist() == []
