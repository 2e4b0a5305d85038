"""A bank that was resharded reads and trains as the one that it was made of."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparsemem import MemoryBank
from sparsemem.bank.errors import BankError
from sparsemem.cli import app
from sparsemem.distributed import home as home_module
from sparsemem.distributed import reshard as reshard_module
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.reshard import reshard
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowAdagrad, RowAdam, RowSGD
from tests.oracles.sharded import whole

ROWS, WIDTH, VALUE_WIDTH = 50, 6, 3
GOING_ON = [15, pytest.param(50, marks=pytest.mark.slow)]  # steps after a bank was resharded


class Training:
    """A run over a bank, whose dense part can go on over another bank."""

    def __init__(self, bank, seed=0, kind=RowAdam):
        torch.manual_seed(seed)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.bank, self.kind = bank, kind
        self.optimiser = torch.optim.Adam(self.layer.parameters(), lr=0.02)
        self.done = 0

    def over(self, bank):
        other = Training(bank, kind=self.kind)
        other.layer.load_state_dict(self.layer.state_dict())
        other.optimiser.load_state_dict(copy.deepcopy(self.optimiser.state_dict()))
        other.done = self.done
        return other

    def run(self, steps):
        rows = self.kind([self.bank.keys, self.bank.values], lr=0.05)
        losses = []
        for number in range(self.done, self.done + steps):
            generator = torch.Generator().manual_seed(number)
            query = torch.randn(8, WIDTH, generator=generator)
            target = torch.randn(8, VALUE_WIDTH, generator=generator)
            hit = self.bank.read(self.layer(query), 5)
            weights = hit.scores.mul(4).softmax(-1)
            loss = ((weights.unsqueeze(-1) * hit.values).sum(-2) - target).square().mean()
            for optimiser in (rows, self.optimiser):
                optimiser.zero_grad()
            loss.backward()
            rows.step()
            self.optimiser.step()
            losses.append(loss.item())
        self.done += steps
        return losses


def fill(bank):
    """Rows of every kind, but for those that come with time."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(ROWS - 4, WIDTH, generator=generator)
    values = torch.randn(ROWS - 4, VALUE_WIDTH, generator=generator)
    bank.append(rows, values, tags=torch.arange(ROWS - 4) % 3)
    bank.write(torch.tensor([7, 8, 9]), rows[:3], ttl=400)
    bank.remove(torch.tensor([11, 20]))
    bank.freeze(torch.tensor([0, 1, 13]))


def new_bank(path, num_shards):
    ShardedBank.create(path, ROWS, WIDTH, VALUE_WIDTH, num_shards=num_shards)
    bank = opened(path)
    fill(bank)
    return bank


def opened(path):
    return ShardedBank(path, LocalShards(path))


def files_of(path):
    found = {p: p.read_bytes() for p in Path(path).rglob("*") if p.is_file() and p.name != "lock"}
    return {str(p.relative_to(path)): data for p, data in found.items()}


def book_of(bank):
    book, keys = whole(bank)
    columns = {name: getattr(book, name) for name, _ in reshard_module.COLUMNS}
    return {**columns, "keys": keys[columns["live"]]}


def same_book(one, other, without=()):
    for name, column in one.items():
        if name not in without:
            assert torch.equal(column, other[name]), name


@pytest.fixture(scope="module", params=GOING_ON)
def trained(tmp_path_factory, request):
    """A folder of 4 shards with logs and checkpoints, the run that it is of, and what comes."""
    path = tmp_path_factory.mktemp("trained") / "bank"
    bank = new_bank(path, 4)
    run = Training(bank)
    run.run(15)
    bank.save()
    run.run(10)
    bank.append(torch.ones(1, WIDTH), torch.ones(1, VALUE_WIDTH), tags=9, ttl=8)
    book = book_of(bank)
    bank.close()
    shutil.copytree(path, path.with_name("copy"))
    going_on = opened(path.with_name("copy"))
    losses = run.over(going_on).run(request.param)
    hit = going_on.read(torch.ones(2, WIDTH), 6)
    return path, run, book, losses, (hit, book_of(going_on))


@pytest.mark.parametrize("num_shards", [1, 3, 4, 7])
def test_saved_from_four_it_goes_on_as_any_number_of_shards(trained, tmp_path, num_shards):
    path, run, book, losses, (hit, later) = trained
    before = files_of(path)
    reshard(path, tmp_path / "new", num_shards)
    assert files_of(path) == before
    bank = opened(tmp_path / "new")
    assert bank.placement.num_shards == num_shards
    same_book(book_of(bank), book)
    assert run.over(bank).run(len(losses)) == losses
    again = bank.read(torch.ones(2, WIDTH), 6)
    for ours, theirs in zip(again, hit, strict=True):
        assert torch.equal(ours, theirs)
    same_book(book_of(bank), later)
    bank.save()
    bank.close()
    reshard(tmp_path / "new", tmp_path / "back", 4)  # and from there to anywhere
    same_book(book_of(opened(tmp_path / "back")), later)


