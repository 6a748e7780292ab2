"""Where the host would have to wait for a GPU, counted with or without one.

With a GPU torch says so itself (`torch.cuda.set_sync_debug_mode`). Without one every operation is looked at on its way
to the device, and those are noted that could not go on without reading a value back: `.item()` and its like, results
whose shape depends on values (boolean indices, `nonzero`, `unique`), and blocking copies between devices. Over fake
CUDA tensors (`FakeTensorMode`) that also finds the copies, which real CPU tensors cannot show; there operations that
need a value raise right after they were noted.

Cost: a Python call for each operation, so nothing is timed under it. What it cannot see: waits inside an operation that
does not read a value (allocation, a library's workspace), and code that goes round torch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_A_VALUE = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "_unique", "_unique2", "allclose",
}  # fmt: skip
READS_ALL_VALUES = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""Of a CPU tensor no operation is called for these, so they are caught as calls."""


@dataclass
class Waits:
    """What was noted of a piece of work.

    Attributes:
        places: the operation of each wait, or torch's own message with file and line.
        num_operations: those that compute something, views and allocations left out. Zero on a GPU, where the profiler
            counts kernels.
    """

    places: list[str] = field(default_factory=list)
    num_operations: int = 0


@contextlib.contextmanager
def noted_waits(device: torch.device) -> Iterator[Waits]:
    """Note the waits of the body, whose tensors are on `device`."""
    waits = Waits()
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.synchronize(device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode(before)
        told = (warning for warning in caught if "synchronizing CUDA operation" in str(warning.message))
        waits.places += [f"{warning.filename}:{warning.lineno}" for warning in told]
    else:
        with _Operations(waits), _Calls(waits):
            yield waits


class _Operations(TorchDispatchMode):
    """Looks at every operation that reaches a device."""

    def __init__(self, waits: Waits) -> None:
        TorchDispatchMode.__init__(self)
        self.waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.waits.places.append(str(func))
        self.waits.num_operations += _computes(func)
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Looks at calls that read a whole CPU tensor without an operation."""

    def __init__(self, waits: Waits) -> None:
        TorchFunctionMode.__init__(self)
        self.waits = waits

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in READS_ALL_VALUES and args[0].device.type == "cpu":
            self.waits.places.append(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name in READS_A_VALUE:
        return True
    if name == "repeat_interleave":
        return func._overloadname == "Tensor" and kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]
        return bool(masks) or _meets_other_device(args)
    if name == "_to_copy":
        target = kwargs.get("device") or args[0].device
        return target.type != args[0].device.type and not kwargs.get("non_blocking", False)
    if name == "copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return args[0].device.type != args[1].device.type and blocking
    return False


def _meets_other_device(args: tuple[Any, ...]) -> bool:
    """An index on the host for values on the device is copied first."""
    return len({leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.ndim}) > 1


def _computes(func: Any) -> bool:
    schema = func._schema
    if schema.name.startswith(("prim::", "aten::empty", "aten::new_empty", "aten::lift")):
        return False
    return not any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
