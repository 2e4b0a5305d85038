import json
import math
import os
import re
import shutil
import signal

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.training.banks import bank_arguments, make_bank
from sparsemem.training.bptt import train_batch
from sparsemem.training.checkpoint import list_checkpoints
from sparsemem.training.config import make_config, override
from sparsemem.training.errors import CheckpointError, ConfigError, DamagedError, RunError
from sparsemem.training.launch import evaluate_run, load_run, prepare_blank, resume, start
from sparsemem.training.optimisers import make_optimisers
from sparsemem.training.setup import describe, prepare
from sparsemem.training.trainer import Outcome, Trainer
from tests.training.runs import assert_same, contents, train

pytestmark = pytest.mark.usefixtures("plain_errors")

BANK = {"num_rows": 64, "width": 6, "value_width": 5, "optimizer": {"learning_rate": 0.02}}
MODELS = {
    "memory-lstm": {"name": "memory-lstm", "hidden_size": 8, "num_heads": 2, "top_k": 3},
    "sam": {"name": "sam", "hidden_size": 8, "num_heads": 2, "top_k": 3},
    "sdnc": {"name": "sdnc", "hidden_size": 8, "num_heads": 1, "top_k": 2},
}


@pytest.fixture
def bank_tree(tree):
    """A config of a memory LSTM over a small bank, on a few facts."""
    tree["model"] = dict(MODELS["memory-lstm"])
    facts = {"num_facts": 32, "key_bits": 6, "value_bits": 4, "queries": 4}
    tree["task"] = {"name": "facts", **facts}
    tree["bank"] = dict(BANK)
    return tree


def of_model(tree, name):
    """The config with another model, whose bank has no values of their own."""
    tree["model"] = dict(MODELS[name])
    if name != "memory-lstm":
        tree["bank"] = {key: value for key, value in BANK.items() if key != "value_width"}
    return tree


def rows(trainer):
    bank = trainer.setup.bank
    return [table.detach().clone() for table in bank.tables]


@pytest.mark.parametrize(("step", "where"), [(2, "at step 3"), (3, "in validation at step 3")])
def test_a_diverged_model_is_told_from_a_wrong_call(bank_tree, new_run, stop_at, step, where):
    """Its queries are refused by the bank."""
    bank_tree["training"] |= {"evaluate_every": 3}
    trainer, run = new_run("run", bank_tree)

    def poison():
        with torch.no_grad():
            trainer.model.cell.memory.query.weight.fill_(math.nan)

    message = rf"^queries\[0, 0, 0, 0\] is nan, expected finite values {where}.*; a new run with"
    with pytest.raises(RunError, match=message):
        train(trainer, run, stop_at(step, poison))


def test_the_bank_is_what_the_section_says(bank_tree):
    config = make_config(bank_tree)
    made, expected = make_bank(config), MemoryBank(64, 6, 5, initial="normal")
    assert torch.equal(made.keys, expected.keys)
    assert torch.equal(made.values, expected.values)
    bank_tree["bank"] |= {"dtype": "bfloat16", "seed": 3, "metric": "ip", "min_recall": 0.5}
    arguments = bank_arguments(make_config(bank_tree))
    wanted = {"num_rows": 64, "width": 6, "value_width": 5, "index": "exact", "metric": "ip"}
    wanted |= {"min_recall": 0.5, "dtype": torch.bfloat16, "initial": "normal", "seed": 3}
    assert arguments == wanted
    bank_tree["bank"] |= {"index": "IVF4,Flat", "background": False, "exact_below": 10}
    assert bank_arguments(make_config(bank_tree)) == wanted | {
        "index": "IVF4,Flat",
        "background": False,
        "exact_below": 10,
    }


def test_defaults_are_written_out_and_resolving_again_changes_nothing(bank_tree):
    bank_tree["training"] |= {"dtype": "float64", "seed": 7}
    config = prepare(make_config(bank_tree)).config
    assert config.bank.dtype == "float64"
    assert config.bank.seed == 7
    assert config.model.options["temperature"] == 0.1
    assert prepare(config).config == config
    sam = prepare(make_config(of_model(bank_tree, "sam"))).config
    assert (sam.model.options["num_slots"], sam.model.options["slot_dim"]) == (64, 6)
    assert prepare(sam).config == sam


