import pytest
import torch

from sparsemem.bench.measuring import tensor_peak
from sparsemem.training import calibration, machine
from sparsemem.training.bankplan import bank_bytes
from sparsemem.training.calibration import plan_seconds
from sparsemem.training.config import make_config
from sparsemem.training.errors import ConfigError
from sparsemem.training.plan import check_fits, lines, plan_memory
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer

DENSE = {"hidden_size": 12, "num_slots": 64, "slot_dim": 6, "num_heads": 2}


def planned(tree):
    return plan_memory(make_config(tree)).plan


def model(name):
    if name in ("sam", "sdnc"):
        return {"name": name, **DENSE, "num_slots": 2**20, "top_k": 2}
    return {"name": name, "hidden_size": 12} if name == "lstm" else {"name": name, **DENSE}


@pytest.mark.parametrize("name", ["lstm", "ntm", "dnc", "sam", "sdnc"])
@pytest.mark.parametrize("truncate", [None, 6])
def test_memory_is_within_20_percent_of_what_training_takes(tree, name, truncate):
    tree["model"] = model(name)
    level = 4 if name in ("ntm", "dnc") else 7  # more steps than are tried, at most DENSE_STEPS
    tree["task"]["max_level"], tree["evaluation"]["level"] = level, 1
    tree["training"] |= {"truncate": truncate, "batch_size": 8}
    config = make_config(tree)

    def train():
        trainer = Trainer(prepare(config))
        for _ in range(2):
            trainer._train_batch(level)
            trainer.step += 1

    train()
    assert planned(tree).memory.step == pytest.approx(tensor_peak(train), rel=0.2)


def test_the_sum_is_of_its_parts(tree):
    memory = planned(tree).memory
    parameters = sum(p.nbytes for p in prepare(make_config(tree)).model.parameters())
    assert memory.parameters == memory.gradients == parameters
    assert 2 * parameters <= memory.optimiser < 2.1 * parameters  # Adam
    parts = ("parameters", "gradients", "optimiser", "memory", "activations", "data")
    assert memory.step == sum(getattr(memory, part) for part in parts)
    assert memory.process >= memory.step + memory.libraries


def test_a_checkpoint_takes_the_disk_that_was_predicted(tree, tmp_path, new_run):
    tree["training"]["steps"] = 10
    trainer, run = new_run("run", tree)
    trainer.train(run)
    disk = planned(tree).disk
    found = sum(file.stat().st_size for file in run.newest_checkpoint().iterdir())
    assert disk.checkpoint == pytest.approx(found, rel=0.2)
    assert disk.total >= sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert isinstance(run, RunFolder)


def test_nothing_goes_over_a_network_on_one_machine(tree):
    assert planned(tree).network.model_dump() == {"workers": 1, "bytes_a_step": 0}


def test_long_sequences_are_not_made_to_know_their_length(tree):
    tree["task"]["max_level"] = 10**9
    tree["curriculum"] = {"minimum": 1, "maximum": 10**9}
    assert planned(tree).longest_sequence == 2 * 10**9 + 1
    tree["task"]["max_level"] = 200
    tree["curriculum"] = {"minimum": 1, "maximum": 200}
    assert planned(tree).longest_sequence == 401


def test_what_cannot_fit_is_refused_with_the_sum(tree):
    tree["model"] = {**model("dnc"), "num_slots": 10**6}
    tree["task"]["max_level"] = 1
    with pytest.raises(ConfigError) as caught:
        check_fits(make_config(tree))
    message = str(caught.value)
    assert message.startswith("the config does not fit in memory: a training step needs ")
    assert " TiB = activations " in message
    assert "the machine has " in message


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    whole = machine.machine_bytes(torch.device("cpu"))
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP", limit)
    limit.write_text("123456\n")
    assert machine.machine_bytes(torch.device("cpu")) == 123456
    limit.write_text("max\n")
    assert machine.machine_bytes(torch.device("cpu")) == whole


def test_planning_leaves_the_random_numbers_alone(tree):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    planned(tree)
    assert torch.equal(torch.rand(3), expected)


def test_the_plan_is_told_in_lines(tree):
    shown = "\n".join(lines(planned(tree)))
    assert "sequences of up to 9 steps" in shown
    assert "network   0 bytes a step, 1 worker" in shown
    assert "DOES NOT FIT" not in shown


BANK = {"num_rows": 3_000, "width": 8, "value_width": 12}
FACTS = {"name": "facts", "num_facts": 50, "key_bits": 6, "queries": 10}


