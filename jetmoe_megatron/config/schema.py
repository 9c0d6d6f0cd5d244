"""What a run file may say. Every field is typed and range-checked; unknown keys are refused.

Defaults of the optimizer and the losses are JetMoE's published recipe (arXiv 2404.07413, section 4.2), and marked where
it is silent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import CoreSchema, core_schema

from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS
from jetmoe_megatron.config.learning_rate_shapes import LEARNING_RATES


def _whole(value: Any) -> Any:
    """`4e9` is how people write token counts, and it is a float to YAML."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off_on(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` or `on` as a boolean."""
    return {False: "off", True: "online"}.get(value, value) if isinstance(value, bool) else value


class _OneOf:
    """A Literal of names that stand in a table."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(self.names)


_MOST = 2**53  # of anything: a larger number is a typing error, and not exact as a float
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=_MOST)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=_MOST)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """Shape of the model. Attention has `num_kv_heads` heads per attention expert, `top_k` times as many per token."""

    num_layers: Annotated[Positive, Field(le=10_000)]
    hidden_size: Positive
    num_kv_heads: Positive
    kv_channels: Positive
    ffn_hidden_size: Positive
    num_experts: Positive = 8
    top_k: Positive = 2
    vocab_size: Positive
    rope_theta: float = Field(10000.0, gt=0)
    # The released code builds the norms inside the layers with eps 1e-6 whatever its config says, so only the final
    # norm's can be chosen (`rms_norm_eps` of the Hugging Face config).
    norm_eps: float = Field(1e-5, gt=0)
    init_std: float = Field(0.01, gt=0)  # `initializer_range` of the released config
    expert_backend: Annotated[str, _OneOf(["auto", *EXPERT_BACKENDS])] = "auto"


class Losses(Section):
    """Coefficients of the auxiliary losses, applied to their sum over all routers."""

    balance: float = Field(0.01, ge=0)
    z: float = Field(0.001, ge=0)
    # Over which tokens the balance loss counts assignments. The reference counts within a micro-batch; the global batch
    # does not depend on how it is split, and costs a forward pass more.
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"


class Parallel(Section):
    tensor: Positive = 1
    sequence: bool | Literal["auto"] = "auto"  # auto: on when tensor > 1
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    expert: Positive = 1
    expert_tensor: Positive = 1
    context: Positive = 1
    layers_per_stage: list[Positive] | None = None  # in pipeline order, virtual stages too; default: evenly
    attention_experts: Literal["replicated", "sharded"] = "replicated"  # over the expert-parallel ranks
    distributed_optimizer: bool = True  # each data-parallel rank keeps and updates its share of the optimizer state
    overlap_grad_reduce: bool = False  # with the backward pass
    overlap_param_gather: bool = False  # with the next forward pass
    overlap_moe_expert_parallel_comm: bool = False  # the exchange of the MLP's rows, with another micro-batch
    timeout_minutes: float = Field(30.0, gt=0, le=1e6)  # ranks that have waited so long for another one give up


class Batch(Section):
    sequence_length: Positive = 4096
    global_tokens: Positive  # per step, over all ranks
    micro_sequences: Positive = 1  # per rank and forward pass


class Optimizer(Section):
    """AdamW. Weight decay spares norms and biases. The paper does not give betas and eps: common choices here."""

    max_lr: float = Field(5e-4, gt=0)
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, ge=0)  # 0: no clipping


class Schedule(Section):
    warmup_tokens: Count = 0
    initial_lr_ratio: Fraction = 0.1
    final_lr_ratio: Fraction = 0.1


class Guard(Section):
    """A step is bad if the loss or the gradient norm is NaN or infinite, or is a spike (`training/loss_guard.py`)."""

    on_bad_step: Literal["stop", "skip", "rollback"] = "skip"
    spike_factor: float = Field(10.0, ge=0)  # robust standard deviations above the median of the window; 0: no test
    window: Annotated[int, Field(ge=8)] = 128  # steps that a spike is measured against, and that the budget counts in
    budget: Count = 10  # bad steps among `window` steps; one more stops the run


class Checkpoint(Section):
    every_tokens: Count = 0  # 0: only at the end of each phase and on a signal
    keep_last: Positive = 3  # besides those at the end of a phase, which stay
    keep_every_tokens: Count = 0  # a multiple of every_tokens: those at its multiples stay too
    asynchronous: bool = True  # write in a process beside the training
    export_every_tokens: Count = 0  # convert the first one past each multiple to Hugging Face's format; 0: never
    may_change: list[str] = []  # keys that may differ from the checkpoint's run: `optimizer.max_lr`, `schedule`, ...
    resume: Literal["auto", "never"] = "auto"


class Logging(Section):
    every_steps: Positive = 10  # of the progress line; metrics.jsonl has every step
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off_on)] = "off"
    wandb_project: str = "jetmoe-megatron"
    tensorboard: bool = False


class Debug(Section):
    max_steps: Positive | None = None  # stop the run early, the schedule unchanged
    check_sync: Count = 0  # every N steps, compare replicated weights across ranks; 0: never


class HeldOut(Section):
    name: str = Field(min_length=1)
    path: str = Field(min_length=1)


class Evaluation(Section):
    """Held-out loss, every `every_steps` and at the end."""

    every_steps: Count = 0  # 0: only at the end
    sequences: Positive = 64  # of each data set
    data: list[HeldOut] = []


class Dataset(Section):
    name: str = Field(min_length=1)
    path: str = Field(min_length=1)  # prefix of a Megatron .bin/.idx pair
    weight: float = Field(ge=0)


class Phase(Section):
    """A stretch of training with its own tokens, learning-rate shape and data mixture."""

    name: str = Field(min_length=1)
    tokens: Positive
    learning_rate: Annotated[str, _OneOf(LEARNING_RATES)]
    data: list[Dataset] = Field(min_length=1)

    @property
    def shares(self) -> dict[str, float]:
        """The mixture's weights, normalised to a sum of 1."""
        total = sum(dataset.weight for dataset in self.data)
        return {dataset.name: dataset.weight / total for dataset in self.data}


