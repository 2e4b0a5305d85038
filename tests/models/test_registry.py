import inspect

import pytest

from sparsemem.bank import MemoryBank
from sparsemem.models.registry import MODELS, find_model, make_model, model_options, needs_bank

pytestmark = pytest.mark.usefixtures("plain_errors")


def bank_for(name):
    """A bank for a model that cannot do without."""
    return MemoryBank(64, 5) if needs_bank(name) else None


@pytest.mark.parametrize("name", MODELS)
def test_each_model_is_made_by_its_name(name):
    model = make_model(name, bank_for(name), input_size=3, hidden_size=4, output_size=2)
    assert type(model) is MODELS[name]
    assert (model.input_size, model.output_size, model.cell.hidden_size) == (3, 2, 4)
    assert find_model(name.upper()) is MODELS[name]


def test_options_are_those_of_model_and_cell():
    options = model_options("sam")
    assert (options["num_slots"], options["slot_dim"]) == (1_048_576, 32)
    assert options["hidden_size"] is inspect.Parameter.empty
    assert options["strength_bias"] == 8.0
    assert "controller" not in options
    model = make_model("sam", input_size=3, hidden_size=4, output_size=2, top_k=2, index_after=None)
    assert model.cell.top_k == 2
    assert model.cell.index_after is None


@pytest.mark.parametrize("name", MODELS)
def test_every_option_listed_is_taken(name):
    options = {**model_options(name), "input_size": 3, "hidden_size": 4, "output_size": 2}
    assert type(make_model(name, bank_for(name), **options)) is MODELS[name]


@pytest.mark.parametrize("name", ["sam", "sdnc"])
def test_a_size_of_none_is_the_default(name):
    sizes = {"input_size": 3, "hidden_size": 4, "output_size": 2}
    model = make_model(name, **sizes, num_slots=None, slot_dim=None)
    listed = model_options(name)
    assert model.cell.num_slots == listed["num_slots"] == 1_048_576
    assert model.cell.slot_dim == listed["slot_dim"] == 32
    assert (model.cell.num_heads, model.cell.top_k) == (listed["num_heads"], listed["top_k"])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("samm", {}, ValueError, r"^unknown model 'samm': did you mean 'sam'\? known: dnc, lstm,"),
        ("sam", {"num_slot": 3}, ValueError, r"^unknown option 'num_slot' .*did you mean 'num_sl"),
        ("lstm", {"top_k": 3}, ValueError, r"^unknown option 'top_k' of model 'lstm'.*known: hid"),
        ("sam", {"num_slots": 1e6}, TypeError, r"^num_slots is 1000000.0, expected a valid integ"),
        ("sam", {"num_slots": True}, TypeError, r"^num_slots is True, expected a valid integer"),
        ("dnc", {"masked": 1}, TypeError, r"^masked is 1, expected a valid boolean"),
        ("sam", {}, ValueError, r"^model 'sam' needs the option 'input_size'"),
    ],
)
def test_what_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        make_model(name, **options)


def test_sdnc_has_the_options_of_sam_too():
    options = model_options("sdnc")
    assert set(model_options("sam")) < set(options)
    assert (options["num_links"], options["bypass_dropout"]) == (8, 0.0)
    sizes = {"input_size": 3, "hidden_size": 4, "output_size": 2}
    model = make_model("sdnc", **sizes, bypass_dropout=0.25, num_links=3, index_after=None)
    assert (model.cell.bypass.p, model.cell.num_links, model.cell.index_after) == (0.25, 3, None)
    with pytest.raises(TypeError, match="bypass_dropout is 'much', expected"):
        make_model("sdnc", **sizes, bypass_dropout="much")
