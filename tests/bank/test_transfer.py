"""Rows in and out of banks."""

import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from sparsemem.bank import MemoryBank, transfer
from sparsemem.bank.errors import BankError
from sparsemem.bank.transfer import (
    export_faiss,
    export_npy,
    from_embedding,
    from_rows,
    open_rows,
    read_table,
)
from tests.oracles.bank_state import fill, new_bank, rows_of


def test_rows_become_a_bank():
    rows, values = torch.randn(7, 3), torch.randn(7, 2)
    bank = from_rows(rows, values, metric="ip", num_rows=9)
    assert torch.equal(bank.keys[:7], rows)
    assert torch.equal(bank.values[:7], values)
    assert (bank.num_rows, sorted(rows_of(bank)), bank.metric) == (9, list(range(7)), "ip")
    assert from_rows(rows.double(), ids=torch.tensor([9, 1, 2, 3, 4, 5, 6])).num_rows == 10
    assert from_rows(rows.double()).keys.dtype == torch.float64
    assert from_rows(rows, dtype=torch.bfloat16).keys.dtype == torch.bfloat16


def test_many_rows_go_in_and_out_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 4)
    rows, values = torch.randn(11, 3), torch.randn(11, 2)
    bank = from_rows(rows, values)
    assert torch.equal(bank.keys, rows)
    assert torch.equal(bank.values, values)
    export_npy(bank, tmp_path / "values.npy", "values")
    assert np.array_equal(np.load(tmp_path / "values.npy"), values.numpy())


def test_rows_become_a_durable_bank_at_once(tmp_path):
    bank = from_rows(torch.randn(7, 3), path=tmp_path / "bank", sync=True)
    bank.append(torch.randn(1, 3))
    bank.close()
    loaded = MemoryBank.load(tmp_path / "bank")
    assert rows_of(loaded) == rows_of(bank)
    with pytest.raises(BankError, match="bank holds a bank already"):
        from_rows(torch.randn(7, 3), path=tmp_path / "bank")


