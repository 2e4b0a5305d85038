import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.keeper import Versions, go_back
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.transport import LocalShards
from sparsemem.distributed.versions import read_version
from sparsemem.optim.remote import remote_bank_of
from sparsemem.tasks import CopyTask
from sparsemem.training.banks import NoBank, bank_arguments, dense_parameters
from sparsemem.training.checkpoint import list_checkpoints
from sparsemem.training.config import make_config
from sparsemem.training.errors import ConfigError
from sparsemem.training.progress import Silent
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.signals import Stop
from sparsemem.training.team import ALONE, check_shares, share_of
from sparsemem.training.trainer import Outcome, Trainer


def test_shares_are_contiguous_and_make_up_the_batch():
    batch = CopyTask(batch_size=6).batch(0, 2)
    shares = [share_of(batch, rank, 3) for rank in range(3)]
    assert [len(share.input) for share in shares] == [2, 2, 2]
    assert torch.equal(shares[1].target, batch.target[2:4])
    for whole, *parts in zip(batch, *shares, strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_alone():
    batch = CopyTask(batch_size=5).batch(0, 1)
    assert ALONE.share(batch) is batch
    assert ALONE.means([1.5, 2.0]) == ALONE.told((1.5, 2.0)) == [1.5, 2.0]
    assert ALONE.asked(True) is True
    assert ALONE.asked(False) is False


def test_uneven_shares_are_refused():
    check_shares(8, 4)
    message = "training.batch_size is 10, expected a multiple of the number of workers = 4"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_shares(10, 4)
    with pytest.raises(ValueError, match="batch has 5 sequences, expected a multiple of 2"):
        share_of(CopyTask(batch_size=5).batch(0, 1), 0, 2)


class Table:
    """Where the threads of a team meet."""

    def __init__(self, size):
        self.values, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def exchanged(self, rank, value):
        """What each member has brought."""
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Threads:
    """A member of a team of threads, over one table."""

    def __init__(self, rank, table):
        self.rank, self.size, self.table = rank, len(table.values), table
        self.stop = self.stopped = False

    def share(self, batch):
        return share_of(batch, self.rank, self.size)

    def means(self, values):
        found = self.table.exchanged(self.rank, [*values, float(self.stop)])
        *means, asked = (sum(parts) / self.size for parts in zip(*found, strict=True))
        self.stopped = asked > 0
        return means

    def told(self, values):
        return self.table.exchanged(self.rank, list(values))[0]

    def asked(self, stop):
        self.stop = stop
        return self.stopped

    def wrapped(self, model):
        for parameter in model.parameters():
            if remote_bank_of(parameter) is not None:
                continue
            parameter.register_hook(
                lambda gradient: sum(self.table.exchanged(self.rank, gradient)) / self.size
            )
        return model


TREE = {
    "model": {"name": "memory-lstm", "hidden_size": 8, "num_heads": 2, "top_k": 3},
    "task": {"name": "facts", "num_facts": 32, "key_bits": 6, "value_bits": 4, "queries": 6},
    "bank": {"num_rows": 64, "width": 6, "value_width": 5, "optimizer": {"learning_rate": 0.02}},
    "curriculum": {"name": "exponential", "initial": 4, "threshold": 0.7, "window": 2},
    "training": {
        "steps": 10,
        "batch_size": 6,
        "log_every": 1,
        "evaluate_every": 4,
        "checkpoint_every": 5,
        "truncate": 4,
        "gradient_clip": 0.1,
        "dtype": "float64",
    },
    "evaluation": {"batches": 2, "batch_size": 4},
}


INDICES = {"exact": {}, "product-key": {"index": "product-key", "metric": "ip"}}


def with_index(index):
    return make_config(TREE | {"bank": TREE["bank"] | INDICES[index]})


def team_of(size, path, config):
    """Trainers of a team over two shards, and the run folder that they share."""
    folder = ShardedBank.create(path / "bank", **bank_arguments(config), num_shards=2)
    whole = open_bank(folder, LocalShards(folder))
    run = RunFolder.create(path / "run", prepare(config, whole).config)
    return team_over(whole, size, run, config), run, whole


def team_over(whole, size, run, config):
    """Trainers of a team over a bank."""
    table, trainers = Table(size), []
    for rank in range(size):
        bank = whole.as_worker(rank, of=size)
        team = Threads(rank, table)
        trainers.append(Trainer(prepare(config, bank), team, Versions(bank, run)))
    return trainers


def gone_on(trainers, run, size, config):
    """Another team, that goes on from the newest checkpoint of a run."""
    path, shards = trainers[0].keeper.bank.path, trainers[0].keeper.bank.shards
    newest = go_back(run, open_bank(path, shards.another()))
    others = team_over(open_bank(path, shards.another()), size, run, config)
    with ThreadPoolExecutor(size) as pool:
        for restored in [pool.submit(trainer.restore, newest) for trainer in others]:
            restored.result()
    return others


def train_together(trainers, run, stops):
    with ThreadPoolExecutor(len(trainers)) as pool:
        tasks = [
            pool.submit(trainer.train, run, Silent(), stop=stop)
            for trainer, stop in zip(trainers, stops, strict=True)
        ]
        return [task.result() for task in tasks]


def figures(run):
    return [
        {key: value for key, value in record.items() if key not in ("kind", "seconds")}
        for record in run.metrics()
    ]


@pytest.fixture(params=INDICES)
def single(request, tmp_path, plain_errors):
    """One trainer with a bank of its own, which has trained; its run, and how rows are found."""
    alone = Trainer(prepare(with_index(request.param)))
    run = RunFolder.create(tmp_path / "single", alone.config)
    alone.train(run, Silent())
    return alone, run, request.param


@pytest.mark.parametrize("size", [2, 3])
def test_members_see_and_learn_what_one_trainer_does(tmp_path, single, size):
    config = with_index(single[2])
    trainers, run, _ = team_of(size, tmp_path / "team", config)
    outcomes = train_together(trainers, run, [Stop() for _ in trainers])
    assert outcomes == [Outcome.FINISHED] * size
    check_same(trainers, run, *single[:2])


def check_same(trainers, run, alone, single):
    """Members and their run are as one trainer and its run."""
    ours, expected = figures(run), figures(single)
    assert len(ours) == len(expected) == 12
    for record, other in zip(ours, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-6)  # ratios are float32
    assert alone.curriculum.hardest > 4
    for trainer in trainers:
        assert trainer.curriculum.hardest == alone.curriculum.hardest
        assert trainer.validation == pytest.approx(alone.validation)
        pairs = (dense_parameters(trainer.model), dense_parameters(alone.model))
        for own, other in zip(*pairs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    first = trainers[0].setup.bank
    saved = read_version(first.path)  # with sub-keys
    for own, other in zip(saved.parameters(), alone.setup.bank.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    if first.has_product_keys:
        for trainer in trainers:
            assert torch.equal(trainer.setup.bank.keys, saved.keys)


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1)])
def test_another_number_of_members_goes_on(tmp_path, single, sizes):
    config = with_index(single[2])
    config.training.steps = 7
    trainers, run, _ = team_of(sizes[0], tmp_path / "team", config)
    train_together(trainers, run, [Stop() for _ in trainers])
    config.training.steps = 10
    others = gone_on(trainers, run, sizes[1], config)
    train_together(others, run, [Stop() for _ in others])
    check_same(others, run, *single[:2])


def test_one_member_that_is_asked_stops_all_at_the_same_step(tmp_path, plain_errors):
    trainers, run, _ = team_of(2, tmp_path, make_config(TREE))
    stops = [Stop(), Stop()]
    step = trainers[1]._one_step

    def stopping(*arguments):
        step(*arguments)
        if trainers[1].step == 3:
            stops[1].number = 15

    trainers[1]._one_step = stopping
    assert train_together(trainers, run, stops) == [Outcome.INTERRUPTED] * 2
    assert [trainer.step for trainer in trainers] == [4, 4]
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [4]


def test_a_team_needs_even_shares_and_a_keeper(tmp_path, plain_errors):
    config = make_config(TREE)
    setup = prepare(config)
    with pytest.raises(ConfigError, match=r"^training.batch_size is 6, expected a multiple of"):
        Trainer(setup._replace(bank=None), Threads(0, Table(4)), NoBank())
    with pytest.raises(ValueError, match="team has 2 members, which each have a bank of their own"):
        Trainer(setup, Threads(0, Table(2)))