def banked(tree, name, **bank):
    tree["model"] = {"name": name, "hidden_size": 16, "num_heads": 2, "top_k": 3}
    tree["bank"] = {**BANK, **bank}
    if name != "memory-lstm":
        tree["bank"]["value_width"] = None
    tree["task"] = FACTS
    tree["training"] |= {"batch_size": 8}
    return tree


@pytest.mark.parametrize("optimiser", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize(
    ("name", "bank"),
    [
        ("memory-lstm", {}),
        ("memory-lstm", {"index": "product-key", "metric": "ip", "num_rows": 2_500}),
        ("memory-lstm", {"dtype": "bfloat16"}),
        ("sam", {}),
    ],
)
def test_what_a_bank_takes_is_what_its_tensors_take(tree, name, bank, optimiser, tmp_path):
    config = make_config(banked(tree, name, **bank, optimizer={"name": optimiser}))
    found, trainer = bank_bytes(config), Trainer(prepare(config))
    bank = trainer.setup.bank
    held = [*bank.parameters(), *bank.book.buffers()]
    assert found.rows == sum(tensor.nbytes for tensor in held if tensor.ndim)  # but for two clocks
    trainer._train_batch(10)
    state = trainer.optimisers.each[1].state.values()
    taken = sum(x.nbytes for parts in state for x in parts.values())
    assert found.optimiser == pytest.approx(taken, abs=4)  # a count of steps is one number
    bank.book.last_access.fill_(1)
    bank.save(tmp_path / "bank")
    saved = sum(file.stat().st_size for file in (tmp_path / "bank").iterdir())
    assert found.snapshot == pytest.approx(saved, rel=0.05)


def test_what_makes_no_product_keys_is_not_planned(tree):
    changes = {"index": "product-key", "metric": "ip", "num_rows": 10**6 + 1}
    with pytest.raises(ConfigError, match=r"^bank.num_rows is 1000001, expected a perfect square"):
        plan_memory(make_config(banked(tree, "memory-lstm", **changes)))


def test_nothing_of_a_bank_s_size_is_made(tree):
    config = make_config(banked(tree, "memory-lstm", num_rows=10**9))
    memory = plan_memory(config).plan.memory
    assert memory.bank == 10**9 * (20 * 4 + 3 + 4 * 8 + 8 + 4)
    assert memory.row_optimiser == 10**9 * (2 * 20 * 4 + 2 * 4)
    with pytest.raises(ConfigError, match=r"needs .* = row optimiser 156 GiB \+ bank"):
        check_fits(config)
    tree["bank"]["index"] = "IVF4096,Flat"
    assert plan_memory(make_config(tree)).plan.memory.bank == memory.bank + 2 * 10**9 * (32 + 32)


@pytest.mark.parametrize("name", ["memory-lstm", "sam"])
def test_memory_over_a_bank_is_within_20_percent_of_what_training_takes(tree, name):
    config = make_config(banked(tree, name))

    def train():
        trainer = Trainer(prepare(config))
        for _ in range(2):
            trainer._train_batch(10)
            trainer.step += 1

    memory = plan_memory(config).plan.memory
    # Rows and their state lie in pages that the profiler does not see.
    seen = memory.step - memory.bank - memory.row_optimiser
    assert seen == pytest.approx(tensor_peak(train), rel=0.2)


def test_a_checkpoint_with_a_bank_takes_the_disk_that_was_predicted(tree, new_run):
    tree = banked(tree, "memory-lstm", num_rows=300)
    tree["training"] |= {"steps": 60, "evaluate_every": None, "batch_size": 16}
    trainer, run = new_run("run", tree)
    trainer.train(run)
    files = (path for path in run.newest_checkpoint().rglob("*") if path.is_file())
    found = sum(file.stat().st_size for file in files)
    assert planned(tree).disk.checkpoint == pytest.approx(found, rel=0.3)


@pytest.mark.parametrize("index", ["exact", "IVF4,Flat", "product-key"])
def test_time_over_a_bank_is_planned(tree, index):
    tree = banked(tree, "memory-lstm", index=index, num_rows=2_500, exact_below=None)
    tree["bank"]["metric"] = "ip"
    assert 0 < plan_seconds(plan_memory(make_config(tree))).step < 5


def test_the_time_of_a_scan_grows_with_the_rows(tree, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 0.2)
    sizes = []
    for rows, tries in ((2**16, 3), (2**20, 1)):  # what is short is easily disturbed
        found = plan_memory(make_config(banked(tree, "memory-lstm", num_rows=rows)))
        sizes.append(min(plan_seconds(found).step for _ in range(tries)))
    assert sizes[1] > 4 * sizes[0]
