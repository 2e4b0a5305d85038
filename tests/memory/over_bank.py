"""What the tests of episodes over a bank share."""

import torch

from sparsemem.bank import MemoryBank

F64 = torch.float64


def ids(*values):
    return torch.tensor(values)


def bank_of(rows, live=None, **options):
    """A bank with rows [N, W] where live (everywhere)."""
    rows = torch.as_tensor(rows, dtype=F64)
    bank = MemoryBank(*rows.shape, dtype=F64, **options)
    taken = torch.arange(len(rows)) if live is None else torch.as_tensor(live).nonzero().flatten()
    bank.write(taken, rows[taken])
    return bank


def write_slot(episode, slot, word, keep=False):
    """Every episode sets (or adds to) row `slot`."""
    at = episode.positions(torch.full((episode.batch_size, 1), slot))
    words = torch.as_tensor(word, dtype=F64).expand(episode.batch_size, 1, -1)
    erase = at[:, :0] if keep else at
    return episode.write(at.unsqueeze(2), torch.ones_like(at[..., None], dtype=F64), words, erase)


def read_slots(episode, *slots):
    """Rows [B, S, W] of slots, and the next handle."""
    at = episode.positions(torch.tensor(slots).expand(episode.batch_size, -1))
    rows, episode = episode.read(at.unsqueeze(1))
    return rows.squeeze(1), episode


def found_slots(episode, query, k):
    query = torch.as_tensor(query, dtype=F64).expand(episode.batch_size, 1, -1)
    return episode.slots_of(episode.search(query, k)).squeeze(1).tolist()
