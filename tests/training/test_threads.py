from contextlib import suppress

import pytest
import torch

from sparsemem.kernels.threads import own_threads, use_threads
from sparsemem.training.config import make_config
from sparsemem.training.threads import has_kernels, set_threads, threads_of

BANK = {"num_rows": 64, "width": 6}


def config_of(tree, threads=2, model=None, **training):
    changed = {"training": {**tree["training"], "threads": threads, **training}}
    return make_config(tree | changed | ({} if model is None else {"model": model}))


@pytest.mark.parametrize("name", ["sam", "SDNC"])
def test_kernels_that_take_the_steps_have_them_for_themselves(tree, name):
    pytest.importorskip("numba")
    set_threads(config_of(tree, model={"name": name, "num_slots": 100}))
    assert (own_threads(), torch.get_num_threads()) == (2, 1)


@pytest.mark.parametrize("model", [{"name": "lstm"}, {"name": "ntm"}, {"name": "dnc"}])
def test_else_they_are_torch_s(tree, model):
    use_threads(3)
    set_threads(config_of(tree, model=model))
    assert (own_threads(), torch.get_num_threads()) == (None, 2)


def test_so_they_are_where_the_reference_is_asked_for(tree, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
    set_threads(config_of(tree))
    assert (own_threads(), torch.get_num_threads()) == (None, 2)


def test_so_they_are_on_a_device_and_over_a_bank(tree):
    assert not has_kernels(config_of(tree, device="cuda"))
    model = {"name": "memory-lstm", "hidden_size": 12}
    assert not has_kernels(config_of(tree | {"bank": BANK}, model=model))
    assert not has_kernels(config_of(tree | {"bank": BANK}))


def test_one_thread_is_one_for_both(tree):
    set_threads(config_of(tree))
    set_threads(config_of(tree, threads=1))
    assert (own_threads(), torch.get_num_threads()) == (None, 1)


def test_what_was_set_before_is_set_again(tree):
    torch.set_num_threads(2)
    use_threads(4)
    with suppress(OSError), threads_of(config_of(tree, threads=1)):
        assert (own_threads(), torch.get_num_threads()) == (None, 1)
        raise OSError
    assert (own_threads(), torch.get_num_threads()) == (4, 2)