class Data(Section):
    """How training sequences are made of the data sets; the mixture itself stands in the phases."""

    cache: str | None = None  # folder of the sample indices; default: `<output_dir>/data_index`
    build_limit_tokens: Positive = 20_000_000_000  # training itself builds no more indices than of so many tokens
    warn_epochs: float = Field(4.0, gt=0)  # a data set that is read more often gets a warning
    new_blend: bool = False  # go on from a checkpoint with other data or weights, which is refused otherwise
    # The paper does not say whether documents that share a sequence were kept apart. All three need `tokenizer`.
    reset_positions: bool = False  # rotary positions start again at each document
    mask_attention: bool = False  # no attention across documents
    mask_loss: bool = False  # no loss on predicting the next document's first token

    @property
    def keeps_documents_apart(self) -> bool:
        return self.reset_positions or self.mask_attention or self.mask_loss


class Run(Section):
    """A whole training run, its phases in order."""

    name: str = Field(min_length=1)
    output_dir: str = Field(min_length=1)
    seed: Count = 1234
    model: Model
    losses: Losses = Losses()
    parallel: Parallel = Parallel()
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"  # selective: the experts' SwiGLU; full: whole layers
    batch: Batch
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    start_from: str | None = None  # a checkpoint of another run, or of a Hugging Face model, to begin at
    phase: int | None = None  # with start_from: the number of the phase that begins there, the one before ends
    tokenizer: str | None = None  # a folder with a Hugging Face tokenizer: its size is checked, exports carry it
    data: Data = Data()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    debug: Debug = Debug()
    phases: list[Phase] = Field(min_length=1)
