"""Whole sequences as CUDA graphs: one launch forward and one backward, a pair for each shape.

A sequence of many small steps on a GPU waits for the host, which has to launch every kernel. A
graph is recorded once, at the second call of a shape, and replayed from then on.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem.bank.bank import MemoryBank
from sparsemem.checks import check_size
from sparsemem.models.base import MemoryModel
from sparsemem.models.controller import has_global_hooks
from sparsemem.models.precision import is_autocast

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

    def __init__(self, model: MemoryModel, max_graphs: int = 8) -> None:
        super().__init__()
        if not isinstance(model, MemoryModel):
            raise TypeError(f"model is a {type(model).__name__}, expected a MemoryModel")
        self.model = model
        self.max_graphs = check_size("max_graphs", max_graphs)
        self.failure: str | None = None  # why nothing more is captured
        self._forget(())

    @property
    def num_graphs(self) -> int:
        """Shapes that have been captured."""
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
        graph = None if state is not None or not on_gpu(input) else self._graph(input)
        return self.model(input, state) if graph is None else self._replay(graph, input)

    def _graph(self, input: Tensor) -> nn.Module | None:
        """The graph of such inputs, captured if this is their second time; None: run the model."""
        if torch.is_inference_mode_enabled() or not is_capturable(self.model):
            return None
        places = tuple((id(tensor), tensor.data_ptr()) for tensor in tensors_of(self.model))
        if places != self._places:
            self._forget(places)
        if self._in_use():
            return None
        key = key_of(self.model, input)
        if key not in self._graphs:
            if self.failure is not None or len(self._graphs) == self.max_graphs:
                return None
            if key not in self._seen:
                self._seen.add(key)
                return None
            self._capture(key, input)
        return self._graphs.get(key)

    def _forget(self, places: tuple[tuple[int, int], ...]) -> None:
        """Drop graphs of parameters that are elsewhere now."""
        had_graphs = bool(getattr(self, "_graphs", None))
        self._places = places
        self._graphs: dict[Any, nn.Module] = {}
        self._seen: set[Any] = set()
        self._pool: Any = None  # memory that the graphs share: only one is in use at a time
        self._replays = 0
        self._pending: weakref.ref[Any] | None = None  # what will do the last one's backward pass
        if had_graphs:
            gc.collect()  # torch's graphed modules refer to themselves, and hold much memory

    def _in_use(self) -> bool:
        """Whether a replayed sequence waits for its backward pass, which another would spoil."""
        return self._pending is not None and self._pending() is not None

    def _capture(self, key: Any, input: Tensor) -> None:
        self.model._check_input(input)
        sample = input.detach().clone().requires_grad_(input.requires_grad)
        try:
            self._pool = self._pool or graph_pool()
            self._graphs[key] = make_graphed(Sequence(self.model), sample, self._pool)
        except Exception as error:  # whatever the model's parts may raise
            self.failure = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"sequences of shape {tuple(input.shape)} cannot be captured as a CUDA graph, and"
                f" no others will be; they run step by step: {self.failure}",
                RuntimeWarning,
                stacklevel=6,
            )

    def _replay(self, graph: nn.Module, input: Tensor) -> tuple[Tensor, CapturedState]:
        self.model._check_input(input)  # inside the graph nothing looks at values
        output, touched = graph(input)
        self._replays += 1
        if output.grad_fn is not None:
            self._watch(output.grad_fn)
        # The graph's own are overwritten by its next replay.
        return output.clone(), CapturedState(touched.clone())

    def _watch(self, node: Any) -> None:
        """See to it that a backward pass is of the last replay, and its gradients are kept."""
        replay = self._replays
        self._pending = weakref.ref(node)

        def before(gradients: tuple[Tensor | None, ...]) -> None:
            if replay != self._replays:
                raise RuntimeError(
                    "a captured sequence is gone through backward after another was replayed, which"
                    " has overwritten it: call backward once, before the next sequence"
                )

        def after(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
            self._pending = None
            # Or `parameter.grad` would be the graph's own memory, overwritten by the next replay.
            return tuple(None if part is None else part.clone() for part in gradients)

        node.register_prehook(before)
        node.register_hook(after)


class Sequence(nn.Module):
    """What is captured: tensors in, tensors out."""

    def __init__(self, model: MemoryModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and slots touched, of whole sequences."""
        output, state = self.model(input)
        return output, state.touched


def captured(model: MemoryModel, max_graphs: int = 8) -> Captured:
    """A model whose whole sequences run as CUDA graphs: `output, state = captured(model)(input)`.

    The second time that an input of some shape comes without a state, on a GPU, its forward and
    backward passes are captured, and from then on replayed: the same results, without the host's
    time for each kernel. All else runs as `model` does: the CPU, a state that is given, memories
    over a bank, modules with hooks, shapes beyond the first `max_graphs`, a sequence while another
    waits for its backward pass. What cannot be captured is said once, in a warning.

    Each way of running has a graph of its own: shape, dtype, training or not, gradients or not,
    autocast, which parameters are trained. Parameters that are moved or replaced are captured
    anew; other attributes that are changed are not seen. The state that a replay returns knows
    `touched` and cannot be gone on with. Gradients of gradients are not to be had, and only one
    thread may call it.

    Args:
        model: SAM, SDNC, NTM, DNC or any other `MemoryModel`; shared, not copied.
        max_graphs: shapes captured at most. They share the memory for what a pass keeps.
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
        torch.get_float32_matmul_precision(),
        tuple(module.training for module in model.modules()),
        tuple(parameter.requires_grad for parameter in model.parameters()),
    )


def graph_pool() -> Any:
    """Memory for graphs to share."""
    return torch.cuda.graph_pool_handle()


def make_graphed(module: Sequence, sample: Tensor, pool: Any) -> nn.Module:
    """The module as CUDA graphs for inputs like `sample`, which is where they read their input."""
    stream = torch.cuda.current_stream(sample.device)
    try:
        with torch.cuda.device(sample.device), uncached_autocast():
            torch.cuda.make_graphed_callables(module, (sample,), allow_unused_input=True, pool=pool)
            return module  # whose forward is now the graphs'
    except Exception:
        torch.cuda.set_stream(stream)  # a capture that failed leaves its own
        raise


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast as it is, but casting weights anew: casts made outside are not in a graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
