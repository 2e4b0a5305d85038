"""A version is all or nothing: rows, optimisers, and what its caller wrote beside it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem import MemoryBank
from sparsemem.bank.errors import BankError
from sparsemem.distributed import versions as versions_module
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.home import checkpoint_at, folder_of, read_manifest
from sparsemem.distributed.transport import LocalShards
from sparsemem.distributed.versions import read_version
from sparsemem.files import replace_file
from tests.oracles.crashes import Crashes
from tests.oracles.shard_homes import ROWS, WIDTH, change, filled, new_bank, opened, step, then
from tests.oracles.shard_states import same_state, state_of
from tests.oracles.sharded import whole


def beside(run, version):
    return run / f"step-{version}"


def saved_run(run, bank, states, keep=(), at=None):
    """Save a bank with a file of the run beside it; `states` has what each version is."""
    state = state_of(bank)

    def alongside(version):
        states[version] = state
        replace_file(beside(run, version), json.dumps({"version": version}).encode())
        if at is not None:
            raise at

    bank.save(alongside, keep)


def check_files(run):
    """Every version has its file; returns the versions."""
    versions = sorted(read_manifest(run / "bank").clocks)
    for version in versions:
        assert json.loads(beside(run, version).read_text())["version"] == version
    return versions


def check_run(run, states, now):
    """It goes on from `now`, and every version holds what it held when it was made."""
    bank = opened(run / "bank")
    same_state(state_of(bank), now)
    for version in bank.versions:
        bank.restore(version)
        same_state(state_of(bank), states[version])
    bank.close()


def new_run(tmp_path):
    """A run with two versions of a bank, 1 and 2, and changes since; and what each is."""
    run, copies = tmp_path / "run", tmp_path / "copies"
    run.mkdir()
    copies.mkdir()
    bank, states = filled(new_bank(run / "bank")), {}
    saved_run(run, bank, states)
    change(bank)
    saved_run(run, bank, states, keep=[1])
    step(bank, 5)
    return run, copies, bank, states


@pytest.mark.usefixtures("plain_errors")  # in a quarter of the time
def test_a_crash_at_any_moment_of_a_save_leaves_the_old_version_or_the_new_with_its_file(
    tmp_path, monkeypatch
):
    run, copies, bank, states = new_run(tmp_path)
    now = state_of(bank)
    with monkeypatch.context() as patch:
        crashes = Crashes(patch, run, copies)
        saved_run(run, bank, states, keep=[1])
    found = [check_files(state) for state in crashes.states]
    number = found.index([1, 3])
    assert found == [[1, 2]] * number + [[1, 3]] * (len(found) - number)
    assert 40 < number < len(found) - 4
    for state in (*crashes.states[: number - 1 : 11], *crashes.states[number - 1 :: 3]):
        check_run(state, states, now)


@pytest.mark.usefixtures("plain_errors")
def test_a_crash_at_any_moment_of_going_back_leaves_all_shards_before_or_after_it(
    tmp_path, monkeypatch
):
    run, copies, bank, states = new_run(tmp_path)
    now = state_of(bank)
    with monkeypatch.context() as patch:
        crashes = Crashes(patch, run, copies)
        bank.restore(1)
    same_state(state_of(bank), states[1])
    gone_back = []
    for number, state in enumerate(crashes.states):
        assert check_files(state) == [1, 2]
        gone_back.append(read_manifest(state / "bank").version == 1)
        if number % 2 == 0 or gone_back[-2:] == [False, True]:
            check_run(state, states, states[1] if gone_back[-1] else now)
    assert gone_back == sorted(gone_back)
    assert set(gone_back) == {False, True}


def test_nothing_of_what_came_later_is_done_again(tmp_path):
    run, _, bank, states = new_run(tmp_path)
    losses, after = None, None
    for version in (1, 2, 1):
        bank.restore(version)
        same_state(state_of(bank), states[version])
        bank.close()
        bank = opened(run / "bank")
        same_state(state_of(bank), states[version])
        assert bank.versions == (1, 2)
        if version == 1:
            again = then(bank)
            losses, after = (losses, after) if losses else again
            assert again[0] == losses
            same_state(again[1], after)
    bank.close()
    bank = opened(run / "bank")
    same_state(state_of(bank), after)
    saved_run(run, bank, states, keep=[2])
    number = bank.versions[-1]
    assert bank.versions == (2, number)
    bank.restore()  # to the one in force, not to the greatest
    same_state(state_of(bank), after)
    bank.restore(2)
    same_state(state_of(bank), states[2])
    bank.restore()
    same_state(state_of(bank), states[2])
    with pytest.raises(ValueError, match=f"version is 1, expected a version .* 2, {number}$"):
        bank.restore(1)
    same_state(state_of(bank), states[2])


def test_what_is_beside_a_version_may_fail(tmp_path):
    run, _, bank, states = new_run(tmp_path)
    now = state_of(bank)
    with pytest.raises(RuntimeError, match="no room"):
        saved_run(run, bank, states, at=RuntimeError("no room"))
    assert bank.versions == (1, 2)
    same_state(state_of(bank), now)
    change(bank)
    saved_run(run, bank, states)
    assert bank.versions == (4,)  # no number is used twice: the file beside 3 is of no version
    assert beside(run, 3).exists()
    after = state_of(bank)
    bank.close()
    check_files(run)
    check_run(run, states, after)
    for shard in range(2):
        assert not checkpoint_at(folder_of(run / "bank", shard), 3).exists()


def test_versions_to_keep_have_to_be_there(tmp_path):
    _, _, bank, _ = new_run(tmp_path)
    now = state_of(bank)
    with pytest.raises(ValueError, match=r"keep holds 7, expected a version .* there: 1, 2"):
        bank.save(keep=[1, 7])
    assert bank.versions == (1, 2)
    same_state(state_of(bank), now)


def test_clients_of_what_has_not_happened_are_refused(tmp_path):
    _, _, bank, _ = new_run(tmp_path)
    other = bank.as_worker(0, of=1)
    rows = torch.ones(2, WIDTH)
    other.write(torch.tensor([0, 1]), rows)
    bank.save()
    saved = state_of(bank)
    bank.restore()
    with pytest.raises(BankError, match=r"change 2 .* comes after its change 0: .* made anew"):
        other.write(torch.tensor([0, 1]), rows)  # would be the very next of its changes
    same_state(state_of(bank), saved)
    bank.as_worker(0, of=1).write(torch.tensor([0, 1]), rows)
    bank.write(torch.tensor([0, 1]), rows)


class _Failed(Exception):
    pass


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("save"), st.sets(st.integers(0, 3), max_size=2)),
    st.tuples(st.just("fail"), st.sets(st.integers(0, 3), max_size=2)),
    st.tuples(st.just("restore"), st.integers(0, 3)),
    st.tuples(st.just("crash"), st.none()),
)


@pytest.mark.usefixtures("plain_errors")
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=st.lists(ACTIONS, min_size=3, max_size=10))
def test_versions_are_those_of_a_dictionary(tmp_path_factory, actions):
    """Whatever is done in whatever order: a model is a dictionary of states."""
    run = tmp_path_factory.mktemp("run")
    bank = new_bank(run / "bank")
    torch.manual_seed(0)
    states = {0: state_of(bank)}
    filled(bank)

    def some(numbers):
        there = sorted(states)
        return [there[number] for number in sorted(numbers) if number < len(there)]

    for action, given_with in actions:
        if action == "step":
            step(bank, given_with)
        elif action == "crash":
            now = state_of(bank)
            bank.close()
            bank = opened(run / "bank")
            same_state(state_of(bank), now)
        elif action == "restore":
            for version in some([given_with]):
                bank.restore(version)
                same_state(state_of(bank), states[version])
        elif action == "fail":
            with pytest.raises(_Failed):
                saved_run(run, bank, {}, some(given_with), at=_Failed())
        else:
            keep, made = some(given_with), {}
            saved_run(run, bank, made, keep)
            states = {version: states[version] for version in keep} | made
        assert bank.versions == tuple(sorted(states))
    for version, state in states.items():
        bank.restore(version)
        same_state(state_of(bank), state)
    bank.close()


def test_a_manifest_without_kept_versions_is_read(tmp_path):
    bank = filled(new_bank(tmp_path / "bank"))
    bank.save()
    bank.close()
    file = tmp_path / "bank" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest.pop("kept") == {}
    file.write_text(json.dumps(manifest))
    assert opened(tmp_path / "bank").versions == (1,)


def same_bank(plain, bank):
    """A bank in one, and a sharded one, hold the same."""
    book, keys = whole(bank)
    live = book.live
    for name in ("live", "frozen", "tags", "expiry", "last_access", "accesses"):
        assert torch.equal(getattr(plain.book, name), getattr(book, name)), name
    assert torch.equal(plain.keys[live], keys[live])
    queries = torch.randn(4, WIDTH)
    for ours, theirs in zip(plain.read(queries, 3), bank.read(queries, 3), strict=True):
        assert torch.equal(ours, theirs)


def contents(path):
    return {file: file.stat().st_mtime_ns for file in sorted(Path(path).rglob("*"))}


def test_a_version_is_read_as_one_bank_while_its_shards_are_at_work(tmp_path):
    run, _, bank, _ = new_run(tmp_path)
    before = contents(run)
    found = {version: read_version(run / "bank", version) for version in (1, 2, None)}
    assert contents(run) == before
    assert all(type(plain) is MemoryBank for plain in found.values())
    for version in (1, 2):
        bank.restore(version)
        if version == 2:
            same_bank(found[None], bank)
            bank.restore(version)
        same_bank(found[version], bank)
    bank.close()
    with pytest.raises(ValueError, match="version is 5, expected a version that is there: 1, 2"):
        read_version(run / "bank", 5)


def test_the_version_that_a_bank_was_created_with(tmp_path):
    path = ShardedBank.create(tmp_path / "bank", ROWS, WIDTH, num_shards=3, initial="normal")
    bank = ShardedBank(path, LocalShards(path))
    before = whole(bank)[1].clone()
    step(bank, 1)
    assert torch.equal(read_version(path).keys, before)
    assert not torch.equal(whole(bank)[1], before)


def test_a_version_that_goes_while_it_is_read(tmp_path, monkeypatch):
    run, _, bank, _ = new_run(tmp_path)
    real, saves = versions_module.read_checkpoint, []

    def late(path, manifest, shard):
        if shard == 1 and not saves:
            saves.append(bank.save())
        return real(path, manifest, shard)

    monkeypatch.setattr(versions_module, "read_checkpoint", late)
    plain = read_version(run / "bank")  # another one by then
    assert bank.versions == (3,)
    same_bank(plain, bank)
    saves.clear()
    with pytest.raises(ValueError, match="version is 3, expected a version that is there: 4"):
        read_version(run / "bank", 3)


def test_a_version_that_is_damaged(tmp_path):
    run, _, bank, _ = new_run(tmp_path)
    file = checkpoint_at(folder_of(run / "bank", 1), 2) / "bank" / "manifest.json"
    file.unlink()
    with pytest.raises(BankError, match=r"checkpoint-2/bank is no bank"):
        read_version(run / "bank")
    read_version(run / "bank", 1)
    file.write_text("{}")
    with pytest.raises(BankError, match=r"checkpoint-2/bank/manifest.json is not the manifest"):
        read_version(run / "bank", 2)
    bank.close()