@pytest.mark.parametrize("kind", [RowAdagrad, RowSGD])
def test_state_of_other_optimisers_goes_too(tmp_path, kind):
    def momentum(parameters, lr):
        return RowSGD(parameters, lr=lr, momentum=0.9)

    bank = new_bank(tmp_path / "bank", 3)
    run = Training(bank, kind=momentum if kind is RowSGD else kind)
    run.run(6)
    bank.close()
    reshard(tmp_path / "bank", tmp_path / "new", 5)
    losses = [run.over(opened(tmp_path / name)).run(10) for name in ("bank", "new")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("durable", [False, True])
def test_from_one_bank_to_shards_and_back(tmp_path, durable):
    given = {"path": tmp_path / "bank"} if durable else {}
    bank = MemoryBank(ROWS, WIDTH, VALUE_WIDTH, **given)
    fill(bank)
    bank.read(torch.ones(3, WIDTH), 4)
    if durable:
        bank.save()
        bank.append(torch.ones(1, WIDTH), torch.ones(1, VALUE_WIDTH))
        bank.close()
    else:
        bank.save(tmp_path / "bank")
    before = files_of(tmp_path / "bank")
    reshard(tmp_path / "bank", tmp_path / "shards", 3)
    assert files_of(tmp_path / "bank") == before
    sharded = opened(tmp_path / "shards")
    one = MemoryBank.load(tmp_path / "bank")
    # A bank's folder does not say when a row was written.
    same_book(book_of(sharded), book_of(one), without=("written",))
    losses = [Training(b).run(10) for b in (one, sharded)]
    assert losses[0] == losses[1]
    book = book_of(sharded)
    sharded.close()
    reshard(tmp_path / "shards", tmp_path / "again", None)
    again = MemoryBank.load(tmp_path / "again")
    same_book(book_of(again), book, without=("written",))
    assert again.book.now == book_clock(tmp_path / "shards")
    assert (again.width, again.value_width, again.metric) == (
        one.width,
        one.value_width,
        one.metric,
    )


def book_clock(path):
    bank = opened(path)
    bank.close()
    return bank.clock


@pytest.mark.parametrize(
    "options",
    [
        {"initial": "normal", "seed": 3},
        {"index": "IVF4,Flat", "exact_below": 64, "min_recall": None, "metric": "l2"},
        {"dtype": torch.bfloat16},
    ],
)
def test_banks_of_other_kinds(tmp_path, options):
    ShardedBank.create(tmp_path / "bank", 200, WIDTH, num_shards=4, **options)
    bank = opened(tmp_path / "bank")
    bank.write(torch.arange(0, 120, 3), torch.randn(40, WIDTH).to(bank.keys.dtype))
    book = book_of(bank)
    arguments = dict(bank._manifest.arguments)
    bank.close()
    for number, shards in enumerate((3, None, 2)):
        reshard(tmp_path / "bank", tmp_path / f"new-{number}", shards)
    for number in (0, 2):
        new = opened(tmp_path / f"new-{number}")
        same_book(book_of(new), book)
        assert new._manifest.arguments == arguments
        new.save()
        new.restore()
        same_book(book_of(new), book)
    one = MemoryBank.load(tmp_path / "new-1")
    same_book(book_of(one), book, without=("written",))


def test_a_bank_that_somebody_has_open_is_refused(tmp_path):
    bank = new_bank(tmp_path / "bank", 2)
    with pytest.raises(BankError, match="shard-00000 is in use"):
        reshard(tmp_path / "bank", tmp_path / "new", 3)
    assert not (tmp_path / "new").exists()
    bank.close()


@pytest.mark.parametrize(
    ("new", "shards", "message"),
    [
        ("bank", 3, "holds a bank already"),
        ("new", 51, "num_shards is 51, expected at most num_rows = 50"),
        ("new", 0, "num_shards is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, new, shards, message):
    new_bank(tmp_path / "bank", 2).close()
    with pytest.raises((BankError, ValueError), match=message):
        reshard(tmp_path / "bank", tmp_path / new, shards)
    assert sorted(os.listdir(tmp_path)) == ["bank"]


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(BankError, match=r"is no bank: there is no manifest.json in it"):
        reshard(tmp_path, tmp_path / "new", 3)


class Killed(BaseException):
    """The process ends here."""


class Kill:
    """Ends the process, as it were, before the n-th call that changes the disk, and all after."""

    def __init__(self, monkeypatch, number):
        self.left = number
        for module, name in ((os, "fsync"), (os, "replace"), (os, "write"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self.guarded(getattr(module, name)))

    def guarded(self, real):
        def guarded(*arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return real(*arguments, **options)

        return guarded


def test_stopped_anywhere_there_is_no_new_folder_and_the_old_one_is_whole(tmp_path, monkeypatch):
    bank, new = new_bank(tmp_path / "bank", 2), tmp_path / "new"
    book = book_of(bank)
    bank.close()
    before = files_of(tmp_path / "bank")
    for number in range(1000):
        with monkeypatch.context() as patch:
            Kill(patch, number)
            try:
                reshard(tmp_path / "bank", new, 2)
            except Killed:
                assert files_of(tmp_path / "bank") == before
            else:
                break
        if new.exists():  # whole: only its name was still to be waited for
            same_book(book_of(opened(new)), book)
            shutil.rmtree(new)
    assert number > 20
    same_book(book_of(opened(new)), book)


def test_command_line(tmp_path):
    new_bank(tmp_path / "bank", 2).close()
    run = CliRunner().invoke
    paths = [str(tmp_path / "bank"), str(tmp_path / "new")]
    result = run(app, ["bank", "reshard", *paths, "--shards", "7"])
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'new'}: 7 shards\n")
    assert home_module.read_manifest(tmp_path / "new").num_shards == 7
    result = run(app, ["bank", "reshard", *map(str, (tmp_path / "new", tmp_path / "one"))])
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'one'}: not sharded\n")
    assert MemoryBank.load(tmp_path / "one").table.num_live == 44
    result = run(app, ["bank", "reshard", *map(str, (tmp_path / "none", tmp_path / "other"))])
    assert result.exit_code == 2
    assert "is no bank: there is no manifest.json in it" in result.output
