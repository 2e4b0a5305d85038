"""Whole sequences as CUDA graphs: one launch forward and one backward, a pair for each shape.

A sequence of many small steps on a GPU waits for the host, which has to launch every kernel. A
graph is recorded once, at the second call of a shape, and replayed from then on.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsemem.bank.bank import MemoryBank
from sparsemem.checks import check_size
from sparsemem.models.base import MemoryModel
from sparsemem.models.controller import has_global_hooks
from sparsemem.models.graphs import Graphs, Room, room_on
from sparsemem.models.precision import is_autocast

MAX_GRAPHS = 16
IDLE = 256  # sequences after whose last replay a graph gives way to a shape that has none
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CapturedState:
    """What is left of the state of a replayed sequence: how much of the memory was touched.

    The memory itself is inside the graph, and its next replay overwrites it.
    """

    def __init__(self, touched: Int[Tensor, " B"]) -> None:
        self.touched = touched

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.touched)

    def detach(self) -> CapturedState:
        """The same: nothing of it has a gradient."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"the state of a captured sequence has no {name!r}, only touched: its memory stays"
            " inside a CUDA graph; call the model itself (captured(model).model) for its state"
        )


class Captured(nn.Module):
    """A model that replays whole sequences on a GPU, and else runs as it is; see `captured`."""

    def __init__(self, model: MemoryModel, max_graphs: int = MAX_GRAPHS) -> None:
        super().__init__()
        if not isinstance(model, MemoryModel):
            raise TypeError(f"model is a {type(model).__name__}, expected a MemoryModel")
        self.model = model
        self.max_graphs = check_size("max_graphs", max_graphs)
        self.failure: str | None = None  # why nothing more is captured
        self.replays = 0
        self._asked = 0  # sequences that there could be a graph for
        self._is_told = False  # that there are more shapes than graphs
        self._forget(())

    @property
    def num_graphs(self) -> int:
        """Ways of running that have been captured."""
        return len(self._graphs)

    def forward(
        self, input: Float[Tensor, "B T X"], state: Any = None
    ) -> tuple[Float[Tensor, "B T Y"], Any]:
        """The model's output, and its state, or a `CapturedState` where a graph was replayed."""
        if isinstance(state, CapturedState):
            raise RuntimeError(
                "state is what a captured sequence left, and cannot be gone on with: call the"
                " model itself (captured(model).model) for sequences that come in pieces"
            )
        graphs = None if state is not None or not on_gpu(input) else self._graphs_for(input)
        return self.model(input, state) if graphs is None else self._replay(graphs, input)

    def _graphs_for(self, input: Tensor) -> Graphs | None:
        """The graphs for such inputs, captured at their second time; None: run the model."""
        if torch.is_inference_mode_enabled() or not is_capturable(self.model):
            return None
        places = tuple((id(tensor), tensor.data_ptr()) for tensor in tensors_of(self.model))
        if places != self._places:
            self._forget(places)
        if self._is_in_use():
            return None
        key = key_of(self.model, input)
        self._asked += 1
        if key not in self._graphs:
            if self.failure is not None or key not in self._seen:
                self._seen.add(key)
                return None
            self._capture_if_room(key, input)
        if key in self._graphs:
            self._last[key] = self._asked
        return self._graphs.get(key)

    def _forget(self, places: tuple[tuple[int, int], ...]) -> None:
        """Drop graphs: the parameters are elsewhere now."""
        self._places = places
        self._graphs: dict[Any, Graphs] = {}
        self._last: dict[Any, int] = {}  # of each graph: the sequence that it was last replayed for
        self._seen: set[Any] = set()
        self._room: Room | None = None  # the graphs share it: only one is in use at a time
        self._waiting: weakref.ref[Any] | None = None  # the last replay, until it has gone backward

    def _is_in_use(self) -> bool:
        """Whether a replayed sequence waits for its backward pass, which another would spoil."""
        return self._waiting is not None and self._waiting() is not None

    def _capture_if_room(self, key: Any, input: Tensor) -> None:
        """Capture a shape; where all places are taken, in that of one that does not come any more.

        Shapes that merely take turns do not drive each other out: a capture takes several passes.
        """
        oldest = min(self._last, key=self._last.__getitem__, default=None)
        is_full = len(self._graphs) >= self.max_graphs
        if is_full and self._asked - self._last[oldest] <= IDLE:
            self._tell_of_shapes(input)
            return
        self._capture(key, input)
        if is_full and key in self._graphs:  # only now: the memory is there while a graph has it
            del self._graphs[oldest], self._last[oldest]

    def _tell_of_shapes(self, input: Tensor) -> None:
        if not self._is_told:
            self._is_told = True
            warnings.warn(
                f"sequences come in more shapes than max_graphs = {self.max_graphs}: those of shape"
                f" {tuple(input.shape)}, and others, run step by step",
                RuntimeWarning,
                stacklevel=7,
            )

    def _capture(self, key: Any, input: Tensor) -> None:
        self.model._check_input(input)
        try:
            self._room = self._room or room_on(input.device)
            self._graphs[key] = Graphs(self.model, input, self._room)
        except Exception as error:  # whatever the model's parts may raise
            cause = first_of(error)
            self.failure = f"{type(cause).__name__}: {cause}"
            warnings.warn(
                f"sequences of shape {tuple(input.shape)} cannot be captured as CUDA graphs, and"
                f" no others will be; they run step by step: {self.failure}",
                RuntimeWarning,
                stacklevel=7,
            )

    def _replay(self, graphs: Graphs, input: Tensor) -> tuple[Tensor, CapturedState]:
        self.model._check_input(input)  # inside a graph nothing looks at values
        self.replays += 1
        output, touched = Replay.apply(self, graphs, input, *self.model.parameters())  # type: ignore[no-untyped-call]
        if output.grad_fn is not None:
            self._waiting = weakref.ref(output.grad_fn)
        return output, CapturedState(touched)

    def begin_backward(self, replay: int) -> None:
        """Refuse to go backward through what is no longer there."""
        if replay != self.replays or not self._is_in_use():
            raise RuntimeError(
                "a captured sequence is gone through backward twice, or after another was"
                " replayed, which has overwritten it: call backward once, before the next sequence"
            )
        self._waiting = None


