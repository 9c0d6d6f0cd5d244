"""Sees every operation below autograd: answers what needs numbers, and notes what is computed, sent and held."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jetmoe_megatron.plan.fake_world import NOWHERE
from jetmoe_megatron.plan.host_values import HostValues
from jetmoe_megatron.plan.memory import ACTIVATIONS, COMMUNICATION, Ledger
from jetmoe_megatron.plan.parts import LOGITS, MOA, SCORES, Parts
from jetmoe_megatron.plan.shapes import Shapes
from jetmoe_megatron.plan.work import Operation, Wait, Work, flops_of, size_of, transfers

aten = torch.ops.aten
_CPU = torch.device("cpu")
_NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "set_"}


@dataclass(frozen=True)
class _Kind:
    """Of an operation."""

    name: str
    is_transfer: bool
    is_kernel: bool
    makes: bool  # it takes no tensor


class Tracer(TorchDispatchMode):
    now: Tracer | None = None  # that which sees the operations of this process

    def __init__(self, parts: Parts, values: HostValues, ledger: Ledger, causal_half: bool) -> None:
        super().__init__()
        self.parts, self.values, self.ledger, self.work = parts, values, ledger, Work()
        self._without_numbers: Literal["", "floats", "all"] = ""  # of what the program makes on the CPU
        self._causal_half = causal_half
        self._inside = 0  # a fused function
        self._kinds: dict[Any, _Kind] = {}
        self._shapes = Shapes()

    def __enter__(self) -> Tracer:
        Tracer.now = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tracer.now = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = self._kinds.get(function)
        if kind is None:
            kind = self._kinds[function] = _kind(function)
        if kind.is_transfer:
            return self._transfer(function, args)
        if kind.makes and self._is_without_numbers(kind.name, kwargs):
            kwargs = {**kwargs, "device": NOWHERE}
        answer = _ANSWERS.get(function)
        if answer:
            result = answer(self, function, args, kwargs)
        elif kind.is_kernel:
            result = self._shapes.result(function, args, kwargs)
        else:
            result = function(*args, **kwargs)
        self.values.follow(function, args, kwargs, result)
        if kind.is_kernel and not self._inside:
            self._note(kind.name, function, args, result)
        return result

    def _is_without_numbers(self, maker: str, named: dict[str, Any]) -> bool:
        if not self._without_numbers or named.get("device") not in (_CPU, None):
            return False
        dtype = named.get("dtype")
        is_float = maker != "arange" if dtype is None else dtype.is_floating_point
        return is_float or self._without_numbers == "all"

    def as_one_kernel(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """What the function makes on the way is never held."""
        self._inside += 1
        try:
            result = function(*arguments)
        finally:
            self._inside -= 1
        if not self._inside:
            self._note(f"fused {function.__name__.strip('_')}", None, arguments, result)
        return result

    @contextlib.contextmanager
    def on_the_cpu(self, without_numbers: Literal["floats", "all"]) -> Iterator[None]:
        """Within it, tensors that are made on the CPU have no numbers."""
        before = self._without_numbers
        self._without_numbers = before or without_numbers
        try:
            yield
        finally:
            self._without_numbers = before

    def wait(self) -> None:
        """The host waits for the device."""
        place = self.parts.now()
        self.work.host_waits[Wait(place.direction, place.chunk, _place())] += 1

    def _note(self, name: str, function: Any, arguments: Any, result: Any) -> None:
        part, direction, chunk = self.parts.now()
        if part == MOA and (name == "bmm" or name.startswith("_scaled_dot_product")):
            part = SCORES
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        read = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        kind = LOGITS if part == LOGITS else ACTIVATIONS
        for tensor in written:
            if tensor.device == NOWHERE:
                self.ledger.hold(tensor, kind)
        if name in _NO_KERNEL:
            return
        shapes = " ".join("x".join(map(str, tensor.shape)) for tensor in read)
        operation = Operation(part, direction, chunk, name, shapes)
        if operation not in self.work.kernels:
            flops = 0 if function is None else flops_of(function, arguments, result, self._causal_half)
            self.work.flops[operation], self.work.bytes[operation] = flops, size_of(read + written)
        self.work.kernels[operation] += 1

    def _transfer(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        _, direction, chunk = self.parts.now()
        for sent, outputs, inputs in transfers(function, arguments, direction, chunk):
            if len(sent.ranks) > 1:
                self.work.transfers[sent] += 1
            for tensor in outputs:
                if all(tensor is not x for x in inputs):
                    self.ledger.name(tensor, COMMUNICATION, only=ACTIVATIONS)
            self._gathered(outputs, inputs)
        results = [
            FakeWork().boxed() if str(part.type).endswith("Work") else arguments[0] for part in function._schema.returns
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def _gathered(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """All ranks have the same counts."""
        for output, own in zip(outputs, inputs, strict=False):
            value = None if output is own else self.values.of(own)
            if value is not None and output.numel() % max(own.numel(), 1) == 0 and own.numel():
                self.values.put(output, value.flatten().repeat(output.numel() // own.numel()).view(output.shape))


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces torch.compile. What it returns is kept by the program, so it serves the tracer of each call."""

    def call(*arguments: Any) -> Any:
        return Tracer.now.as_one_kernel(function, arguments) if Tracer.now else function(*arguments)

    return call


