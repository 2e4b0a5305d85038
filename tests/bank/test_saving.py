"""Which shards a save copies: those with rows that changed, and all where nobody can say."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.bank import folder, saving
from sparsemem.bank.errors import BankError
from sparsemem.optim import RowAdagrad
from tests.oracles.bank_state import NUM_ROWS, new_bank, reopened, rows_of
from tests.oracles.row_optimizers import sparse


@pytest.fixture
def copied(monkeypatch):
    """Numbers of the shards of rows that a save has copied, and so read and hashed."""
    numbers, real = [], saving.take_rows

    def take(bank, layout, number):
        numbers.append(number)
        return real(bank, layout, number)

    monkeypatch.setattr(saving, "take_rows", take)
    return numbers


def step(bank, ids, make):
    """One step of an optimiser that moves keys and values of some rows."""
    optimiser = make(list(bank.parameters()), lr=0.1)
    bank.keys.grad = sparse(ids, torch.ones(len(ids), 3), NUM_ROWS)
    bank.values.grad = sparse(ids, torch.ones(len(ids), 2), NUM_ROWS)
    optimiser.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam, RowAdagrad])
def test_a_save_after_steps_copies_the_shards_that_they_touched(
    tmp_path, small_shards, copied, make
):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3), torch.randn(12, 2))
    bank.save()
    copied.clear()
    step(bank, [9, 10], make)
    step(bank, [11], make)
    bank.save()
    assert copied == [2]
    step(bank, [1], make)
    bank.write(torch.tensor([9]), torch.randn(1, 3))
    bank.save()
    assert copied == [2, 0, 2]
    bank.save()
    assert copied == [2, 0, 2]
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


@pytest.mark.parametrize("table", ["keys", "values"])
@pytest.mark.parametrize("make", [torch.optim.SGD, RowAdagrad])
def test_what_a_step_tells_of_does_not_hide_what_nobody_told_of(
    tmp_path, small_shards, copied, table, make
):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3), torch.randn(12, 2))
    bank.save()
    with torch.no_grad():
        getattr(bank, table)[7, 1] = 8.5
    copied.clear()
    step(bank, [9], make)
    bank.save()
    assert copied == [0, 1, 2]
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_a_step_whose_closure_makes_the_gradient_hides_nothing_either(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank", value_width=None)
    bank.append(torch.randn(12, 3))
    bank.save()
    with torch.no_grad():
        bank.keys[7, 1] = 8.5

    def closure():
        bank.keys.grad = sparse([1], torch.ones(1, 3), NUM_ROWS)

    torch.optim.SGD(bank.parameters(), lr=0.1).step(closure)
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_a_step_that_breaks_off_is_in_the_next_save(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank", value_width=None)
    bank.append(torch.randn(12, 3))
    bank.save()

    class Failing(RowAdagrad):
        def _step_rows(self, change, ids, gradient):
            super()._step_rows(change, ids, gradient)
            raise KeyboardInterrupt

        def _step_entries(self, change, ids, bank):  # where a kernel takes them
            super()._step_entries(change, ids, bank)
            raise KeyboardInterrupt

    bank.keys.grad = sparse([9], torch.ones(1, 3), NUM_ROWS)
    with pytest.raises(KeyboardInterrupt):
        Failing(list(bank.parameters()), lr=0.1).step()
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_a_save_that_fails_forgets_no_step(tmp_path, monkeypatch, small_shards, copied):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3), torch.randn(12, 2))
    bank.save()
    step(bank, [9], RowAdagrad)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "replace_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(BankError):
            bank.save()
    step(bank, [1], RowAdagrad)
    copied.clear()
    bank.save()
    assert copied == [0, 2]
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_an_unknown_optimiser_means_all_shards(tmp_path, small_shards, copied):
    bank = new_bank(tmp_path / "bank", value_width=None)
    bank.append(torch.randn(12, 3))
    bank.save()
    bank.keys.grad = torch.ones(12, 3)
    torch.optim.RMSprop(bank.parameters(), lr=0.1).step()
    copied.clear()
    bank.save()
    assert copied == [0, 1, 2]
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["step", "torch", "untold", "write", "remove", "fail", "save", "reopen"]),
        st.sets(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=2).map(sorted),
    ),
    max_size=10,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_a_save_holds_all_that_happened(tmp_path, monkeypatch, small_shards, changes):
    shutil.rmtree(tmp_path / "bank", ignore_errors=True)
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3), torch.randn(12, 2))
    for change, ids in changes:
        if change in ("step", "torch"):
            step(bank, ids, RowAdagrad if change == "step" else torch.optim.SparseAdam)
        elif change == "untold":
            with torch.no_grad():
                (bank.keys if len(ids) > 1 else bank.values)[ids] += 1
        elif change == "write":
            bank.write(torch.tensor(ids), torch.randn(len(ids), 3))
        elif change == "remove":
            bank.remove(torch.tensor(ids))
        elif change == "fail":
            with monkeypatch.context() as patch:
                patch.setattr(saving, "sync_folder", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    bank.save()
        else:
            bank.save()
            if change == "reopen":
                expected = rows_of(bank)
                bank = reopened(bank, tmp_path / "bank")
                assert rows_of(bank) == expected
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)


def test_a_part_of_a_state_becomes_durable_with_a_save(tmp_path, small_shards):
    bank = new_bank(tmp_path / "bank")
    bank.append(torch.randn(12, 3))
    bank.save()
    bank.load_state_dict({"book.tags": torch.arange(NUM_ROWS)}, strict=False)
    bank.save()
    assert rows_of(reopened(bank, tmp_path / "bank")) == rows_of(bank)
    assert rows_of(bank)[7][3] == 7
