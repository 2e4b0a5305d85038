"""What the row optimisers share: which rows are stepped, under which lock, with which state."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.rows import zeros
from sparsemem.bank.watching import is_table, tell
from sparsemem.checks import check_size
from sparsemem.kernels.row_gradient import sorted_gradient
from sparsemem.optim.gradients import (
    Change,
    check_gradients,
    computing_dtype,
    make_change,
    row_steps,
)
from sparsemem.optim.packing import pack, unpack
from sparsemem.optim.remote import bank_here, remote_bank_of, steps_of
from sparsemem.optim.rounding import round_stochastically

if TYPE_CHECKING:
    from sparsemem.kernels.row_gradient import Gradient as RowGradient

State = dict[str, Tensor]
Options = dict[str, Any]


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Steps the rows that have a gradient, and no others.

    Takes any real parameters, so that one optimiser serves a whole model:

    - With a row-sparse gradient (sparse COO over the first dimension), as the tables of a
      `MemoryBank` and an `nn.Embedding(sparse=True)` have: only the rows in the gradient are
      read or written, with state a row. No step costs more for a larger table.
    - With a dense gradient: the ordinary dense update, which is the same equations for all of it.

    Where there is a kernel (`takes_entries`) it adds up, steps and rounds each row in one go. On a
    GPU nothing waits then but the check that all gradients are finite; float64 parameters,
    stochastic rounding, rows of more than 16,384 numbers and banks that have to be told of rows (a
    FAISS index, a folder) wait for which rows there are.

    A bank's rows change under its write lock and its index is told; rows that are no longer
    trainable (removed or frozen since the backward pass) are left alone, and a removed row's
    state goes with it.

    State and arithmetic are float32, float64 for float64 parameters. Parameters of less
    precision are rounded at the end: to nearest, or bfloat16 stochastically by `rounding_seed`,
    which keeps updates that are smaller than their last digit.

    A step in which any gradient has a NaN or an infinity raises ValueError and changes nothing.
    """

    tells_banks = True  # for sparsemem.bank.watching

    def __init__(self, params: ParamsT, options: Options) -> None:
        super().__init__(params, options)

    def _check(self, options: Options) -> None:
        """Refuse bad options of a parameter group, naming the first."""
        if options["rounding_seed"] is not None:
            check_size("rounding_seed", options["rounding_seed"], 0)

    @abstractmethod
    def _zero_state(self, parameter: Tensor, by_row: bool, options: Options) -> State:
        """State at the start, all zero, for row-sparse or for dense gradients."""

    @abstractmethod
    def _to_rows(self, parameter: Tensor, state: State) -> None:
        """Turn state that began with dense gradients into state by row, if it is not yet."""

    @abstractmethod
    def _update(self, rows: Tensor, gradient: Tensor, state: State, options: Options) -> None:
        """One step of rows [n, ...] (or a whole parameter) and of their state, in place."""

    @abstractmethod
    def _launch(
        self, steps: Any, table: Tensor, gradient: RowGradient, state: State, options: Options
    ) -> Tensor | None:
        """`_update` of a table's rows, from the entries of a row-sparse gradient, by a kernel.

        steps: a module of kernels (`row_steps`). Which rows were stepped, if that is known.
        """

    def _reach(self, state: State, ids: Tensor) -> None:
        """Make pages for wide rows of state that are stepped for the first time, by `reach`."""

    def add_param_group(self, param_group: Options) -> None:
        """Add parameters with options of their own; as torch's, with the options checked."""
        self._check({**self.defaults, **param_group})
        lean(super().add_param_group)(param_group)
        for parameter in self.param_groups[-1]["params"]:
            bank = bank_here(parameter)
            if bank is not None:
                bank.add_listener(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step what has a gradient; returns the closure's loss, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._banks_locked():
            changes = [make_change(*named) for named in self._named() if named[1].grad is not None]
            check_gradients(changes)
            self._step_remote(changes)  # first: if it fails, the same may be asked again
            for group in self.param_groups:
                if group["rounding_seed"] is not None:
                    group["steps"] = group.get("steps", 0) + 1
            for change in changes:
                bank = bank_here(change.parameter)
                if bank is not None:
                    self._step_bank(change, bank)
        for change in changes:  # nobody needs to wait for these
            if bank_here(change.parameter) is None and remote_bank_of(change.parameter) is None:
                self._step(change, change.ids, change.gradient)
        return loss

    def forget(self, parameter: Tensor, ids: Int[Tensor, " n"]) -> None:
        """Called by a bank that removed rows: their state is not for the next."""
        for value in self.state.get(parameter, {}).values():
            value.index_fill_(0, ids, 0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        lean(super().zero_grad)(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; state of few rows of a table is packed: `rows` holds their ids."""
        saved: dict[str, Any] = lean(super().state_dict)()
        saved["state"] = {key: pack(state) for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; state keeps its precision. ValueError if it is of other parameters."""
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]
        for group in groups:
            self._check(group)
        keys = chain.from_iterable(group["params"] for group in groups)
        states = {}
        for key, (name, parameter, options) in zip(keys, self._named(), strict=False):
            if state_dict["state"].get(key):
                saved = state_dict["state"][key]
                states[parameter] = self._loaded(name, parameter, options, saved)
        lean(super().load_state_dict)({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(states)

    def _named(self) -> Iterator[tuple[str, Tensor, Options]]:
        """Each parameter with its name and the options of its group."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                name = names[place] if names else f"parameter {place} of group {number}"
                yield name, parameter, group

    def _loaded(self, name: str, parameter: Tensor, options: Options, saved: State) -> State:
        for by_row in (True, False):
            state = self._zero_state(parameter, by_row, options)
            if unpack(saved, state):
                return state
        found = {key: list(value.shape) for key, value in saved.items()}
        raise ValueError(
            f"the state of {name} is {found}, expected that of a {type(self).__name__}"
            f" for {list(parameter.shape)}"
        )

    @contextmanager
    def _banks_locked(self) -> Iterator[None]:
        """All at once, so that who reads a bank sees no half of a step; in an order that all keep.

        From before the gradients are looked at: until then a bank may take rows out of them.
        """
        parameters = (parameter for _, parameter, _ in self._named())
        banks = {bank_here(parameter) for parameter in parameters if parameter.grad is not None}
        with ExitStack() as locks:
            for bank in sorted((bank for bank in banks if bank is not None), key=id):
                locks.enter_context(bank.table.lock.write())
                bank.expect_change()
            yield

    def _step_remote(self, changes: list[Change]) -> None:
        """One call of each bank whose rows are elsewhere; of several workers all make it."""
        parameters = [parameter for _, parameter, _ in self._named()]
        for bank in dict.fromkeys(map(remote_bank_of, parameters)):
            if bank is not None:
                own = [change for change in changes if remote_bank_of(change.parameter) is bank]
                if own or bank.num_workers > 1:
                    bank.step_rows(steps_of(own, bank, type(self).__name__))

    def _step_bank(self, change: Change, bank: MemoryBank) -> None:
        ids, gradient = change.ids, change.gradient
        if ids is not None and not len(ids):
            return
        if not is_table(change.parameter):  # sub-keys of product keys
            self._step(change, ids, gradient)
            return
        if change.by_entry and ids is not None:
            stepped = self._step_entries(change, ids, bank)
            if stepped is None:
                stepped = ids if bank.index.takes_repeats else torch.unique(ids)
            if len(stepped):
                tell(change.parameter, stepped)
            return
        if ids is None:
            ids = torch.arange(len(gradient), device=gradient.device)
        kept = bank.is_trainable(ids)
        if not kept.all():
            ids, gradient = ids[kept], gradient[kept]
        self._step(change, ids, gradient)
        if len(ids):
            tell(change.parameter, ids)

    def _step(self, change: Change, ids: Tensor | None, gradient: Tensor) -> None:
        if ids is None:
            self._step_whole(change)
        elif not len(ids):
            return
        elif change.by_entry:
            self._step_entries(change, ids, None)
        else:
            self._step_rows(change, ids, gradient)

    def _step_rows(self, change: Change, ids: Tensor, gradient: Tensor) -> None:
        parameter = change.parameter
        state = self._state_of(change, by_row=True)
        self._reach(state, ids)
        rows = parameter.index_select(0, ids).to(gradient.dtype)
        part = {key: value.index_select(0, ids) for key, value in state.items()}
        self._update(rows, gradient, part, change.options)
        parameter.index_copy_(0, ids, self._rounded(rows, change))
        for key, value in part.items():
            state[key].index_copy_(0, ids, value)

    def _step_entries(self, change: Change, ids: Tensor, bank: MemoryBank | None) -> Tensor | None:
        """Step rows by a kernel, which leaves those of a bank alone that are not trainable now.

        Which were stepped, if that is known.
        """
        state = self._state_of(change, by_row=True)
        marks: list[Tensor | None] = [None, None, None]
        if bank is not None:
            book = bank.book
            marks = [book.live, book.frozen, None if book.selection is None else book.selected]
        gradient = sorted_gradient(ids, change.gradient, *marks)
        steps = row_steps(change.parameter)
        return self._launch(steps, change.parameter, gradient, state, change.options)

    def _step_whole(self, change: Change) -> None:
        parameter, gradient = change.parameter, change.gradient
        state = self._state_of(change, by_row=False)
        values = parameter.to(gradient.dtype)  # itself, if that is its dtype
        self._update(values, gradient, state, change.options)
        if values is not parameter:
            parameter.copy_(self._rounded(values, change))

    def _state_of(self, change: Change, by_row: bool) -> State:
        state = cast(State, self.state[change.parameter])
        if not state:
            state.update(self._zero_state(change.parameter, by_row, change.options))
        elif by_row:
            self._to_rows(change.parameter, state)
        for name, value in state.items():  # where the parameter was moved since
            state[name] = value.to(change.parameter.device)
        return state

    def _rounded(self, values: Tensor, change: Change) -> Tensor:
        options, dtype = change.options, change.parameter.dtype
        if options["rounding_seed"] is None or dtype != torch.bfloat16:
            return values.to(dtype)
        # A function of what the state_dict holds: a resumed run goes on as the one cut short.
        key = repr((options["rounding_seed"], options["steps"], change.name)).encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
        generator = torch.Generator(values.device).manual_seed(seed)
        return round_stochastically(values, generator)


def lean(method: Any) -> Any:
    """A method of torch's optimiser, without importing torch's compiler.

    torch marks some methods as not to be compiled, and imports its compiler to say so: two seconds,
    which a process that compiles nothing, as a shard's, need not spend.
    """
    marked = getattr(torch.optim.Optimizer, method.__name__)
    bare = getattr(marked, "__wrapped__", None)
    if bare is None or "torch._dynamo" in sys.modules or method.__func__ is not marked:
        return method
    return partial(bare, method.__self__)


def across(per_row: Tensor, rows: Tensor) -> Tensor:
    """One number a row (or one in all) as a tensor that multiplies rows."""
    return per_row.view(per_row.shape + (1,) * (rows.ndim - per_row.ndim))


def zeros_like_rows(parameter: Tensor, *, narrow: bool = False) -> Tensor:
    """Lazy zeros of the parameter's shape, or one a row, in the dtype that state has."""
    shape = parameter.shape[:1] if narrow else parameter.shape
    return zeros(*shape, dtype=computing_dtype(parameter), device=parameter.device)


def two_like_rows(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Two such tables that lie together row by row, so that a row of both is one page, not two."""
    count, *shape = parameter.shape
    both = zeros(count, 2, *shape, dtype=computing_dtype(parameter), device=parameter.device)
    first, second = both.unbind(1)
    return first, second


def reach(table: Tensor, ids: Int[Tensor, " n"]) -> None:
    """Write a zero into rows that hold zeros: a page that is read first takes two page faults.

    (One that maps zeros, and one for a page of its own; each takes longer than to step the row.)
    """
    first = [ids.new_zeros(())] * (table.ndim - 1)
    table.index_put_((ids, *first), table.new_zeros(()))
