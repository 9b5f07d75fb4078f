"""A pretended CUDA device: computes on the CPU, and counts what a GPU would launch and wait for.

Its tensors hold their values on the CPU, but say that their device is "cuda", so that code takes its path for a GPU.
Every operation on them that a GPU would compute counts as one launch, whatever its number of kernels; views count
nothing. The host waits for a GPU when it reads a value, makes a result whose size depends on values, or copies to the
host or from memory that is not pinned; each of these counts as one wait.

    with pretended_device():
        model = moved(model)
        with counted() as counts:
            model(...)
    print(counts.launches.total(), counts.waits.total())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

DEVICE = torch.device("cuda", 0)

#: Operations that wait for the device, because their result's size or type depends on values.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave",
    "aten::bincount",
    "torchvision::nms",
}
#: Operations that read or change only the description of a tensor, although torch does not call them views.
_WITHOUT_KERNEL = {
    "aten::_local_scalar_dense",
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_same_size",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
}


class Counts:
    """What happened on the device.

    Attributes:
        launches: number of launches, by operation.
        waits: number of waits, by operation.
        dtypes: dtypes of all results.
        bytes_sent: bytes copied from the host to the device.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.dtypes: set[torch.dtype] = set()
        self.bytes_sent = 0


class PretendedTensor(Tensor):
    """A tensor whose device is "cuda", with its values on the CPU."""

    values: Tensor
    counts: Counts | None = None

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendedTensor:
        """Make a tensor on the pretended device from one on the CPU."""
        if values.device.type != "cpu":
            raise RuntimeError(f"a tensor on {values.device} was made past the pretended device")
        if cls.counts is not None:
            cls.counts.dtypes.add(values.dtype)
        # The meta device, because torch would skip copies between two tensors on the CPU.
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device="meta",
            requires_grad=values.requires_grad,
        )
        made.values = values.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The pretended device."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True, as for tensors of a GPU."""
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """False, although the tensor's description is on the meta device."""
        return False

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.values})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        counts = cls.counts
        if name == "aten::_to_copy" and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
            copied = func(*_values(args), **kwargs)
            if target.type == "cpu":
                if counts is not None:
                    counts.launches["copy to the host"] += 1
                    if not kwargs.get("non_blocking"):
                        counts.waits["copy to the host"] += 1
                return copied
            if counts is not None:
                counts.launches[name] += 1
            return PretendedTensor(copied)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if counts is not None:
            _count(counts, func, name, args, kwargs)
        result = func(*_values(args), **_values(kwargs))
        if name == "aten::copy_" and not isinstance(args[0], PretendedTensor):
            return args[0]
        if func._schema.is_mutable and name.endswith("_") and isinstance(args[0], PretendedTensor):
            return args[0]
        return tree_map_only(Tensor, PretendedTensor, result)


def _values(tree: Any) -> Any:
    return tree_map_only(PretendedTensor, lambda tensor: tensor.values, tree)


def _count(counts: Counts, func: Any, name: str, args: Any, kwargs: Any) -> None:
    if name == "aten::copy_":
        to, source = args[0], args[1]
        counts.launches["copy"] += 1
        crosses = isinstance(to, PretendedTensor) != isinstance(source, PretendedTensor)
        is_number = source.dim() == 0 and not isinstance(source, PretendedTensor)
        if crosses and not is_number and not (len(args) > 2 and args[2]):
            counts.waits["copy"] += 1
        return
    if name in _WAITING:
        counts.waits[name] += 1
    number_is_put = (
        name == "aten::index_put_" and args[2].dim() == 0 and not isinstance(args[2], PretendedTensor)
    )
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        # torch puts a number where a mask is True without looking at the mask.
        for index in () if number_is_put else args[1]:
            if isinstance(index, Tensor) and not isinstance(index, PretendedTensor) and index.dim():
                counts.waits["index from the host"] += 1
            elif isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                counts.waits["index by a mask"] += 1
    if name not in _WITHOUT_KERNEL and not func.is_view:
        counts.launches[name] += 1


