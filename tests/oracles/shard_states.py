"""All that the shards of a bank in this process hold: rows, books, optimisers' state."""

import torch

from sparsemem.bank.book import COLUMNS


def state_of(bank):
    """By name, each shard's columns, tables and row states; the clock is not among them."""
    state = {}
    for home in bank.shards.homes:
        server, place = home.server, f"shard {home.shard}: "
        book = server.bank.book
        for name, _ in COLUMNS:
            state[place + name] = getattr(book, name).clone()
        live = book.live
        for name in ("keys", "values"):
            table = getattr(server.bank, name)
            if table is not None:
                state[place + name] = table.detach()[live].clone()
        for name, optimiser in server._optimisers.items():
            for values in optimiser.state.values():
                for key, value in values.items():
                    state[f"{place}{name} {key}"] = value.clone()
    return state


def same_state(one, other):
    """Refuse states that differ anywhere."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