class Replay(torch.autograd.Function):
    """Replays a sequence. What it returns is copied: the graphs' own is overwritten next time."""

    @staticmethod
    def forward(
        ctx: Any, owner: Captured, graphs: Graphs, input: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output, and slots touched."""
        ctx.owner, ctx.graphs, ctx.replay = owner, graphs, owner.replays
        ctx.parameters, ctx.versions = parameters, versions_of(parameters)
        output, touched = (part.clone() for part in graphs.forward(input))
        ctx.mark_non_differentiable(touched)
        return output, touched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        """Gradients of the input and of the parameters, where they are wanted."""
        ctx.owner.begin_backward(ctx.replay)
        if versions_of(ctx.parameters) != ctx.versions:
            raise RuntimeError(
                "parameters were changed in place between a captured sequence and its backward"
                " pass, which reads them where they are: call backward before the optimiser's step"
            )
        found = iter(ctx.graphs.backward(gradient))
        wanted = (next(found) if needed else None for needed in ctx.needs_input_grad[2:])
        return None, None, *(None if part is None else part.clone() for part in wanted)


def captured(model: MemoryModel, max_graphs: int = MAX_GRAPHS) -> Captured:
    """A model whose whole sequences run as CUDA graphs: `output, state = captured(model)(input)`.

    The second time that an input of some shape comes without a state, on a GPU, its forward and
    backward passes are captured, and from then on replayed: the same results, without the host's
    time for each kernel. All else runs as `model` does: the CPU, a state that is given, memories
    over a bank, modules with hooks, shapes beyond `max_graphs` that are in use, a sequence while
    another waits for its backward pass. What cannot be captured is said once, in a warning.

    Each way of running has a graph of its own: shape, dtype, training or not, gradients or not,
    autocast, which parameters are trained. Parameters that are moved or replaced are captured
    anew; other attributes that are changed, and settings of torch, are not seen. The state that a
    replay returns knows `touched` and cannot be gone on with. A sequence is gone through backward
    once, gradients of gradients are not to be had, and only one thread may call it.

    Args:
        model: SAM, SDNC, NTM, DNC or any other `MemoryModel`; shared, not copied.
        max_graphs: shapes captured at most, beyond which one that has not come for 256 sequences
            gives way. They share the memory for what a pass keeps.
    """
    return Captured(model, max_graphs)


def on_gpu(input: Tensor) -> bool:
    """Whether there can be graphs, and none is being captured from outside."""
    return input.is_cuda and not torch.cuda.is_current_stream_capturing()


def is_capturable(model: MemoryModel) -> bool:
    """Whether a model is what its layers do, and nothing beside them that a graph leaves out."""
    return not has_global_hooks() and not any(
        isinstance(module, MemoryBank)
        or "forward" in vars(module)
        or any(getattr(module, name) for name in HOOKS)
        for module in model.modules()
    )


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers: what a graph reads where it was when it was captured."""
    yield from model.parameters()
    yield from model.buffers()


def key_of(model: nn.Module, input: Tensor) -> tuple[Any, ...]:
    """What has to be as it was for a graph to be what the model would do."""
    return (
        tuple(input.shape),
        input.dtype,
        input.requires_grad,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(input.device.type) if is_autocast(input) else None,
        tuple(module.training for module in model.modules()),
        tuple(parameter.requires_grad for parameter in model.parameters()),
    )


def first_of(error: BaseException) -> BaseException:
    """What came first: ending a capture that something else had broken raises, too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def versions_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """How often each was changed in place."""
    return tuple(tensor._version for tensor in tensors)
