"""Checkpoints of runs over shards, in one process: shards, trainer and driver are all here."""

import shutil

import pytest
import torch

from sparsemem.distributed.commands import keeper_for
from sparsemem.distributed.home import read_manifest
from sparsemem.distributed.keeper import BANK, STATS, LoadedVersion, Versions, go_back, version_of
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.transport import LocalShards
from sparsemem.distributed.trying import create_bank
from sparsemem.training.banks import keeper_of
from sparsemem.training.checkpoint import CheckpointError, list_checkpoints
from sparsemem.training.errors import RunError
from sparsemem.training.launch import evaluate_run, load_run
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer
from tests.oracles.sharded_runs import (
    BANKS,
    SHARDS,
    alone,
    config_of,
    metrics,
    rows,
)


def new_run(path, config):
    run = RunFolder.create(path, config)
    create_bank(run.path / BANK, config, SHARDS)
    return run


def shards_of(run):
    return LocalShards(run.path / BANK)


def trained(run, config, shards, restored=None):
    """Train on from a checkpoint, as `worker.train` does."""
    bank = open_bank(run.path / BANK, shards.another())
    trainer = Trainer(prepare(config, bank), keeper=Versions(bank, run))
    if restored is not None:
        trainer.restore(restored)
    with run.lock():
        trainer.train(run)
    return trainer


def restarted(run, shards):
    return go_back(run, open_bank(run.path / BANK, shards.another()))


@pytest.fixture(params=BANKS, scope="module")
def index(request):
    """How rows are found."""
    return request.param


@pytest.fixture(scope="module")
def expected(index, tmp_path_factory):
    """The run of a bank in memory."""
    return alone(tmp_path_factory.mktemp("alone") / "run", config_of(index))


@pytest.fixture(scope="module")
def undisturbed(index, tmp_path_factory):
    """The run over shards that nothing happens to."""
    run = new_run(tmp_path_factory.mktemp("undisturbed") / "run", config_of(index))
    shards = shards_of(run)
    assert restarted(run, shards) is None
    trained(run, config_of(index), shards)
    shards.close()
    return run


def ends(run):
    """Its metrics, and the rows after its last step."""
    return metrics(run), [table.tolist() for table in rows(run, keeper_for=keeper_for(run))]


def test_a_run_is_that_of_a_bank_in_memory(undisturbed, expected):
    assert ends(undisturbed) == ends(expected)
    kept = {version_of(path) for _, path in list_checkpoints(undisturbed.checkpoints)}
    assert kept <= read_manifest(undisturbed.path / BANK).clocks.keys()
    assert (undisturbed.path / STATS).is_file()


def test_a_run_is_evaluated_without_shards(undisturbed, expected):
    for which in ("best", "last"):
        rows_for = keeper_for(undisturbed)
        found = evaluate_run(undisturbed, undisturbed.config(), which, "test", rows_for)
        assert found == evaluate_run(expected, expected.config(), which, "test")


def test_a_run_goes_on_from_its_checkpoint_to_the_same_numbers(tmp_path, index, undisturbed):
    run = new_run(tmp_path / "run", config_of(index))
    shards = shards_of(run)
    trained(run, config_of(index, steps=8), shards)
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    trained(run, config_of(index), shards, run.newest_checkpoint())
    shards.close()

    other = RunFolder(copy)
    shutil.rmtree(other.newest_checkpoint())  # that of step 8
    shards = shards_of(other)
    newest = restarted(other, shards)
    assert newest.name == "step-00000005"
    assert max(record["step"] for record in other.metrics()) == 5
    trained(other, config_of(index), shards, newest)
    shards.close()
    assert ends(run) == ends(other) == ends(undisturbed)


def test_a_checkpoint_whose_save_was_cut_short_is_removed(tmp_path, index):
    run = new_run(tmp_path / "run", config_of(index))
    shards = shards_of(run)
    trainer = trained(run, config_of(index, steps=5), shards)

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


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, index, expected):
    run = new_run(tmp_path / "run", config_of(index))
    shards = shards_of(run)
    bank = open_bank(run.path / BANK, shards.another())
    trainer = Trainer(prepare(config_of(index), bank), keeper=Versions(bank, run))
    for _ in range(3):  # a team that was lost before it had saved
        trainer._train_batch(1)
        trainer.step += 1
    assert restarted(run, shards) is None
    trained(run, config_of(index), shards)
    shards.close()
    assert ends(run) == ends(expected)


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


def test_versions_are_loaded_into_memory(tmp_path, index):
    run = new_run(tmp_path / "run", config_of(index))
    shards = shards_of(run)
    trained(run, config_of(index, steps=10), shards)
    shards.close()
    path = run.path / BANK
    for which, version in (("last", 2), ("best", version_of(run.best_checkpoint()))):
        setup, step = load_run(run, run.config(), which, lambda bank: LoadedVersion(bank, path))
        assert step == 5 * version
        shards = shards_of(run)
        sharded = open_bank(path, shards.another())
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
