"""What a bank is made of: copies, moves, the journal, listeners, keys changed behind its back."""

import copy
import gc
import pickle
import warnings

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.bank.errors import BankError
from sparsemem.bank.journal import Kind
from sparsemem.bank.rows import bank_of

IVF = {"index": "IVF4,Flat", "background": False, "exact_below": 8, "buffer_rows": 4}


def rows_of(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank():
    bank = MemoryBank(12, 4, 3)
    bank.append(rows_of(10, 4), rows_of(10, 3, seed=2))
    return bank


def assert_reads_alike(first, second, queries):
    for part, other in zip(first.read(queries, 5), second.read(queries, 5), strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=0)


class Recorder:
    """A journal in a list; it notes whether the row was still as before."""

    path = None

    def __init__(self, bank):
        self.bank, self.records, self.marks, self.full = bank, [], [], None

    def record(self, kind, ids, arrays):
        if self.full:
            raise self.full
        before = self.bank.book.live[ids].tolist(), self.bank.book.frozen[ids].tolist()
        self.records.append(
            (kind, ids.tolist(), {n: a.tolist() for n, a in arrays.items()}, before)
        )

    def expect_change(self):
        pass

    def touched(self, ids, table=None):
        self.marks += ids.tolist()

    def save(self):
        pass

    def close(self):
        pass


def test_every_change_is_recorded_before_it_is_made():
    bank = MemoryBank(3, 2, 1)
    bank.journal = journal = Recorder(bank)
    ids = bank.append(torch.ones(1, 2), tags=4, ttl=3)
    bank.write(torch.tensor([2]), torch.zeros(1, 2), torch.ones(1, 1))
    bank.write(torch.tensor([2]), values=torch.zeros(1, 1))
    bank.freeze(ids)
    bank.freeze(ids)  # no change
    bank.remove(torch.tensor([1]))  # neither: it is not live
    bank.read(torch.ones(1, 2), 1)
    bank.read(torch.ones(1, 2), 1)  # row 0 goes
    whole = {"rows": [[1.0, 1.0]], "values": [[0.0]], "tags": [4], "expiry": [5]}
    other = {"rows": [[0.0, 0.0]], "values": [[1.0]], "tags": [0], "expiry": [0]}
    assert journal.records == [
        (Kind.NEW, [0], whole, ([False], [False])),
        (Kind.PUT, [2], other, ([False], [False])),
        (Kind.PUT, [2], {"values": [[0.0]], "tags": [0], "expiry": [0]}, ([True], [False])),
        (Kind.FLAG, [0], {"frozen": [True]}, ([True], [False])),
        (Kind.DROP, [0], {}, ([True], [True])),
    ]


def test_records_applied_to_another_bank_give_the_same_rows():
    bank, other = MemoryBank(6, 2, 1), MemoryBank(6, 2, 1)

    class Copying(Recorder):
        def record(self, kind, ids, arrays):
            if kind in (Kind.PUT, Kind.NEW):
                parts = (arrays.get(name) for name in ("rows", "values", "tags", "expiry"))
                other._put(ids, *parts, anew=kind is Kind.NEW)
            elif kind is Kind.DROP:
                other._drop(ids)
            else:
                other._flag(ids, arrays["frozen"])

    bank.journal = Copying(bank)
    for step in range(30):
        ids = bank.append(rows_of(2, 2, seed=step), rows_of(2, 1, seed=step), tags=step % 3)
        if step % 4 == 0:
            bank.freeze(ids[:1])
        if step % 5 == 0:
            bank.unfreeze()
            bank.remove(ids[1:])
        bank.write(ids[:1], rows_of(1, 2, seed=50 + step), ttl=step % 3)
    assert torch.equal(bank.keys, other.keys)
    assert torch.equal(bank.values, other.values)
    for name in ("live", "frozen", "tags", "expiry"):
        assert torch.equal(getattr(bank.book, name), getattr(other.book, name))
    assert bank.stats()["num_live"] == other.stats()["num_live"]


def test_nothing_changes_when_the_journal_fails(bank):
    bank.append(rows_of(2, 4), ttl=1)
    bank.remove(torch.tensor([3]))
    state = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank.journal = journal = Recorder(bank)
    journal.full = OSError("no space left")
    for change in (
        lambda: bank.append(rows_of(5, 4)),
        lambda: bank.write(torch.tensor([1, 3]), rows_of(2, 4)),
        lambda: bank.remove(torch.tensor([1])),
        lambda: bank.freeze(torch.tensor([1])),
    ):
        with pytest.raises(OSError, match="no space left"):
            change()
        for name, tensor in bank.state_dict().items():
            if name != "book.clock":
                assert torch.equal(tensor, state[name]), name
    journal.full = None
    bank.read(rows_of(1, 4), 1)
    assert bank.append(rows_of(4, 4)).tolist() == [3, 10, 11, 0]


@pytest.mark.parametrize("options", [{}, IVF])
@pytest.mark.parametrize("place", ["index.changed", "table.set_live", "book.accessed"])
def test_a_write_that_is_interrupted_is_found_or_was_not_made(options, place, monkeypatch):
    if options:
        pytest.importorskip("faiss")
    bank = MemoryBank(40, 4, metric="l2", **options)
    bank.append(rows_of(20, 4))
    owner, name = place.split(".")
    lock = bank.table.lock

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(getattr(bank, owner), name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            bank.append(torch.full((1, 4), 50.0))
    live = bool(bank.book.live[20])
    assert live == (place != "table.set_live")
    found = bank.read(torch.full((1, 4), 50.0), 1).ids.tolist() == [[20]]
    assert (found, bank.stats()["num_live"]) == (live, 20 + live)
    assert bank.table.lock is lock  # others may wait for it
    assert bank.append(rows_of(1, 4)).tolist() == [21]  # never used, and row 20 is by now


def test_a_removal_that_is_interrupted_is_made_good(bank, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    bank.append(rows_of(2, 4))  # full
    with monkeypatch.context() as patch:
        patch.setattr(bank._room, "removed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bank.remove(torch.tensor([7]))
    assert bank.append(rows_of(1, 4)).tolist() == [7]


def test_reads_go_on_when_rows_expire_and_the_folder_is_closed(tmp_path):
    bank = MemoryBank(12, 4, path=tmp_path / "bank")
    bank.append(rows_of(3, 4), ttl=2)
    bank.append(rows_of(1, 4, seed=3))
    bank.close()
    for _ in range(4):
        hit = bank.read(rows_of(1, 4), 4)
    assert hit.ids.tolist() == [[3, -1, -1, -1]]
    with pytest.raises(BankError, match="was closed"):
        bank.append(rows_of(1, 4))
    again = MemoryBank.load(tmp_path / "bank")
    for _ in range(4):
        hit = again.read(rows_of(1, 4), 4)
    assert hit.ids.tolist() == [[3, -1, -1, -1]]


def test_rows_that_expire_while_nothing_can_be_logged_are_logged_before_the_next_change(bank):
    ids = bank.append(rows_of(2, 4), ttl=1)
    bank.freeze(ids[:1])
    bank.journal = journal = Recorder(bank)
    journal.full = BankError("no space left")
    bank.read(rows_of(1, 4), 1)
    assert set(bank.read(rows_of(1, 4), 12).ids.flatten().tolist()) == {*range(10), -1}
    with pytest.raises(BankError, match="no space left"):
        bank.write(ids[:1], rows_of(1, 4))
    assert not bank.book.live[ids].any()
    assert journal.marks == ids.tolist()
    journal.full = None
    bank.write(ids[:1], rows_of(1, 4))
    bank.write(ids[:1], rows_of(1, 4))
    kinds = [record[:2] for record in journal.records]
    assert kinds == [(Kind.DROP, [10, 11]), (Kind.PUT, [10]), (Kind.PUT, [10])]


def test_listeners_forget_rows_that_go(bank):
    class Listener:
        def __init__(self):
            self.rows = []

        def forget(self, parameter, ids):
            assert parameter is bank.keys or parameter is bank.values
            self.rows.append(("keys" if parameter is bank.keys else "values", ids.tolist()))

    first, second = Listener(), Listener()
    bank.add_listener(first)
    bank.add_listener(second)
    bank.remove(torch.tensor([4, 11]))
    bank.append(rows_of(4, 4))  # two unused rows, the removed one, the oldest one
    bank.write(torch.tensor([5]), rows_of(1, 4))
    rows = [[4], [10, 11, 4, 0]]
    assert first.rows == second.rows == [(name, ids) for ids in rows for name in ("keys", "values")]
    before = len(bank._listeners)
    del second
    gc.collect()
    assert (before, len(bank._listeners)) == (2, 1)


@pytest.mark.parametrize("options", [{}, IVF])
def test_keys_changed_in_place_are_found_with_a_warning_the_first_time(options):
    if options:
        pytest.importorskip("faiss")
    bank = MemoryBank(40, 4, metric="l2", **options)
    bank.append(rows_of(40, 4))
    bank.read(rows_of(1, 4), 1)
    with torch.no_grad():
        bank.keys[7] = 50.0
    with pytest.warns(UserWarning, match=r"bank\.write.*bank\.changed"):
        assert bank.read(torch.full((1, 4), 50.0), 1).ids.tolist() == [[7]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            bank.keys[8] = 70.0
        assert bank.read(torch.full((1, 4), 70.0), 1).ids.tolist() == [[8]]
        with torch.no_grad(), bank.table.lock.write():
            bank.keys[9] = 90.0
            bank.changed(torch.tensor([9]))
        assert bank.read(torch.full((1, 4), 90.0), 1).ids.tolist() == [[9]]


def test_rows_changed_in_place_are_told_to_the_journal(bank):
    bank.journal = Recorder(bank)
    with torch.no_grad():
        bank.keys[3] = 1.0
    with bank.table.lock.write():
        bank.changed(torch.tensor([3]))
    assert bank.journal.marks == [3]


@pytest.mark.parametrize("options", [{}, IVF])
def test_a_copy_is_a_bank_of_its_own(options):
    if options:
        pytest.importorskip("faiss")
    bank = MemoryBank(40, 4, 3, metric="l2", **options)
    bank.append(rows_of(30, 4), rows_of(30, 3))
    again = copy.deepcopy(torch.nn.ModuleList([bank]))[0]
    assert bank_of(again.keys) is bank_of(again.values) is again
    assert again.table.lock is not bank.table.lock
    assert_reads_alike(bank, again, rows_of(5, 4, seed=9))
    again.write(torch.tensor([3]), torch.full((1, 4), 50.0))
    assert again.read(torch.full((1, 4), 50.0), 1).ids.tolist() == [[3]]
    assert not (bank.keys == 50).any()
    again.remove(torch.tensor([4]))
    assert (again.stats()["num_live"], bank.stats()["num_live"]) == (29, 30)


def test_a_bank_survives_pickling(bank):
    bank.freeze(torch.tensor([2]))
    again = pickle.loads(pickle.dumps(torch.nn.ModuleList([bank])))[0]
    assert bank_of(again.keys) is bank_of(again.values) is again
    assert again.stats() == bank.stats()
    assert_reads_alike(bank, again, rows_of(5, 4, seed=9))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_carries_rows_usage_and_marks(bank, assign):
    bank.freeze(torch.tensor([0]))
    bank.remove(torch.tensor([5]))
    bank.read(rows_of(1, 4), 3)
    state = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    other = MemoryBank(12, 4, 3)
    other.append(rows_of(1, 4))
    other.load_state_dict(state, assign=assign)
    assert other.stats() == bank.stats()
    assert bank_of(other.keys) is other
    assert_reads_alike(bank, other, rows_of(5, 4, seed=9))
    ids = bank.append(rows_of(5, 4))
    assert ids.tolist()[:3] == [10, 11, 5]
    assert torch.equal(other.append(rows_of(5, 4)), ids)
    other.write(torch.tensor([2]), torch.full((1, 4), 9.0))
    assert torch.equal(other.keys[2], torch.full((4,), 9.0))


def test_moving_to_another_dtype_moves_table_and_index(bank):
    keys, table = bank.keys, bank.table
    bank.to("cpu")
    assert bank.table is table  # nothing moved
    bank.double()
    assert bank.keys is keys
    assert bank.computing_dtype == torch.float64
    hit = bank.read(rows_of(2, 4), 3)
    assert hit.scores.dtype == torch.float64
    bank.write(torch.tensor([1]), torch.full((1, 4), 3.0))
    assert torch.equal(bank.keys[1], torch.full((4,), 3.0).double())
    bank.bfloat16()
    hit = bank.read(rows_of(2, 4), 3)
    assert hit.rows.dtype == torch.float32
    hit.rows.sum().backward()
    assert bank.keys.grad.dtype == torch.bfloat16


def product(**options):
    return MemoryBank(36, 4, 3, index="product-key", **{"metric": "ip", **options})


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_product_keys_read_as_the_rows_that_they_make(metric, kernels, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", kernels)
    bank = product(metric=metric, initial="normal", dtype=torch.float64)
    plain = MemoryBank(36, 4, 3, metric=metric, dtype=torch.float64)
    subkeys = bank.keys.detach().clone().requires_grad_()
    pairs = torch.cat([subkeys[0].repeat_interleave(6, 0), subkeys[1].repeat(6, 1)], 1)
    plain.append(pairs.detach(), bank.values.detach())
    queries = rows_of(5, 2, 4).double().requires_grad_()
    hit, other = bank.read(queries, 7), plain.read(queries, 7)
    for part, want in zip(hit, other, strict=True):
        assert torch.equal(part, want)
    weights = rows_of(5, 2, 7)
    grads = [
        torch.autograd.grad(
            (h.scores * weights).sum() + h.rows.sum() + h.values.square().sum(),
            [queries, each.keys, each.values],
        )
        for h, each in ((hit, bank), (other, plain))
    ]
    if kernels == "reference":
        assert torch.equal(grads[0][0], grads[1][0])
    # Compiled code, which the rows of product keys do not go through, rounds otherwise.
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=1e-12)
    assert torch.equal(grads[0][2].to_dense(), grads[1][2].to_dense())
    pairs.backward(grads[1][1].to_dense())
    torch.testing.assert_close(grads[0][1], subkeys.grad, rtol=0, atol=1e-12)


def test_product_keys_are_removed_and_written_by_value():
    bank = product()
    assert bank.stats()["num_live"] == 36
    assert not bank.values.any()
    query = bank.gather(torch.tensor([[8]]))[0].detach() * 10
    best = int(bank.read(query, 1).ids)
    bank.remove(torch.tensor([best]))
    assert int(bank.read(query, 1).ids) != best
    copied = copy.deepcopy(bank)
    bank.write(torch.tensor([best]), values=torch.ones(1, 3))
    hit = bank.read(query, 1)
    assert (int(hit.ids), hit.values.tolist()) == (best, [[[1.0, 1.0, 1.0]]])
    assert int(copied.read(query, 1).ids) != best
    copied.load_state_dict(bank.state_dict())
    assert int(copied.read(query, 1).ids) == best
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            bank.keys.mul_(-1)  # an optimiser's step: nobody needs to be told
        assert torch.equal(bank.read(-query, 1).ids, hit.ids)


def test_arguments_make_an_equal_bank(bank):
    arguments = bank.arguments
    assert arguments["dtype"] == "float32"
    again = MemoryBank(**{**arguments, "dtype": getattr(torch, arguments["dtype"])})
    assert again.arguments == arguments
    assert [table.shape for table in again.tables] == [(12, 4), (12, 3)]
