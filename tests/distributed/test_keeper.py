"""Checkpoints of runs over shards, in one process: shards, trainer and driver are all here."""

import shutil

import pytest
import torch

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.keeper import BANK, STATS, LoadedVersion, Versions, go_back, version_of
from sparsemem.distributed.transport import LocalShards
from sparsemem.distributed.trying import create_bank
from sparsemem.training.banks import keeper_of
from sparsemem.training.checkpoint import CheckpointError, list_checkpoints
from sparsemem.training.errors import RunError
from sparsemem.training.launch import load_run
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer
from tests.oracles.sharded_runs import SHARDS, alone, config_of, largest_difference, metrics


def new_run(path, config):
    run = RunFolder.create(path, config)
    create_bank(run.path / BANK, config, SHARDS)
    return run


def shards_of(run):
    return LocalShards(run.path / BANK)


def trained(run, config, shards, restored=None):
    """Train on from a checkpoint, as `worker.train` does."""
    bank = ShardedBank(run.path / BANK, shards.another())
    trainer = Trainer(prepare(config, bank), keeper=Versions(bank, run))
    if restored is not None:
        trainer.restore(restored)
    with run.lock():
        trainer.train(run)
    return trainer


def restarted(run, shards):
    return go_back(run, ShardedBank(run.path / BANK, shards.another()))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return metrics(alone(tmp_path_factory.mktemp("alone") / "run", config_of()))


def test_a_run_is_that_of_a_bank_in_memory(tmp_path, expected):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    assert restarted(run, shards) is None
    trainer = trained(run, config_of(), shards)
    shards.close()
    assert largest_difference(metrics(run), expected) < 1e-12
    kept = {version_of(path) for _, path in list_checkpoints(run.checkpoints)}
    assert kept <= set(trainer.keeper.bank.versions)
    assert (run.path / STATS).is_file()


def test_a_run_goes_on_from_its_checkpoint_to_the_same_numbers(tmp_path):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    trained(run, config_of(steps=8), shards)
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    trained(run, config_of(), shards, run.newest_checkpoint())
    shards.close()

    other = RunFolder(copy)
    shutil.rmtree(other.newest_checkpoint())  # that of step 8
    shards = shards_of(other)
    newest = restarted(other, shards)
    assert newest.name == "step-00000005"
    assert max(record["step"] for record in other.metrics()) == 5
    trained(other, config_of(), shards, newest)
    shards.close()
    assert metrics(other) == metrics(run)


def test_a_checkpoint_whose_save_was_cut_short_is_removed(tmp_path):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    trainer = trained(run, config_of(steps=5), shards)

    def cut_short(**changed):
        raise KeyboardInterrupt

    trainer.keeper.bank._put_in_force = lambda *_, **__: cut_short()
    trainer.step = 6
    with pytest.raises(KeyboardInterrupt):
        trainer.keeper.save(lambda kept, fill=None: trainer._write(run, kept, fill))
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [5, 6]
    newest = restarted(run, shards)
    assert newest.name == "step-00000005"
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [5]
    shards.close()


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, expected):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    bank = ShardedBank(run.path / BANK, shards.another())
    trainer = Trainer(prepare(config_of(), bank), keeper=Versions(bank, run))
    for _ in range(3):  # a team that was lost before it had saved
        trainer._train_batch(1)
        trainer.step += 1
    assert restarted(run, shards) is None
    trained(run, config_of(), shards)
    shards.close()
    assert largest_difference(metrics(run), expected) < 1e-12


def test_rows_without_their_checkpoint_are_refused(tmp_path):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    trained(run, config_of(steps=5), shards)
    shutil.rmtree(run.newest_checkpoint())
    with pytest.raises(RunError, match=r"has no checkpoint that goes with the bank .* version 1"):
        restarted(run, shards)
    shards.close()


def test_a_trainer_refuses_a_checkpoint_of_another_version(tmp_path):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    trainer = trained(run, config_of(steps=10), shards)
    older = list_checkpoints(run.checkpoints)[0][1]
    with pytest.raises(CheckpointError, match="goes with version 1 of the bank, expected 2"):
        trainer.restore(older)
    shards.close()


def test_versions_are_loaded_into_memory(tmp_path):
    run = new_run(tmp_path / "run", config_of())
    shards = shards_of(run)
    trained(run, config_of(steps=10), shards)
    shards.close()
    path = run.path / BANK
    for which, version in (("last", 2), ("best", version_of(run.best_checkpoint()))):
        setup, step = load_run(run, run.config(), which, lambda bank: LoadedVersion(bank, path))
        assert step == 5 * version
        shards = shards_of(run)
        sharded = ShardedBank(path, shards.another())
        sharded.restore(version)
        ids = torch.arange(sharded.num_rows)
        assert torch.equal(setup.bank.gather(ids), sharded.gather(ids))
        shards.close()


def test_a_loaded_version_is_not_trained_on(tmp_path):
    setup = prepare(config_of())
    with pytest.raises(RunError, match="expected --shards, to train them"):
        LoadedVersion(setup.bank, tmp_path / BANK).save(lambda kept, fill=None: tmp_path)


def test_checkpoints_of_other_runs_have_no_version(tmp_path):
    run = alone(tmp_path / "run", config_of(steps=5))
    assert version_of(run.newest_checkpoint()) is None
    setup = prepare(config_of())
    with pytest.raises(CheckpointError, match="its rows"):
        load_run(run, run.config(), "last", lambda bank: LoadedVersion(bank, tmp_path / BANK))
    load_run(run, run.config(), "last", keeper_of)
    assert setup.bank is not None