def test_the_bank_keeps_its_dtype_and_the_model_gets_its_own(bank_tree):
    bank_tree["training"]["dtype"] = "float64"
    bank_tree["bank"]["dtype"] = "bfloat16"
    setup = prepare(make_config(bank_tree))
    assert setup.bank.keys.dtype == torch.bfloat16
    assert setup.model.output.weight.dtype == torch.float64
    output, _ = setup.model(setup.task.batch(0).input)
    assert output.dtype == torch.float64


def test_a_bank_can_be_given(bank_tree):
    config = make_config(bank_tree)
    bank = make_bank(config)
    assert prepare(config, bank).bank is bank
    assert prepare(config, bank).model.cell.memory.bank is bank


def test_description(bank_tree):
    setup = prepare(make_config(bank_tree))
    first = describe(setup.config, setup.model).splitlines()[0]
    own = sum(p.numel() for p in setup.model.parameters()) - 64 * 11
    shown = f"model MemoryLSTM, {own:,} parameters, a bank of 64 rows of width 6 and values of 5"
    assert first == f"{shown}, index exact, adam; task facts"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["bank=null"], "^bank is missing: model 'memory-lstm' reads one, expected a section bank"),
        (["model={name: lstm, hidden_size: 5}"], "^bank is given, but model 'lstm' reads none: .*"),
        (["bank.num_row=3"], "^unknown key bank.num_row: did you mean 'num_rows'"),
        (["bank.num_rows=null"], "^bank.num_rows is None, expected a valid integer"),
        (["bank.width=0"], "^bank.width is 0, expected greater than or equal to 1"),
        (["bank.metric=cosin"], "^bank.metric is 'cosin', did you mean 'cosine'"),
        (["bank.index=IFV4"], "^bank: index 'IFV4'|^bank.index is 'IFV4'|^bank: .*IFV4"),
        (["bank.background=true"], "^bank: unknown option 'background' of index 'exact'"),
        (["bank.initial=empty"], "^bank.initial is 'empty', expected 'normal'"),
        (["bank.initial=ones"], "^bank.initial is 'ones', expected 'normal' or 'empty'"),
        (["bank.dtype=int8"], "^bank.dtype is 'int8', expected 'float32'"),
        (["bank.optimizer.name=adma"], "^bank.optimizer.name is 'adma', .*did you mean 'adam'"),
        (["bank.optimizer.betas=[1, 2]"], r"^bank.optimizer: betas\[0\] is 1"),
        (["bank.optimizer.beta=1"], "^unknown key bank.optimizer.beta for 'adam'"),
        (["bank.optimizer.eps=true"], "^bank.optimizer.eps is True, expected a number"),
        (["bank.optimizer.rounding_seed=-1"], "^bank.optimizer: rounding_seed is -1"),
        (["bank.optimizer.learning_rate=0"], "^bank.optimizer.learning_rate is 0, expected great"),
        (["model.top_k=65"], "^model.top_k is 65, expected at most bank.num_rows = 64"),
        (["bank.index=product-key", "bank.num_rows=63"], "^bank.num_rows is 63|^bank: .*63"),
        (
            ["model={name: sam, hidden_size: 5}"],
            "^model: memory has value_width 5, expected None|^model.*value_width",
        ),
        (
            ["model={name: sam, hidden_size: 5, slot_dim: 3}", "bank.value_width=null"],
            "^model.slot_dim is 3, expected memory's width = 6",
        ),
        (
            ["model={name: sam, hidden_size: 5}", "bank.value_width=null", "bank.dtype=float64"],
            "^bank.dtype is 'float64', expected one that is computed in training.dtype = float32",
        ),
    ],
)
def test_errors_name_what_is_wrong(bank_tree, settings, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(prepare(make_config(override(bank_tree, settings))))


def test_broken_sub_keys_are_not_saved(bank_tree, new_run, stop_at):
    bank_tree["training"] |= {"evaluate_every": None, "checkpoint_every": 3}
    bank_tree["bank"] |= CHANGES["product keys"]
    trainer, run = new_run("run", bank_tree)

    def poison():
        with torch.no_grad():
            trainer.setup.bank.keys[0, 1, 2] = math.inf

    message = r"^parameter cell.memory.bank.keys is not finite after step 6; the last checkpoint is"
    with pytest.raises(RunError, match=message):
        train(trainer, run, stop_at(6, poison))
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [3]


def test_both_optimisers_step_and_follow_the_schedule(bank_tree):
    bank_tree["training"] |= {"schedule": {"name": "linear", "warmup": 2}, "steps": 4}
    trainer = Trainer(prepare(make_config(bank_tree)))
    dense, of_rows = trainer.optimisers.each
    seen = []
    for _ in range(4):
        seen.append((dense.param_groups[0]["lr"] / 0.01, of_rows.param_groups[0]["lr"] / 0.02))
        trainer._train_batch(32)
    assert seen == [pytest.approx((f, f)) for f in (0.5, 1.0, 1.0, 0.0)]
    tables = set(trainer.setup.bank.parameters())
    assert set(of_rows.param_groups[0]["params"]) == tables
    assert not tables & set(dense.param_groups[0]["params"])
    assert len(dense.param_groups[0]["params"]) == len(list(trainer.model.parameters())) - 2


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_one_clip_over_rows_and_the_rest(bank_tree, clip):
    bank_tree["training"] |= {"optimizer": {"name": "sgd", "learning_rate": 1.0}}
    bank_tree["bank"]["optimizer"] = {"name": "sgd", "learning_rate": 1.0}
    setup = prepare(make_config(bank_tree))
    before = [p.detach().clone() for p in setup.model.parameters()]
    optimisers, batch = make_optimisers(setup.config, setup.model), setup.task.batch(0)
    norm = train_batch(setup.model, setup.task, optimisers, batch, clip=clip).gradient_norm
    after = list(setup.model.parameters())
    moved = sum((x - y).square().sum() for x, y in zip(before, after, strict=True)).sqrt().item()
    assert moved == pytest.approx(norm if clip is None else clip, rel=1e-4)
    assert norm > 1e-3


CHANGES = {
    "adam": {},
    "sgd": {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.5}},
    "adagrad": {"optimizer": {"name": "adagrad", "learning_rate": 0.1}},
    "rounded": {"dtype": "bfloat16", "optimizer": {"name": "adamw", "rounding_seed": 3}},
    "product keys": {"index": "product-key", "metric": "ip"},
}


