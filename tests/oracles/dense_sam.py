"""SAM and SDNC over dense [B, N, W] tensors, written from the equations with plain autograd."""

import torch
from torch.nn.functional import one_hot, softplus

from sparsemem.indexes.ranking import GRID_BITS

DELTA = 0.005
EPSILON = 1e-6


def best(scores, k):
    """Ids of the k largest scores on the grid, ties by lower id."""
    grid = torch.round(scores * 2.0 ** GRID_BITS[scores.dtype])
    return grid.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def keep_largest(weights, k):
    """All but the k largest non-zero entries of the last dimension set to zero."""
    ranked = best(weights.detach().masked_fill(weights == 0, -1), min(k, weights.shape[-1]))
    return weights * one_hot(ranked, weights.shape[-1]).sum(-2) * (weights.detach() != 0)


def cosine(query, rows):
    """[B, H, W], [B, N, W] -> [B, H, N]."""
    dot = torch.einsum("bhw,bnw->bhn", query, rows)
    sizes = ((query**2).sum(-1) + EPSILON).sqrt()[:, :, None] * (
        (rows**2).sum(-1) + EPSILON
    ).sqrt()[:, None]
    return dot / sizes


def gates(cell, hidden):
    """The interface of every head, read off the linear layer's output."""
    width = cell.slot_dim
    values = cell.interface(hidden).reshape(len(hidden), cell.num_heads, -1)
    query, word = values[..., :width], values[..., width : 2 * width]
    beta = 1 + softplus(values[..., 2 * width])
    alpha, gamma = values[..., 2 * width + 1].sigmoid(), values[..., 2 * width + 2].sigmoid()
    modes = values[..., 2 * width + 3 :].softmax(-1)
    return query, word, beta, alpha, gamma, modes


class Dense:
    """The state of the dense transcription, and one step of it.

    `rows` [N, W] is what the memory starts from (zeros), `live` [N] says which of its slots are
    taken: of slots that were never accessed, those that are not come first.
    """

    def __init__(self, cell, batch_size, dtype, rows=None, live=None):
        heads, slots = cell.num_heads, cell.num_slots
        self.cell = cell
        rows = torch.zeros(slots, cell.slot_dim, dtype=dtype) if rows is None else rows
        live = torch.ones(slots, dtype=torch.bool) if live is None else live
        self.memory = (rows * live[:, None]).expand(batch_size, -1, -1)
        self.last_access = torch.where(live, -1, -2).repeat(batch_size, 1)
        self.read_weights = torch.zeros(batch_size, heads, slots, dtype=dtype)
        self.reads = torch.zeros(batch_size, heads * cell.slot_dim, dtype=dtype)
        self.follows = torch.zeros(batch_size, heads, slots, slots, dtype=dtype)  # N
        self.precedes = torch.zeros_like(self.follows)  # P
        self.precedence = torch.zeros(batch_size, heads, slots, dtype=dtype)  # p
        self.controller, self.time = None, 0

    def step(self, input):
        cell = self.cell
        hidden, self.controller = cell.controller(
            torch.cat([input, self.reads], 1), self.controller
        )
        query, word, beta, alpha, gamma, modes = gates(cell, hidden)
        order = self.last_access.sort(dim=1, stable=True).indices
        fresh = one_hot(order[:, : cell.num_heads], cell.num_slots).to(input.dtype)  # I
        gamma = gamma[..., None]
        written = alpha[..., None] * (gamma * self.read_weights + (1 - gamma) * fresh)
        self.memory = self.memory * (1 - fresh.sum(1))[..., None]
        self.memory = self.memory + torch.einsum("bhn,bhw->bnw", written, word)
        similarity = cosine(query, self.memory)
        chosen = one_hot(best(similarity.detach(), cell.top_k), cell.num_slots).sum(2).bool()
        content = (beta[..., None] * similarity).masked_fill(~chosen, -torch.inf).softmax(-1)
        self.read_weights = self.mix(content, written.detach(), modes)
        self.reads = (self.read_weights @ self.memory).flatten(1)
        accessed = (written + self.read_weights > DELTA).any(1)
        self.last_access = torch.where(accessed, self.time, self.last_access)
        self.time += 1
        return cell_output(hidden, self.reads)

    def mix(self, content, written, modes):
        """SDNC's read weights; for SAM the content weights alone."""
        if not modes.shape[-1]:
            return content
        i, j = written[..., :, None], written[..., None, :]
        before = self.precedence
        self.follows = keep_largest(
            (1 - i) * self.follows + i * before[..., None, :], self.cell.num_links
        )
        self.precedes = keep_largest(
            (1 - j) * self.precedes + j * before[..., :, None], self.cell.num_links
        )
        self.precedence = keep_largest(
            (1 - written.sum(-1, keepdim=True)) * before + written, self.cell.num_links
        )
        k = self.cell.top_k
        forward = keep_largest(torch.einsum("bhij,bhj->bhi", self.follows, self.read_weights), k)
        backward = keep_largest(torch.einsum("bhij,bhj->bhi", self.precedes, self.read_weights), k)
        modes = modes[..., None]
        return modes[:, :, 0] * backward + modes[:, :, 1] * content + modes[:, :, 2] * forward


def cell_output(hidden, reads):
    return torch.cat([hidden, reads], 1)


def run(model, input, rows=None, live=None):
    """Output of `model`, computed densely, and the final dense state."""
    state = Dense(model.cell, len(input), input.dtype, rows, live)
    outputs = [model.output(state.step(step)) for step in input.unbind(1)]
    return torch.stack(outputs, 1), state