def test_rows_and_ids_that_do_not_fit_are_refused(plain_errors):
    rows = torch.randn(4, 3)
    for arguments, message in (
        ({"rows": rows[0]}, r"rows has shape \[3\], expected \[3, \*\]"),
        ({"values": rows[1:]}, r"values has shape \[3, 3\], expected \[4, \*\]"),
        ({"ids": torch.arange(5)}, "ids has 5 entries, expected 4, one for each row"),
        ({"ids": torch.tensor([0, 1, 2, 1])}, "ids holds 1 more than once"),
        ({"num_rows": 3}, "num_rows is 3, expected at least 4, one a row"),
        ({"num_rows": 0}, "num_rows is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            from_rows(**{"rows": rows, **arguments})


def test_bad_rows_leave_no_folder(tmp_path):
    rows = torch.randn(7, 3)
    rows[4, 1] = torch.nan
    with pytest.raises(ValueError, match="nan"):
        from_rows(rows, path=tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_becomes_a_bank_under_its_own_ids():
    embedding = nn.Embedding(6, 3)
    bank = from_embedding(embedding)
    assert torch.equal(bank.keys, embedding.weight)
    assert sorted(rows_of(bank)) == list(range(6))
    bank.write(torch.tensor([0]), torch.zeros(1, 3))
    assert embedding.weight[0].abs().sum() > 0  # a copy


@pytest.mark.parametrize("padding", [0, 5])
def test_a_padding_row_is_not_live(padding):
    embedding = nn.Embedding(6, 3, padding_idx=padding)
    bank = from_embedding(embedding, index="exact")
    assert bank.num_rows == 6
    assert sorted(rows_of(bank)) == [row for row in range(6) if row != padding]
    assert torch.equal(bank.keys, embedding.weight)


def test_exported_rows_are_the_live_ones_in_order_of_their_ids(tmp_path):
    bank = fill(new_bank())
    paths = export_npy(bank, tmp_path / "rows.npy")
    assert paths == (tmp_path / "rows.npy", tmp_path / "rows.ids.npy")
    rows, ids = (np.load(path, allow_pickle=False) for path in paths)
    expected = rows_of(bank)
    assert ids.tolist() == sorted(expected) == [0, 1, 2, 3, 4, 7, 11]
    assert [tuple(row) for row in rows.tolist()] == [expected[row][0] for row in ids.tolist()]
    values = np.load(export_npy(bank, tmp_path / "values.npy", "values")[0])
    assert [tuple(row) for row in values.tolist()] == [expected[row][1] for row in ids.tolist()]


@pytest.mark.parametrize(
    ("dtype", "written"),
    [(torch.float16, "f2"), (torch.bfloat16, "f4"), (torch.float64, "f8"), (torch.float32, "f4")],
)
def test_exported_rows_are_imported_again(tmp_path, dtype, written):
    bank = from_rows(torch.randn(5, 3).to(dtype))
    path, _ = export_npy(bank, tmp_path / "rows.npy")
    assert np.load(path).dtype == np.dtype(written)
    assert torch.equal(from_rows(read_table(path), dtype=dtype).keys, bank.keys)


def test_an_empty_bank_has_no_rows_to_export(tmp_path):
    rows, ids = export_npy(new_bank(), tmp_path / "rows.npy")
    assert np.load(rows).shape == (0, 3)
    assert np.load(ids).shape == (0,)
    pytest.importorskip("faiss")
    with pytest.raises(BankError, match="'IVF4,Flat' is trained on rows, and the bank has none"):
        export_faiss(new_bank(), tmp_path / "rows.faiss", "IVF4,Flat")


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_an_exported_faiss_index_finds_what_the_bank_finds(tmp_path, metric, factory):
    faiss = pytest.importorskip("faiss")
    bank = MemoryBank(300, 8, metric=metric)
    bank.append(torch.randn(200, 8))
    bank.remove(torch.arange(0, 200, 3))
    path = export_faiss(bank, tmp_path / "rows.faiss", factory)
    index = faiss.read_index(str(path))
    if factory.startswith("IVF"):
        faiss.extract_index_ivf(index).nprobe = 4
    queries = bank.keys.detach()[1:30:3]
    if metric == "cosine":
        queries = queries / queries.norm(dim=1, keepdim=True)
    scores, ids = index.search(queries.numpy(), 1)
    hit = bank.read(queries, 1)
    assert ids.tolist() == hit.ids.tolist()
    assert np.allclose(scores, hit.scores.detach().numpy(), atol=1e-4)


def test_values_of_a_bank_that_has_none_are_refused(tmp_path):
    bank = new_bank(value_width=None)
    with pytest.raises(BankError, match="the bank has no values: its keys are its values"):
        export_npy(bank, tmp_path / "values.npy", "values")
    with pytest.raises(ValueError, match="table is 'rows', expected 'keys' or 'values'"):
        export_npy(bank, tmp_path / "values.npy", "rows")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "rows.npy").write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BankError, match=r"cannot write to .*rows.npy: No space left on device"):
        export_npy(fill(new_bank()), tmp_path / "rows.npy")
    assert (tmp_path / "rows.npy").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_rows_of_a_folder_are_copied_and_the_folder_left_alone(tmp_path):
    options = {"index": "IVF4,Flat", "min_recall": None} if has_faiss() else {}
    bank = fill(new_bank(tmp_path / "bank", **options))
    bank.close()
    before = sorted((file.name, file.stat().st_mtime_ns) for file in (tmp_path / "bank").iterdir())
    rows = open_rows(tmp_path / "bank")
    assert rows_of(rows) == rows_of(bank)
    assert (rows.journal, rows.arguments["index"]) == (None, "exact")
    after = sorted((file.name, file.stat().st_mtime_ns) for file in (tmp_path / "bank").iterdir())
    assert after == before
    MemoryBank.load(tmp_path / "bank").close()  # it is not locked any more


def test_of_product_keys_the_values_are_exported(tmp_path):
    options = {"index": "product-key", "metric": "ip", "num_rows": 16, "width": 4}
    bank = new_bank(tmp_path / "bank", **options)
    bank.write(torch.arange(3), values=torch.randn(3, 2))
    bank.remove(torch.tensor([1]))
    bank.close()
    rows = open_rows(tmp_path / "bank")
    assert torch.equal(rows.keys, bank.keys)
    files = export_npy(rows, tmp_path / "values.npy", "values")
    ids = np.load(files[1])
    assert ids.tolist() == [0, *range(2, 16)]
    assert np.array_equal(np.load(files[0]), bank.values.detach().numpy()[ids])
    with pytest.raises(BankError, match=r"product keys.* not stored: expected its values"):
        export_npy(rows, tmp_path / "keys.npy")
    assert not (tmp_path / "keys.npy").exists()


@pytest.mark.parametrize("factory", ["IVF4096,Flat", "PQ3"])
def test_a_faiss_index_that_needs_more_rows_is_refused_by_name(tmp_path, factory):
    pytest.importorskip("faiss")
    bank = fill(new_bank())
    with pytest.raises(BankError, match=rf"index '{factory}' cannot be made of 7 rows \(FAISS: "):
        export_faiss(bank, tmp_path / "rows.faiss", factory)
    assert list(tmp_path.iterdir()) == []


def has_faiss():
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def test_tables_are_read_from_npy_and_safetensors(tmp_path):
    weight = torch.randn(4, 3)
    np.save(tmp_path / "rows.npy", weight.numpy())
    safetensors.torch.save_file({"weight": weight}, tmp_path / "rows.safetensors")
    for name in ("rows.npy", "rows.safetensors"):
        assert torch.equal(read_table(tmp_path / name), weight)
    np.save(tmp_path / "turned.npy", np.asfortranarray(weight.numpy()))
    assert torch.equal(read_table(tmp_path / "turned.npy"), weight)


def test_files_that_hold_no_table_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.save(tmp_path / "object.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.save(tmp_path / "ints.npy", np.zeros((3, 2), np.int64))
    np.save(tmp_path / "line.npy", np.zeros(3))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "line.npy").read_bytes()[:20])
    safetensors.torch.save_file({"bias": torch.zeros(3, 2)}, tmp_path / "bias.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"x" * 30)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    for name, message in (
        ("object.npy", "cannot read .*object.npy: "),
        ("ints.npy", r"ints.npy holds torch.int64 \[3, 2\], expected floats \[n, W\]"),
        ("line.npy", r"line.npy holds torch.float64 \[3\], expected floats"),
        ("torn.npy", "cannot read .*torn.npy: "),
        ("bias.safetensors", "cannot read .*bias.safetensors: .*weight"),
        ("no.safetensors", "cannot read .*no.safetensors: "),
        ("none.npy", "cannot read .*none.npy: No such file"),
        ("none.safetensors", "cannot read .*none.safetensors: No such file"),
        ("model.pt", r"model.pt is neither .* pickles \(.pt, .bin\) are not read: save the"),
    ):
        with pytest.raises(BankError, match=message):
            read_table(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
