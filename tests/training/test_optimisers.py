import pytest
import torch

from sparsemem.training.config import Optimizer, Schedule
from sparsemem.training.errors import ConfigError
from sparsemem.training.optimisers import learning_rate_factor, make_optimiser, make_schedule


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def test_options_reach_the_optimiser():
    config = Optimizer(name="adamw", learning_rate=0.5, betas=[0.8, 0.9], weight_decay=0.25)
    optimiser = make_optimiser(config, [parameter()])
    assert isinstance(optimiser, torch.optim.AdamW)
    group = optimiser.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.25)


def test_sgd_takes_a_step_of_the_learning_rate():
    weight = parameter()
    optimiser = make_optimiser(Optimizer(name="sgd", learning_rate=0.5), [weight])
    (weight * torch.tensor([1.0, 2.0])).sum().backward()
    optimiser.step()
    assert weight.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adm"}, r"training.optimizer.name is 'adm', .*did you mean 'adam'\? known: adam"),
        ({"lr": 1.0}, r"^unknown key training.optimizer.lr for 'adam': known: amsgrad, betas"),
        ({"momentun": 1.0, "name": "sgd"}, r"unknown key .*momentun.*did you mean 'momentum'"),
        ({"learning_rat": 1.0}, r"learning_rat .*did you mean 'learning_rate'\? known: amsgrad"),
        ({"capturable": True}, r"^unknown key training.optimizer.capturable for 'adam': "),
        ({"differentiable": True}, r"^unknown key training.optimizer.differentiable for 'adam'"),
        ({"betas": 3}, r"^training.optimizer.betas is 3, expected a list of 2 numbers$"),
        ({"eps": "small"}, r"^training.optimizer.eps is 'small', expected a number$"),
        ({"amsgrad": 1}, r"^training.optimizer.amsgrad is 1, expected true or false$"),
        ({"eps": -1.0}, r"^training.optimizer: Invalid epsilon value: -1.0$"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_optimiser(Optimizer(**options), [parameter()])


def factors(**schedule):
    return [learning_rate_factor(step, Schedule(**schedule), 6) for step in range(6)]


def test_schedules():
    assert factors(name="constant", warmup=2) == [0.5, 1, 1, 1, 1, 1]
    assert factors(name="linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert factors(name="linear", warmup=1, final=0.5) == pytest.approx(
        [1, 1, 0.875, 0.75, 0.625, 0.5]
    )
    half = [1, 0.9045085, 0.6545085, 0.3454915, 0.0954915, 0]
    assert factors(name="cosine") == pytest.approx(half)


def test_the_scheduler_follows_the_factor():
    optimiser = make_optimiser(Optimizer(name="sgd", learning_rate=0.5), [parameter()])
    schedule = make_schedule(optimiser, Schedule(name="linear"), 6)
    rates = []
    for _ in range(6):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
