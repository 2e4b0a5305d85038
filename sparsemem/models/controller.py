"""Controllers: the small network that drives a memory."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

ControllerState = Any  # a tensor or a nested tuple of tensors, batch first
ControllerFactory = Callable[[int, int], nn.Module]


def lstm_cell(input_size: int, hidden_size: int) -> nn.LSTMCell:
    """An LSTM cell that starts out remembering: its forget gate's bias is raised by 1.

    Jozefowicz et al. 2015, "An empirical exploration of recurrent network architectures".
    """
    cell = nn.LSTMCell(input_size, hidden_size)
    with torch.no_grad():
        cell.bias_ih[hidden_size : 2 * hidden_size] += 1
    return cell


class LSTMController(nn.Module):
    """One LSTM layer; hidden and cell state start at zero."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.cell = lstm_cell(input_size, hidden_size)

    def forward(
        self, input: Float[Tensor, "B I"], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B hidden"], tuple[Tensor, Tensor]]:
        """Advance one step; returns (hidden, (hidden, cell))."""
        if state is not None and state[0].shape[1] != self.cell.hidden_size:
            raise ValueError(
                f"state has hidden_size {state[0].shape[1]}, the controller has"
                f" {self.cell.hidden_size}"
            )
        hidden, memory = self.cell(input, state)
        return hidden, (hidden, memory)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is what its class does, and nothing else."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(module) is kind
        and not any(getattr(module, name) for name in hooks)
        and "forward" not in vars(module)
    )


def has_global_hooks() -> bool:
    """Whether every module calls something beside its own forward."""
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def plain_lstm(controller: nn.Module) -> nn.LSTMCell | None:
    """The LSTM cell that a controller consists of, where a kernel may stand in for it."""
    if not isinstance(controller, LSTMController) or not is_plain(controller, LSTMController):
        return None
    cell = controller.cell
    return cell if is_plain(cell, nn.LSTMCell) and cell.bias else None


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `function` to every tensor of a nested tuple, keeping its structure."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    parts = (map_tensors(function, part) for part in tree)
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def mover(like: Tensor, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    """A function that copies, detached, to where `like.to(...)` would be; ids stay integers."""
    target = like.detach().new_empty(0).to(*args, **kwargs)

    def move(tensor: Tensor) -> Tensor:
        dtype = target.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(target.device, dtype, copy=True)

    return move