@pytest.mark.parametrize(
    ("model", "change"), [*(("memory-lstm", change) for change in CHANGES), ("sam", "adam")]
)
def test_resume_is_bit_for_bit(bank_tree, new_run, stop_at, model, change):
    tree = of_model(bank_tree, model)
    tree["bank"] |= CHANGES[change]
    tree["training"] |= {"schedule": {"name": "cosine", "warmup": 3}, "truncate": 3}
    tree["curriculum"] = {"name": "exponential", "initial": 4, "threshold": 5.0, "window": 6}
    trainer, whole = new_run("whole", tree)
    first = rows(trainer)
    assert train(trainer, whole) is Outcome.FINISHED
    assert not all(torch.equal(*pair) for pair in zip(first, rows(trainer), strict=True))

    cut, parts = new_run("parts", tree)
    for steps in (7, 6):
        stop = stop_at(steps, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train(cut, parts, stop) is Outcome.INTERRUPTED
        torch.manual_seed(123)
        cut = Trainer(prepare_blank(parts.config()))
        cut.restore(parts.newest_checkpoint())
    parts.cut_metrics(13)
    assert train(cut, parts) is Outcome.FINISHED
    assert_same(contents(parts), contents(whole))
    assert all(torch.equal(*pair) for pair in zip(rows(cut), rows(trainer), strict=True))
    state, expected = cut.setup.bank.state_dict(), trainer.setup.bank.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_checkpoint_has_a_snapshot_beside_its_tensors(bank_tree, new_run):
    trainer, run = new_run("run", bank_tree)
    train(trainer, run)
    tensors, manifest, _ = contents(run)
    assert not [name for name in tensors if "bank" in name]
    assert {name for name in tensors if name.startswith("rows.")} >= {"rows.0.exp_avg"}
    assert json.loads(manifest)["bank"]["optimizer"]["name"] == "adam"
    saved = MemoryBank.load(run.newest_checkpoint() / "bank")
    assert torch.equal(saved.keys, trainer.setup.bank.keys)
    assert torch.equal(saved.values, trainer.setup.bank.values)


def test_resume_evaluate_and_load(bank_tree, tmp_path):
    config = make_config(bank_tree)
    run, outcome = start(config, tmp_path / "run", lambda line: None)
    assert outcome is Outcome.FINISHED
    setup, step = load_run(run, run.config(), "last")
    assert step == 20
    saved = MemoryBank.load(run.newest_checkpoint() / "bank")
    assert torch.equal(setup.bank.keys, saved.keys)
    result, _ = evaluate_run(run, run.config(), "best", "validation")
    best = [r for r in run.metrics() if r["kind"] == "validation"]
    assert result.metric == min(record["metric"] for record in best)
    longer = run.config(["training.steps=25"])
    assert resume(run, longer, lambda line: None) is Outcome.FINISHED
    assert run.metrics()[-1]["step"] == 25
    with pytest.raises(ConfigError, match=r"^bank.optimizer.learning_rate is 1.0, expected 0.02"):
        resume(run, run.config(["bank.optimizer.learning_rate=1.0"]))


def test_a_bank_that_is_damaged_missing_or_another_is_refused(bank_tree, tmp_path):
    run, _ = start(make_config(bank_tree), tmp_path / "run", lambda line: None)
    newest = run.newest_checkpoint()
    message = "bank is of another bank: it has .*64, 6.*expected .*65, 6"
    with pytest.raises(CheckpointError, match=message):
        load_run(run, run.config(["bank.num_rows=65"]), "last")
    file = next((newest / "bank").glob("rows-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=re.escape(f"remove {newest} to go on from")):
        resume(run, run.config())
    shutil.rmtree(newest / "bank")
    with pytest.raises(CheckpointError, match="holds no snapshot of a bank"):
        load_run(run, run.config(), "last")


def test_a_checkpoint_of_a_run_without_a_bank_is_refused_and_the_other_way_round(
    bank_tree, new_run
):
    with_one, banked = new_run("banked", of_model(bank_tree, "sam"))
    train(with_one, banked)
    sizes = {"num_slots": 64, "slot_dim": 6}
    tree = {key: value for key, value in bank_tree.items() if key != "bank"}
    without, plain = new_run("plain", tree | {"model": tree["model"] | sizes})
    train(without, plain)
    with pytest.raises(CheckpointError, match="is of a run with a bank, expected one without"):
        without.restore(banked.newest_checkpoint())
    with pytest.raises(CheckpointError, match="holds no snapshot of a bank"):
        with_one.restore(plain.newest_checkpoint())


def test_a_full_disk_while_the_bank_is_written_leaves_no_half_checkpoint(
    bank_tree, new_run, monkeypatch
):
    trainer, run = new_run("run", bank_tree)

    def full(path):
        path.mkdir()
        (path / "rows").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.setup.bank, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(trainer, run)
    assert not list(run.checkpoints.iterdir())


def test_a_profile_has_the_search_and_the_rows(bank_tree, new_run):
    bank_tree["training"] |= {"steps": 34, "evaluate_every": None}
    trainer, run = new_run("run", bank_tree)
    with run.lock():
        trainer.train(run, profiled=True)
    seconds = json.loads((run.profile / "profile.json").read_text())["seconds_a_step"]
    assert {"controller", "search", "autograd", "optimiser"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())


def test_a_bank_remembers_facts(bank_tree, tmp_path):
    """64 facts of 8 bits, of which chance gets 4 wrong a query, 16 a sequence of 4."""
    bank_tree["task"] |= {"num_facts": 64, "key_bits": 8, "value_bits": 8, "min_level": 64}
    bank_tree["model"] |= {"hidden_size": 32, "num_heads": 2, "top_k": 4}
    bank_tree["bank"] |= {"num_rows": 512, "width": 8, "value_width": 32}
    bank_tree["training"] |= {"steps": 400, "batch_size": 16, "stop_below": 0.5}
    bank_tree["training"] |= {"evaluate_every": 100, "checkpoint_every": 400, "log_every": 100}
    _, outcome = start(make_config(bank_tree), tmp_path / "run", lambda line: None)
    assert outcome is Outcome.REACHED