class _OnPretended(TorchFunctionMode):
    """Redirects calls with a CUDA device, which torch would refuse without a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        counts = PretendedTensor.counts
        if name in ("to", "cuda") and args and isinstance(args[0], Tensor):
            return _moved(name, args, kwargs)
        if name == "tolist" and isinstance(args[0], PretendedTensor):
            if counts is not None:
                counts.launches["copy to the host"] += 1
                counts.waits["tolist"] += 1
            return args[0].values.tolist()
        if name == "__setitem__" and isinstance(args[0], PretendedTensor) and not isinstance(args[2], Tensor):
            # torch keeps the number on the CPU for a GPU, but would put it on the meta device.
            return func(args[0], args[1], torch.tensor(args[2], dtype=args[0].dtype))
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned.pretended_pinned = True
            return pinned
        if name in ("new_tensor", "as_tensor", "tensor"):
            device = kwargs.pop("device", None)
            self_is_pretended = name == "new_tensor" and isinstance(args[0], PretendedTensor)
            if self_is_pretended or (device is not None and torch.device(device).type == "cuda"):
                if name == "new_tensor":
                    kwargs.setdefault("dtype", args[0].dtype)
                data = args[1] if name == "new_tensor" else args[0]
                if isinstance(data, PretendedTensor):
                    return data
                made = torch.tensor(data, **kwargs)
                return sent(made)
            if device is not None:
                kwargs["device"] = device
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            if tree_any(lambda leaf: isinstance(leaf, PretendedTensor), args):
                kwargs.pop("device")  # a factory like another tensor, which has this device
                return func(*args, **kwargs)
            kwargs["device"] = torch.device("cpu")
            made = func(*args, **kwargs)
            if counts is not None and name not in ("empty", "empty_strided"):
                counts.launches[name] += 1
            return PretendedTensor(made)
        return func(*args, **kwargs)


class _Factories(TorchDispatchMode):
    """Makes new tensors, which torch's own code would put on the meta device, on the pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "meta" or PretendedTensor in types:
            return func(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        made = func(*args, **kwargs)
        if PretendedTensor.counts is not None and func._schema.name not in _WITHOUT_KERNEL:
            PretendedTensor.counts.launches[func._schema.name] += 1
        return PretendedTensor(made)


def _moved(name: str, args: Any, kwargs: Any) -> Tensor:
    """`Tensor.to` and `Tensor.cuda`, to and from the pretended device."""
    tensor, *rest = args
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    if name == "cuda":
        device = DEVICE
    options = {}
    positional = list(rest)
    if positional and isinstance(positional[0], Tensor):
        other = positional.pop(0)
        device, dtype = other.device, other.dtype
    elif positional and isinstance(positional[0], (str, torch.device)):
        device = torch.device(positional.pop(0))
    if positional and isinstance(positional[0], torch.dtype):
        dtype = positional.pop(0)
    for key, value in zip(("non_blocking", "copy"), positional, strict=False):
        options[key] = value
    options |= {key: value for key, value in kwargs.items() if value is not None}
    if dtype is not None:
        options["dtype"] = dtype
    if (
        device is None
        or torch.device(device) == tensor.device
        or (torch.device(device).type == "cuda" and isinstance(tensor, PretendedTensor))
    ):
        return Tensor.to(tensor, **options) if options else tensor
    if isinstance(tensor, PretendedTensor):
        return Tensor.to(tensor, device="cpu", **options)
    non_blocking = options.pop("non_blocking", False)
    options.pop("copy", None)
    converted = Tensor.to(tensor, **options) if options else tensor
    pinned = getattr(tensor, "pretended_pinned", False)
    return sent(converted, waits=not (non_blocking and pinned))


def sent(tensor: Tensor, waits: bool = True) -> PretendedTensor:
    """Return a copy on the pretended device; memory that is not pinned costs a wait."""
    counts = PretendedTensor.counts
    if counts is not None:
        counts.launches["copy to the device"] += 1
        counts.bytes_sent += tensor.numel() * tensor.element_size()
        if waits:
            counts.waits["copy to the device"] += 1
    return PretendedTensor(tensor.detach().clone())


def moved(model: nn.Module) -> nn.Module:
    """Move a model's parameters and buffers to the pretended device, in place."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(
                    PretendedTensor(parameter.detach()), requires_grad=parameter.requires_grad
                )
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = PretendedTensor(buffer)
    return model


class _Event:
    """Stands in for `torch.cuda.Event`. The host waits for it unless it has waited for something queued later."""

    def record(self, stream: Any = None) -> None:
        self._waits_before = _waits()

    def synchronize(self) -> None:
        if PretendedTensor.counts is not None and _waits() == self._waits_before:
            PretendedTensor.counts.waits["event"] += 1


def _waits() -> int:
    return 0 if PretendedTensor.counts is None else PretendedTensor.counts.waits.total()


@contextmanager
def pretended_device() -> Iterator[None]:
    """Inside this context, "cuda" is the pretended device."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "Event", _Event))
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda device=None: None))
        stack.enter_context(_OnPretended())
        stack.enter_context(_Factories())
        yield


@contextmanager
def counted() -> Iterator[Counts]:
    """Count launches and waits inside this context."""
    counts = Counts()
    before, PretendedTensor.counts = PretendedTensor.counts, counts
    try:
        yield counts
    finally:
        PretendedTensor.counts = before
