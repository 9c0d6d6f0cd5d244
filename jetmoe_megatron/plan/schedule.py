"""In which order the stages of a pipeline run their passes: recorded from Megatron's own schedule, on stages that
compute nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn
from torch.distributed import Backend
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.config import transformer_config


@dataclass
class Pass:
    """A micro-batch through a chunk of the model, which is a virtual stage.

    Attributes:
        blocks: the stage waits until the result is sent to its neighbour.
    """

    direction: Literal["forward", "backward"]
    chunk: int
    micro_batch: int
    blocks: bool = False


@dataclass
class Order:
    """Of a stage.

    Attributes:
        reduces: how many passes Megatron runs before it starts to reduce gradients, once for each chunk. Empty if the
            backward pass itself starts that, or if nothing runs beside it.
    """

    passes: list[Pass] = field(default_factory=list)
    reduces: list[int] = field(default_factory=list)


def orders(run: Run, layout: Layout) -> list[Order]:
    """Of each stage of the pipeline. No process group may exist.

    With `overlap_moe_expert_parallel_comm`, Megatron combines a forward with a backward pass, and stages run one more
    forward pass before the first of these. What is returned is the order without that option.
    """
    key = layout.pipeline, layout.virtual_pipeline, layout.micro_batches, run.parallel.overlap_grad_reduce
    if key not in _recorded:
        with patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):  # the schedule sets it for good
            _recorded[key] = [_order(run, layout, stage) for stage in range(layout.pipeline)]
    return _recorded[key]


_recorded: dict[tuple[int, int, int, bool], list[Order]] = {}  # a search asks for the same ones many times


def _order(run: Run, layout: Layout, stage: int) -> Order:
    order, chunks = Order(), layout.virtual_pipeline
    config: Any = transformer_config(run, layout)
    config.overlap_moe_expert_parallel_comm = False
    if run.parallel.overlap_grad_reduce:
        config.grad_sync_func = lambda _: order.reduces.append(len(order.passes))
    stages = [_Stage(config, order, chunk) for chunk in range(chunks)]
    numbers = [iter(range(layout.micro_batches)) for _ in stages]
    with _pipeline(layout.pipeline, stage) as groups, _OnTheCPU():
        get_forward_backward_func(layout.pipeline, chunks if chunks > 1 else None)(
            forward_step_func=_forward_step,
            data_iterator=numbers if chunks > 1 else numbers[0],
            model=stages if chunks > 1 else stages[0],
            num_microbatches=layout.micro_batches,
            seq_length=config.tensor_model_parallel_size,
            micro_batch_size=1,
            p2p_communicator=_Messages(groups.pp, config, order),
            pg_collection=groups,
        )
    return order


@contextlib.contextmanager
def _pipeline(stages: int, stage: int) -> Iterator[ProcessGroupCollection]:
    """This process is a stage. Nothing is ever sent."""
    hook = sys.excepthook  # torch.distributed puts the rank before each line of an error
    torch.distributed.init_process_group(Backend.FAKE, store=FakeStore(), rank=stage, world_size=stages)
    try:
        groups: Any = ProcessGroupCollection()
        groups.pp = torch.distributed.group.WORLD
        groups.tp = groups.cp = groups.dp_cp = torch.distributed.new_group([stage])
        groups.embd = groups.pos_embd = None
        yield groups
    finally:
        torch.distributed.destroy_process_group()
        sys.excepthook = hook


class _Stage(nn.Module):
    """A chunk of a model as the schedules know it."""

    def __init__(self, config: Any, order: Order, chunk: int) -> None:
        super().__init__()
        self.config, self.order, self.chunk = config, order, chunk
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, inputs: list[Tensor | None]) -> None:
        self.input = inputs[0]


def _forward_step(numbers: Iterator[int], stage: _Stage) -> tuple[Tensor, Any]:
    number = next(numbers)
    stage.order.passes.append(Pass("forward", stage.chunk, number))
    given = torch.zeros(1, requires_grad=True) if stage.input is None else stage.input
    return _Noted.apply(given, stage, number), lambda output: (output.sum(), {})


class _Noted(torch.autograd.Function):
    """Notes its backward pass."""

    @staticmethod
    def forward(context: Any, given: Tensor, stage: _Stage, number: int) -> Tensor:
        context.stage, context.number = stage, number
        return given.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        stage = context.stage
        stage.order.passes.append(Pass("backward", stage.chunk, context.number))
        return gradients[0], None, None


class _Messages(P2PCommunicator):
    """Notes for which results a stage waits until they are sent."""

    def __init__(self, group: Any, config: Any, order: Order) -> None:
        super().__init__(group, config)
        self._order = order

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        sent = {"send_next": tensor_send_next, "send_prev": tensor_send_prev}
        for name, direction in (("send_next", "forward"), ("send_prev", "backward")):
            if sent[name] is not None and wait_on_reqs:
                next(one for one in reversed(self._order.passes) if one.direction == direction).blocks = True
        received = [torch.zeros(1, requires_grad=True) if wanted else None for wanted in (recv_prev, recv_next)]
        asked = {**sent, "recv_prev": received[0], "recv_next": received[1]}
        handles = {name: _Handle() for name, tensor in asked.items() if tensor is not None}
        return *received, None if wait_on_reqs else handles


class _Handle:
    def wait(self) -> None:
        pass


class _OnTheCPU(TorchFunctionMode):
    """The schedules count tokens on the GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return function(*args, **({**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))
