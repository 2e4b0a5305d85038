"""sparsemem bank inspect | verify | export | import."""

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from sparsemem.bank import MemoryBank
from sparsemem.cli import app
from tests.oracles.bank_state import fill, new_bank, rows_of


def bank_command(*arguments, code=0):
    """What a command prints, on either stream."""
    result = CliRunner().invoke(app, ["bank", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def path(tmp_path):
    """A closed durable bank with shards and a log."""
    bank = fill(new_bank(tmp_path / "bank"))
    bank.save()
    bank.remove(torch.tensor([0]))
    bank.append(torch.randn(2, 3))
    bank.close()
    return tmp_path / "bank"


def test_inspect_says_what_a_bank_is(path):
    lines = bank_command("inspect", path).splitlines()
    assert lines[0] == f"{path}: durable bank, format version 1"
    facts = dict(line.split() for line in lines[1:-3])
    assert facts == {
        "num_rows": "12",
        "width": "3",
        "value_width": "2",
        "dtype": "float32",
        "metric": "cosine",
        "index": "exact",
    }
    files = [file for file in path.iterdir() if file.suffix == ".safetensors"]
    size = sum(file.stat().st_size for file in files)
    assert lines[-3] == "7 live rows at save 1, clock 3"
    assert lines[-2] == f"1 shards, 2 files, {size} bytes"
    log = (path / "log-00000001").stat().st_size
    assert lines[-1] == f"2 operations logged since, {log} bytes"


def test_inspect_needs_no_lock_and_verify_does(path):
    bank = MemoryBank.load(path)
    assert "durable bank" in bank_command("inspect", path)
    assert "error: " in bank_command("verify", path, code=2)
    assert "bank is in use" in bank_command("export", path, "--to", path / "x.npy", code=2)
    bank.close()


def test_inspect_of_a_snapshot(tmp_path):
    fill(new_bank()).save(tmp_path / "saved")
    output = bank_command("inspect", tmp_path / "saved")
    assert output.startswith(f"{tmp_path / 'saved'}: snapshot of a bank, format version 1")
    assert "logged" not in output


def test_verify_checks_all_files_and_logs(path):
    assert bank_command("verify", path) == f"{path} is whole: 2 files, 2 logged operations\n"


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "log-00000001",
        "rows-00000-00000001.safetensors",
        "usage-00000-00000001.safetensors",
    ],
)
def test_verify_names_what_is_damaged_in_one_line(path, name):
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 4
    (path / name).write_bytes(data)
    lines = bank_command("verify", path, code=2).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {path / name} ")


def test_verify_tells_of_a_torn_tail(path):
    with open(path / "log-00000001", "ab") as file:
        file.write(b"SMBL")
    output = bank_command("verify", path)
    assert f"warning: {path / 'log-00000001'} has a torn tail: the 4 bytes" in output
    assert f"{path} is whole" in output


def test_what_is_no_bank_is_one_line(tmp_path):
    for command in ("inspect", "verify"):
        output = bank_command(command, tmp_path, code=2)
        assert output == f"error: {tmp_path} is no bank: there is no manifest.json in it\n"


def test_export_to_numpy(path, tmp_path):
    output = bank_command("export", path, "--to", tmp_path / "rows.npy")
    assert output.split() == [str(tmp_path / "rows.npy"), str(tmp_path / "rows.ids.npy")]
    bank = MemoryBank.load(path)
    ids = np.load(tmp_path / "rows.ids.npy")
    assert ids.tolist() == sorted(rows_of(bank))
    assert np.array_equal(np.load(tmp_path / "rows.npy"), bank.keys.detach().numpy()[ids])
    bank.close()
    bank_command("export", path, "--to", tmp_path / "values.npy", "--values")
    assert np.array_equal(np.load(tmp_path / "values.npy"), bank.values.detach().numpy()[ids])


def test_export_to_faiss(path, tmp_path):
    faiss = pytest.importorskip("faiss")
    bank_command("export", path, "--to", tmp_path / "rows.faiss", "--factory", "HNSW8")
    index = faiss.read_index(str(tmp_path / "rows.faiss"))
    rows = rows_of(MemoryBank.load(path))
    assert faiss.vector_to_array(index.id_map).tolist() == sorted(rows)
    output = bank_command(
        "export", path, "--to", tmp_path / "x.faiss", "--factory", "Magic7", code=2
    )
    assert "Magic7" in output


def test_export_to_something_else_is_refused(path, tmp_path):
    output = bank_command("export", path, "--to", tmp_path / "rows.csv", code=2)
    assert "expected a name that ends in .npy, .faiss or .index" in output


def test_an_export_that_makes_no_sense_is_one_line(path, tmp_path):
    for arguments, message in (
        (["--to", tmp_path / "no" / "rows.npy"], "rows.npy, expected a file in a folder that is"),
        (["--to", tmp_path / "rows.npy", "--factory", "Flat"], "--factory is Flat, expected none"),
    ):
        output = bank_command("export", path, *arguments, code=2)
        assert output.startswith("error: --")
        assert len(output.splitlines()) == 1
        assert message in output
    assert list(tmp_path.iterdir()) == [path]


def test_import_makes_a_durable_bank(tmp_path):
    rows, values = np.random.default_rng(0).normal(size=(5, 3)), torch.randn(5, 2).double()
    np.save(tmp_path / "rows.npy", rows)
    safetensors.torch.save_file({"weight": values}, tmp_path / "values.safetensors")
    output = bank_command(
        *("import", tmp_path / "bank", "--from", tmp_path / "rows.npy"),
        *("--values", tmp_path / "values.safetensors", "--num-rows", 8, "--metric", "ip"),
    )
    assert output == f"{tmp_path / 'bank'}: 5 rows of width 3\n"
    bank = MemoryBank.load(tmp_path / "bank")
    assert (bank.num_rows, bank.metric, bank.journal.path) == (8, "ip", tmp_path / "bank")
    assert np.array_equal(bank.keys[:5].detach().numpy(), rows)
    assert torch.equal(bank.values[:5], values)


def test_a_bad_import_is_one_line_and_leaves_nothing(tmp_path, plain_errors):
    np.save(tmp_path / "rows.npy", np.zeros((5, 3), np.float32))
    np.save(tmp_path / "few.npy", np.zeros((4, 3), np.float32))
    np.save(tmp_path / "nan.npy", np.full((5, 3), np.nan))
    for arguments, message in (
        (["--from", tmp_path / "model.pt"], "pickles (.pt, .bin) are not read"),
        (
            ["--from", tmp_path / "rows.npy", "--values", tmp_path / "few.npy"],
            "values has shape [4, 3], expected [5, *]",
        ),
        (["--from", tmp_path / "rows.npy", "--num-rows", 3], "num_rows is 3, expected at least 5"),
        (["--from", tmp_path / "rows.npy", "--num-rows", 10**14], "num_rows is 100000000000000, w"),
        (["--from", tmp_path / "rows.npy", "--metric", "cos"], "metric is 'cos'"),
        (["--from", tmp_path / "nan.npy"], "nan"),
    ):
        output = bank_command("import", tmp_path / "bank", *arguments, code=2)
        assert output.startswith("error: ")
        assert len(output.splitlines()) == 1
        assert message in output
        assert not (tmp_path / "bank").exists()
