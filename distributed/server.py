"""ShardServer: who answers for a shard. Each change once, and none lost with the process.

A change that has been answered is in the log; one that is repeated, because its answer was lost,
is answered again and not done again. After a crash a server is made from the last checkpoint and
the calls of the log, in their order: the same calls give the same rows, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sparsemem.bank.errors import BankError
from sparsemem.bank.journal import encode_tensors
from sparsemem.checks import check_known
from sparsemem.distributed.calls import Call, CallLog, from_arrays, to_arrays
from sparsemem.distributed.errors import OutOfTurnError
from sparsemem.distributed.pushes import Pushes
from sparsemem.distributed.shard import ShardBank
from sparsemem.files import write_synced
from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD
from sparsemem.optim.base import RowOptimizer
from sparsemem.optim.remote import RowStep

CHANGES = (
    "take",
    "write_at",
    "remove_at",
    "freeze_at",
    "push",
    "step",
    "select_rows",
    "end_background",
)  # logged, and done once
LOOKS = (
    "find",
    "rows_at",
    "offer",
    "live_of",
    "trainable_of",
    "stats_at",
    "expire_at",
    "mark",
    "fetch",
    "tags_at",
    "total_accesses",
    "candidates",
    "capacity",
    "waiting",
    "squared_norms",
)
OF_WORKERS = ("push", "waiting", "squared_norms")  # of what they have sent of a step
OPTIMISERS = {kind.__name__: kind for kind in (RowSGD, RowAdagrad, RowAdam, RowAdamW)}
KEPT_ANSWERS = 16  # of each client: so many of its changes may be under way at once
BANK, STATE = "bank", "state.safetensors"  # of a checkpoint


class Answer(NamedTuple):
    """What a client was told."""

    sequence: int
    value: Any
    error: str | None  # why the call was refused, as it would be again


class ShardServer:
    """A shard, its row optimisers, and what its clients were told.

    Args:
        bank: the rows.
        log: where changes are written down first; None: nothing outlives the process.
    """

    def __init__(self, bank: ShardBank, log: CallLog | None = None) -> None:
        self.bank, self._log = bank, log
        self._answers: dict[str, list[Answer]] = {}  # the last ones, by client
        self._optimisers: dict[str, RowOptimizer] = {}
        self._pushes = Pushes(bank)
        self._marks: list[tuple[Tensor, int]] = []  # accesses since the last call in the log

    def call(self, call: Call) -> Any:
        """Do what a client asks for, or repeat what it was told."""
        check_known("operation", call.operation, CHANGES + LOOKS)
        if call.operation in ("mark", "fetch"):
            self._marks.append(call.arguments[:3])
        if call.operation in LOOKS:
            return self._do(call)
        last = self._last(call.client)
        if call.sequence == last + 1:
            self._write_down(call)
            self._change(call)
        for answer in self._answers.get(call.client, ()):
            if answer.sequence == call.sequence:
                if answer.error is not None:
                    raise ValueError(answer.error)
                return answer.value
        raise OutOfTurnError(
            f"change {call.sequence} of client {call.client!r} comes after its change {last}:"
            " expected that one again, or the next (a client has to be made anew once another has"
            " gone back to a version)"
        )

    def step(self, steps: Sequence[RowStep], worker: int = 0, num_workers: int = 1) -> None:
        """Step rows, once the gradients of all workers are there.

        They are added up in the order of the workers, whoever came first.
        """
        by_table: dict[str, list[RowStep]] = {}
        for step in self._pushes.step(steps, worker, num_workers):
            by_table.setdefault(step.table, []).append(self.bank.unwritten(step))
        for name, parts in by_table.items():
            if any(len(part.ids) for part in parts):
                self._step_table(name, parts)

    def _step_table(self, name: str, parts: Sequence[RowStep]) -> None:
        table: Tensor = getattr(self.bank, name)
        optimiser = self.optimiser(f"{parts[0].kind} of {name}")
        optimiser.param_groups[0].update(parts[0].options)
        table.grad = gradient_of(table, parts)
        try:
            optimiser.step()
        finally:
            table.grad = None

    def checkpoint(self, path: Path) -> None:
        """Write all of it into a new folder."""
        self.bank.save(path / BANK)
        written = self.bank.book.written.nonzero().squeeze(1)
        state = {
            # A bank's folder leaves it out: nobody's gradients outlive it there. Here they do.
            "written": (written, self.bank.book.written[written], self.bank.book.last_written),
            "selection": self.bank.selection_state(),
            "answers": {
                client: [tuple(answer) for answer in answers]
                for client, answers in self._answers.items()
            },
            "optimisers": {
                name: state_of(optimiser) for name, optimiser in self._optimisers.items()
            },
            "pushes": self._pushes.state(),
        }
        write_synced(path / STATE, encode_tensors(to_arrays(state)))

    @classmethod
    def restored(
        cls, path: Path, log: CallLog | None, calls: Sequence[Call], *, gone_back: bool = False
    ) -> ShardServer:
        """From a checkpoint and the calls that came after it.

        gone_back: what clients did since has not happened. They begin anew; what one of them still
        had under way is refused.
        """
        server = cls(ShardBank.load(path / BANK))
        try:
            state = from_arrays(safetensors.torch.load((path / STATE).read_bytes()))
            ids, times, server.bank.book.last_written = state["written"]
            server.bank.book.written.index_copy_(0, ids, times)
            server.bank.load_selection(*state["selection"])
            if not gone_back:
                server._pushes.load(state["pushes"])
                for client, answers in state["answers"].items():
                    server._answers[client] = [Answer(*answer) for answer in answers]
            for name, saved in state["optimisers"].items():
                server.load_optimiser(name, loadable(saved))
        except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
            raise BankError(f"{path / STATE} is not a shard's state: {error}") from error
        return server._gone_on(log, calls)

    @classmethod
    def replayed(cls, bank: ShardBank, log: CallLog | None, calls: Sequence[Call]) -> ShardServer:
        """From an empty bank and all calls there were."""
        return cls(bank)._gone_on(log, calls)

    def change_log(self, begin: Callable[[int], CallLog]) -> None:
        """Write into another log from now on, which `begin` begins at a record's number."""
        sequence = 0
        if self._log is not None:
            self._write_marks()  # what was marked belongs to what came before
            self._log.flush()
            sequence = self._log.sequence
        log = begin(sequence)
        if self._log is not None:
            self._log.close()
        self._log = log

    def begin_anew(self) -> None:
        """Clients do, as where a shard goes back to a version."""
        self._answers.clear()
        self._pushes = Pushes(self.bank)

    def close(self) -> None:
        """Stop what runs in the background, and let go of the log."""
        self.bank.close()
        if self._log is not None:
            with suppress(BankError):  # on a full disk these few accesses are lost, as by a crash
                self._write_marks()
            self._log.close()

    def _gone_on(self, log: CallLog | None, calls: Sequence[Call]) -> ShardServer:
        for call in calls:
            self._replay(call)
        self._log = log
        return self

    def _write_down(self, call: Call) -> None:
        self._write_marks()
        if self._log is not None:
            self._log.append(call)

    def _write_marks(self) -> None:
        if self._marks and self._log is not None:
            self._log.append(Call("marks", (list(self._marks),)))
        self._marks.clear()

    def _replay(self, call: Call) -> None:
        if call.operation == "marks":
            for mark in call.arguments[0]:
                self.bank.mark(*mark)
            return
        if call.sequence > self._last(call.client):
            self._change(call)  # else memory ran out at its first time, and it was asked again

    def _last(self, client: str) -> int:
        """The number of a client's last change."""
        answers = self._answers.get(client)
        return answers[-1].sequence if answers else 0

    def _change(self, call: Call) -> None:
        """Do it. What fails in the same way each time is an answer: a log has to be replayed."""
        try:
            answer = Answer(call.sequence, self._do(call), None)
        except ValueError as error:
            answer = Answer(call.sequence, None, str(error))
        except Exception as error:  # a call that is not as it should be, from another version, say
            if ran_out_of_memory(error):
                raise
            what = f"{call.operation} failed with {type(error).__name__}: {error}"
            answer = Answer(call.sequence, None, what)
        known = self._answers.setdefault(call.client, [])
        known.append(answer)
        del known[:-KEPT_ANSWERS]

    def _do(self, call: Call) -> Any:
        owner: Any = self._pushes if call.operation in OF_WORKERS else self.bank
        do = self.step if call.operation == "step" else getattr(owner, call.operation)
        return do(*call.arguments)

    def optimisers(self) -> Iterator[tuple[str, RowOptimizer]]:
        """Those there are, by name: the class, " of ", and the table."""
        yield from self._optimisers.items()

    def optimiser(self, name: str) -> RowOptimizer:
        """The optimiser of a name, made where there is none."""
        kind, _, table = name.partition(" of ")
        check_known("optimiser", kind, list(OPTIMISERS))
        check_known("table", table, ("keys", "values"))
        if name not in self._optimisers:
            self._optimisers[name] = OPTIMISERS[kind]([getattr(self.bank, table)])
        return self._optimisers[name]

    def load_optimiser(self, name: str, saved: dict[str, Any]) -> None:
        """Give an optimiser its state_dict. Its options say what state it has: they come first."""
        optimiser = self.optimiser(name)
        (group,) = saved["param_groups"]
        options = {key: value for key, value in group.items() if key != "params"}
        optimiser.param_groups[0].update(options)
        optimiser.load_state_dict(saved)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory, which there may be the next time; torch has no class for it."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def gradient_of(table: Tensor, parts: Sequence[RowStep]) -> Tensor:
    """A table's row-sparse gradient, entries in the order of the parts."""
    ids = torch.cat([part.ids for part in parts])
    values = torch.cat([part.gradient for part in parts]).to(table.dtype)
    return torch.sparse_coo_tensor(ids.unsqueeze(0), values, table.shape, check_invariants=False)


def state_of(optimiser: RowOptimizer) -> dict[str, Any]:
    """A state_dict, with strings as keys."""
    saved = optimiser.state_dict()
    return {**saved, "state": {str(key): state for key, state in saved["state"].items()}}


def loadable(saved: dict[str, Any]) -> dict[str, Any]:
    """The state_dict again."""
    return {**saved, "state": {int(key): state for key, state in saved["state"].items()}}
