"""How many kernels a device would be handed, seen from what torch dispatches on any device.

`with Launches(monkeypatch, clock) as launches:` names operations that work on numbers, in their
order, and each launch of a kernel of Triton's once; but what is done with the host's clock.
"""

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sparsemem.indexes import device_ranking, device_scan, launching

# Nothing is launched for these.
VIEWS = {"view", "slice", "select", "detach", "t", "transpose", "unsqueeze", "squeeze", "alias"}
MAKING = {"empty", "new_empty", "empty_like", "expand", "split", "as_strided", "_unsafe_view"}
LOOKING = {"_local_scalar_dense"}  # a copy to the host


class Launches(TorchDispatchMode):
    """Names of operations and of kernels."""

    def __init__(self, monkeypatch, clock):
        super().__init__()
        self.names, self.clock = [], clock
        for module in (device_ranking, device_scan):
            monkeypatch.setattr(module, "launch", self.launch)

    def launch(self, program, *given, **constants):
        self.names.append(program.__name__)
        with _disable_current_modes():
            launching.launch(program, *given, **constants)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        on_host = bool(args) and args[0] is self.clock
        if name not in VIEWS | MAKING | LOOKING and not on_host:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
