"""What the cells with a dense memory share."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsemem.checks import check_like, check_size
from sparsemem.models.base import Access, Cell
from sparsemem.models.controller import ControllerFactory


class DenseCell(Cell):
    """Controller and interface of a cell that reads and writes every one of its slots.

    Subclasses have a state with the members `memory`, `read_weights` and `reads`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        slot_dim: int,
        num_heads: int,
        controller: ControllerFactory,
    ) -> None:
        super().__init__()
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.num_slots = check_size("num_slots", num_slots)
        self.slot_dim = check_size("slot_dim", slot_dim)
        self.num_heads = check_size("num_heads", num_heads)
        self.feature_size = hidden_size + num_heads * slot_dim
        self.controller = controller(input_size + num_heads * slot_dim, hidden_size)

    def make_interface(self, size: int) -> None:
        """Add the linear layer from the hidden state to the interface."""
        self.interface = nn.Linear(self.hidden_size, size)

    def check_state(self, state: Any, batch_size: int) -> None:
        """Refuse a state of another model, batch size, dtype or device."""
        super().check_state(state, batch_size)
        rows, weight = state.memory.rows, self.interface.weight
        theirs = (*rows.shape[1:], state.read_weights.shape[1])
        ours = (self.num_slots, self.slot_dim, self.num_heads)
        if theirs != ours:
            raise ValueError(
                f"state has num_slots, slot_dim, num_heads = {theirs}, the model has {ours}"
            )
        check_like("state", rows, weight)


def features(
    hidden: Float[Tensor, "B hidden"], reads: Float[Tensor, "B H W"]
) -> Float[Tensor, "B F"]:
    """[h_t, r_t], the heads' read vectors one after the other."""
    return torch.cat([hidden, reads.flatten(1)], 1)


def dense_access(
    read_weights: Float[Tensor, "B H N"], write_weights: Float[Tensor, "B G N"]
) -> Access:
    """The record of a step that read and wrote every slot."""
    ids = torch.arange(read_weights.shape[-1], device=read_weights.device)
    return Access(
        ids.expand_as(read_weights), read_weights, ids.expand_as(write_weights), write_weights
    )
