"""Plans for a GPU that need not be here: what they count, and what they say they do not know."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from sparsemem.cli import app
from sparsemem.indexes import device_buffer
from sparsemem.indexes.device_buffer import FIRST_CAPACITY
from sparsemem.indexes.device_faiss import TEMPORARY_BYTES, GpuEngine
from sparsemem.training.bankplan import bank_bytes
from sparsemem.training.banks import make_bank
from sparsemem.training.config import make_config
from sparsemem.training.errors import ConfigError
from sparsemem.training.plan import check_fits, lines, plan_memory
from tests.oracles.device_kind import on_device

GPU = "cuda:99"  # on no machine
MISSING = f"training.device is '{GPU}', not usable here: "
SAME = ("parameters", "gradients", "optimiser", "memory", "row_optimiser", "activations", "data")
FACTS = {"name": "facts", "num_facts": 50, "key_bits": 6, "queries": 10}
MANY = 2**20  # rows


@pytest.fixture
def sparse(tree):
    tree["model"]["index_after"] = None  # as on a GPU, where there are no trees
    return tree


@pytest.fixture
def dense(tree):
    tree["model"] = {"name": "ntm", "hidden_size": 12, "num_slots": 64, "slot_dim": 6}
    return tree


@pytest.fixture
def banked(tree, monkeypatch):
    monkeypatch.setattr(GpuEngine, "there", lambda: True)
    tree["model"] = {"name": "memory-lstm", "hidden_size": 16, "num_heads": 2, "top_k": 3}
    tree["task"] = FACTS
    tree["bank"] = {"num_rows": MANY, "width": 8, "value_width": 12, "index": "IVF1024,Flat"}
    return tree


def planned(tree, device="cpu", **training):
    changed = {**tree, "training": {**tree["training"], "device": device, **training}}
    return plan_memory(make_config(changed)).plan


def with_bank(tree, **bank):
    return make_config({**tree, "bank": {**tree["bank"], **bank}})


def derived(tree, **bank) -> int:
    return bank_bytes(with_bank(tree, **bank), "cuda", here=False).derived


def labels(rows, *room):
    return sum(8 * (rows + each) for each in room)


def buffers(rows, row, waiting):
    """Of two indices: a quarter of the rows and those that wait, and as much room again."""
    return 2 * (4 * rows + 2 * (rows // 4 + waiting) * (8 + row))


# Of models ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_plan_for_a_gpu_counts_what_one_for_the_cpu_does(kind, request):
    tree = request.getfixturevalue(kind)
    here, there = planned(tree), planned(tree, GPU)
    one, other = here.memory, there.memory
    for name in SAME:
        assert getattr(other, name) == getattr(one, name)
    assert one.graphs == 0
    assert other.graphs == other.activations + other.memory > 0
    assert other.step == one.step + other.graphs
    assert other.evaluation == one.evaluation
    assert other.saving == one.parameters + one.optimiser == one.saving / 4
    assert other.libraries == 0
    assert other.process == max(other.step, other.evaluation)
    assert (there.disk, there.longest_sequence) == (here.disk, here.longest_sequence)


@pytest.mark.parametrize("training", [{"capture": "off"}, {"truncate": 2}])
def test_what_is_not_captured_takes_no_graphs(tree, training):
    assert planned(tree, GPU, **training).memory.graphs == 0


def test_touched_rows_have_no_tree_on_a_gpu(tree):
    tree["model"]["index_after"] = 4
    here, there = planned(tree).memory, planned(tree, GPU).memory
    tree["model"]["index_after"] = None
    scanned = planned(tree).memory
    assert there.memory == scanned.memory < here.memory
    assert there.activations == scanned.activations


@pytest.mark.parametrize(("kind", "tried"), [("sparse", True), ("dense", False), ("banked", True)])
def test_a_device_that_is_not_here_is_told_in_a_line(kind, tried, request):
    there = planned(request.getfixturevalue(kind), GPU)
    assert not there.device_here
    assert there.machine_bytes is None
    assert there.fits
    shown = lines(there)
    (told,) = (line for line in shown if MISSING in line)
    assert told.startswith(f"note      {MISSING}")
    assert told.endswith(
        ": memory is not compared with the device's, and is without what the libraries take"
        " there; time is not predicted"
    )
    assert any("was tried on the CPU" in line for line in shown) == tried
    assert any("FAISS" in line for line in shown) == (kind == "banked")
    assert "  libraries      not known" in shown
    assert "DOES NOT FIT" not in shown[0]


def test_a_plan_for_what_is_here_has_no_notes(tree):
    here = planned(tree)
    assert here.device_here
    assert here.notes == ()
    assert "not known" not in "\n".join(lines(here))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:01", "cudas", "meta"])
def test_what_is_no_gpu_at_all_is_refused(tree, device):
    with pytest.raises(ConfigError, match=f"^training.device is '{device}'"):
        planned(tree, device)


def test_training_is_refused_where_the_device_is_not(tree):
    tree["training"]["device"] = GPU
    with pytest.raises(ConfigError, match=f"^{MISSING}"):
        check_fits(make_config(tree))


def test_the_command_predicts_memory_and_no_time(dense, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dense))
    arguments = ["plan", str(path), "--set", f"training.device={GPU}"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    memory = planned(dense, GPU).memory
    assert f"  training step  {memory.sum()} (sequences" in shown.stdout
    assert "\ntime " not in shown.stdout
    assert shown.stdout.count(MISSING) == 1
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["memory"] == memory.model_dump()
    assert found["seconds"] is None
    assert not found["device_here"]
    assert found["notes"][0].startswith(MISSING)


# Over banks -----------------------------------------------------------------------------


def test_an_index_on_a_gpu_is_counted_with_all_that_it_keeps_there(banked):
    worn = MANY + int(0.3 * MANY)  # entries, of which the new lists have MANY
    entries = (MANY + worn) * (8 * 4 + 2 + 8)  # numbers, list, label
    rest = 2 * TEMPORARY_BYTES + 8 * MANY
    expected = entries + labels(MANY, MANY, 2 * MANY) + buffers(MANY, 32, 8 * 16_384) + rest
    assert derived(banked) == expected
    memory, rows = planned(banked, GPU).memory, bank_bytes(with_bank(banked)).rows
    assert memory.bank == rows + expected
    assert memory.graphs == 0  # models over a bank are run plainly
    on_cpu = planned(banked).memory
    for name in SAME:
        assert getattr(memory, name) == getattr(on_cpu, name)
    assert on_cpu.bank == rows + 2 * MANY * (4 * 8 + 32)
    assert memory.evaluation - on_cpu.evaluation == memory.bank - on_cpu.bank


@pytest.mark.parametrize(
    ("bank", "more"),
    [
        ({"buffer_rows": 20_000}, buffers(MANY, 32, 160_000) - buffers(MANY, 32, 131_072)),
        ({"dtype": "bfloat16"}, buffers(MANY, 16, 131_072) - buffers(MANY, 32, 131_072)),
        ({"index": "IVF1024,SQ8"}, -(MANY + MANY + int(0.3 * MANY)) * 8 * 3),
        ({"exact_below": MANY + 1}, None),  # all searches are scans
        ({"index": "IVF262145,Flat"}, None),
        ({"index": "exact"}, None),
    ],
)
def test_an_index_on_a_gpu_takes_what_its_options_say(banked, bank, more):
    assert derived(banked, **bank) == (0 if more is None else derived(banked) + more)


def test_few_rows_are_scanned_on_a_gpu(banked):
    assert derived(banked, num_rows=131_071) == 0
    assert derived(banked, num_rows=131_072) > 2 * TEMPORARY_BYTES
    # No more rows can wait than there are, and the first log has room for them.
    expected = 2_300 * 42 + labels(1_000, 1_000, 2_000) + 2 * (4 * 1_000 + FIRST_CAPACITY * 40)
    found = derived(banked, num_rows=1_000, exact_below=1_000)
    assert found == expected + 8 * 1_000 + 2 * TEMPORARY_BYTES


def test_an_index_that_a_gpu_does_not_know_is_on_the_host(banked):
    banked["bank"]["index"] = "HNSW32"
    memory, rows = planned(banked, GPU).memory, bank_bytes(make_config(banked))
    assert memory.bank == rows.rows
    there = bank_bytes(make_config(banked), "cuda", here=False)
    assert (there.derived, there.on_host) == (0, rows.derived)
    assert (rows.derived > 0, rows.on_host) == (True, 0)
    notes = planned(banked, GPU).notes
    assert "index 'HNSW32' is kept on the host: its 128 MiB are not counted" in notes


def test_what_faiss_keeps_free_is_said_not_to_be_counted(banked):
    assert planned(banked, GPU).notes[-1] == (
        "index 'IVF1024,Flat' is counted without what FAISS keeps free in its lists on a GPU, and"
        " as if a quarter of the rows, at most, changed while lists are trained"
    )
    assert planned(banked).notes == ()


@pytest.mark.parametrize(("here", "faiss", "on_gpu"), [(1, 0, 0), (1, 1, 1), (0, 0, 1)])
def test_faiss_without_gpus_has_the_index_on_the_host(banked, monkeypatch, here, faiss, on_gpu):
    monkeypatch.setattr(GpuEngine, "there", lambda: bool(faiss))
    found = bank_bytes(with_bank(banked), "cuda", here=bool(here))
    assert (found.derived > 0, found.on_host > 0) == (bool(on_gpu), not on_gpu)


def test_no_index_takes_more_than_was_planned(banked, monkeypatch):
    """FAISS on a CPU in the place of FAISS GPU, in a bank whose rows change all the time."""
    monkeypatch.setattr(device_buffer, "FIRST_CAPACITY", 16)
    size, options = 2_000, {"index": "IVF16,Flat", "exact_below": 1, "buffer_rows": 20}
    config = with_bank(banked, num_rows=size, background=False, **options)
    with on_device():
        bank = make_bank(config)
    index, most = bank.index, []
    fresh, choose = index.current.num_bytes(), index.upkeep._choose

    def choosing(new):  # at the end of a build, while there are two
        most.append(index.current.num_bytes() + new.num_bytes())
        choose(new)

    monkeypatch.setattr(index.upkeep, "_choose", choosing)
    for step in range(300):
        ids = torch.randint(size, (32,)).unique()
        index.update(ids, torch.randn(len(ids), 8) + step / 50)
    assert len(most) > 2
    found = derived(banked, num_rows=size, **options) - 2 * TEMPORARY_BYTES
    assert 2 * fresh < max(most) <= found < 2 * max(most)