def _kind(function: Any) -> _Kind:
    schema = function._schema
    namespace, _, name = schema.name.partition("::")
    takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    is_view = function.is_view or name in ("detach", "alias", "_unsafe_view", "is_same_size")
    makes = namespace == "aten" and not takes_tensors
    return _Kind(name, namespace == "c10d", namespace == "aten" and not is_view, makes)


def _place() -> str:
    """The innermost function of the program, not of this package, that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/megatron/core/" in path or ("/jetmoe_megatron/" in path and "/jetmoe_megatron/plan/" not in path):
            return f"{'/'.join(path.split('/')[-2:])}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"


def _number(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    """`.item()`: a number that is not known is 1, which is no NaN and no overflow."""
    value = tracer.values.of(args[0])
    if args[0].device == NOWHERE:
        tracer.wait()
    return args[0].new_ones((), device=_CPU).item() if value is None else value.item()


def _to_copy(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    """To the host: the numbers that are known, or ones."""
    if kwargs.get("device") != _CPU or args[0].device != NOWHERE:
        return function(*args, **kwargs)
    if not kwargs.get("non_blocking"):
        tracer.wait()
    value = tracer.values.of(args[0])
    with torch._C._DisableTorchDispatch():
        return torch.ones(args[0].shape, dtype=args[0].dtype) if value is None else value.clone()


def _copy_(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    if args[0].device == _CPU and args[1].device == NOWHERE:
        tracer.wait()
        return args[0]
    return function(*args, **kwargs)


def _true(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    tracer.wait()
    return True


def _grouped_mm(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    """torch's own rule for tensors without numbers takes bf16 only."""
    a, b = args[:2]
    ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
    shape: tuple[int, ...] = (*a.shape[:-1], b.shape[-1])
    if a.dim() == b.dim() == 2:
        shape = (len(ends), *shape)
    return a.new_empty(shape)


def _masked_select(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    tracer.wait()
    return args[0].new_empty(tracer.values.chosen(args[1]))


def _repeat_interleave(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    rows = kwargs.get("output_size")
    if rows is None:
        tracer.wait()
        repeats = tracer.values.of(args[0])
        if repeats is None:
            raise NotImplementedError(f"repeat_interleave by numbers that are not known, in {_place()}")
        rows = int(repeats.sum())
    return args[0].new_empty(rows, dtype=torch.int64)


def _in_place(tracer: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    """A kernel that only changes what it is given."""
    return None


_ANSWERS: dict[Any, Callable[[Tracer, Any, Any, Any], Any]] = {
    aten._local_scalar_dense.default: _number,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.equal.default: _true,
    aten._grouped_mm.default: _grouped_mm,
    aten.masked_select.default: _masked_select,
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten._fused_adamw_.default: _in_place,
}
