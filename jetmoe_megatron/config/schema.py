"""What a run file may say. Every field is typed and range-checked; unknown keys are refused.

The text below a class or a key is its description: `jetmoe config reference` makes the tables of docs/configuration.md
of it, `jetmoe config schema` what an editor shows. "The paper" is arXiv 2404.07413, section 4.2. A default that names
no source is our choice, and the paper is silent about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
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


class _Also:
    """What else a run file may have there, as a JSON schema. It has become a value of the type when that is checked."""

    def __init__(self, **schema: Any) -> None:
        self.schema = schema

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(core), self.schema]}


_FILE_NAME = _Also(title="file name", type="string", minLength=1)  # relative to the run file: `load.py` reads it
MOST = 2**53  # of anything: a larger number is a typing error, and not exact as a float
# The range stands before the validator: after it pydantic leaves the range out of the JSON schema.
Count = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1, le=MOST), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Precision = Literal["bf16", "fp32"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """Shape of the model. Attention has `num_kv_heads` heads per attention expert, `top_k` times as many per token."""

    num_layers: Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_whole)]
    """Layers, each with attention and an MLP."""
    hidden_size: Positive
    """Width of the vector that passes from layer to layer."""
    num_kv_heads: Positive
    """Key-value heads of a layer, which its attention experts share."""
    kv_channels: Positive
    """Channels of a head; even, because rotary embeddings rotate pairs of channels."""
    ffn_hidden_size: Positive
    """Inner width of an MLP expert."""
    num_experts: Positive = 8
    """Experts of each layer's attention, and of its MLP. The default is the paper's."""
    top_k: Positive = 2
    """Experts of each kind that a token passes through; at most `num_experts`. The default is the paper's."""
    vocab_size: Positive
    """Rows of the embedding: at least as many as the tokenizer has tokens."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary embedding. The default is the released config's."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the final norm (`rms_norm_eps` of the Hugging Face config). The default is the released config's.
    The released code builds the norms inside the layers with 1e-6 whatever its config says, so these cannot be
    chosen."""
    init_std: float = Field(0.01, gt=0)
    """Standard deviation of the initial weights. The default is the released config's `initializer_range`."""
    expert_backend: Annotated[str, _OneOf(["auto", *EXPERT_BACKENDS])] = "auto"
    """How the matmuls of the experts are computed. `auto` chooses one that the device, the precision and the widths
    allow."""


class Losses(Section):
    """Coefficients of the auxiliary losses, applied to their sum over all routers."""

    balance: float = Field(0.01, ge=0)
    """Coefficient of the load-balancing loss. The default is the paper's."""
    z: float = Field(0.001, ge=0)
    """Coefficient of the z-loss, which keeps the routers' logits small. The default is the paper's."""
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    """Tokens over which the balance loss counts assignments. The reference implementation counts within a
    micro-batch. The count over the global batch does not depend on how the batch is split, and costs one more forward
    pass per step."""


class Parallel(Section):
    """How the ranks divide the work. The ranks that these sizes leave over are data parallel."""

    tensor: Positive = 1
    """Ranks that divide the matrices of each layer (tensor parallelism)."""
    sequence: bool | Literal["auto"] = "auto"
    """Tensor-parallel ranks divide the sequence too. `auto`: true if `tensor` is above 1, where Megatron's MoE layers
    need it."""
    pipeline: Positive = 1
    """Stages, each with some of the layers (pipeline parallelism)."""
    virtual_pipeline: Positive = 1
    """Virtual stages of each rank; more than 1 needs `pipeline` above 1."""
    expert: Positive = 1
    """Ranks that divide the MLP experts (expert parallelism)."""
    expert_tensor: Positive = 1
    """Ranks that divide the matrices of each MLP expert."""
    context: Positive = 1
    """Ranks that divide each sequence (context parallelism); more than 1 needs Transformer Engine."""
    layers_per_stage: list[Positive] | None = None
    """Layers of each stage in pipeline order, virtual stages too. null: all stages have the same number."""
    attention_experts: Literal["replicated", "sharded"] = "replicated"
    """Whether each expert-parallel rank has all attention experts, or they are divided like the MLP experts. `sharded`
    needs `expert_tensor` equal to `tensor`."""
    distributed_optimizer: bool = True
    """Each data-parallel rank keeps and updates its share of the optimizer state."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather weights during the next forward pass; needs `distributed_optimizer` and `overlap_grad_reduce`."""
    overlap_moe_expert_parallel_comm: bool = False
    """Exchange the MLP's rows of one micro-batch while another micro-batch computes; needs `expert` above 1 and
    bf16."""
    moe_token_dispatcher: Literal["alltoall", "deepep", "hybridep", "ncclep"] = "alltoall"
    """What exchanges the MLP's rows among expert-parallel ranks: NCCL's all-to-all, or Megatron's flexible dispatcher
    with one of three libraries, which need GPUs, `expert` above 1 and bf16; `ncclep` needs Megatron-Core 0.19."""
    delay_wgrad_compute: bool = False
    """Compute the gradients of the experts' weights while rows are exchanged; needs
    `overlap_moe_expert_parallel_comm`."""
    overlap_dispatch_backward_with_experts_wgrad: bool = False
    """The same for the MLP's experts without another micro-batch beside it; needs `expert` above 1, Megatron-Core 0.19
    and Transformer Engine, and does not go with `overlap_moe_expert_parallel_comm`."""
    high_priority_a2a_comm_stream: bool = False
    """The exchange comes before matmuls on the GPU; needs `overlap_moe_expert_parallel_comm` and Megatron-Core 0.19."""
    start_timeout_minutes: float = Field(30.0, gt=0, le=1e6)
    """Minutes that a rank waits for another rank up to the end of the first step, and in a rollback."""
    timeout_minutes: float = Field(5.0, gt=0, le=1e6)
    """Minutes that a rank waits for another rank after the first step, and for all to answer before anything is
    built."""


class Batch(Section):
    """What a training step reads."""

    sequence_length: Positive = 4096
    """Tokens of a sequence. The default is the paper's."""
    global_tokens: Positive
    """Tokens of a step, over all ranks; a multiple of `sequence_length`. The paper has 4 million."""
    micro_sequences: Positive = 1
    """Sequences of a rank in one forward pass."""


class Optimizer(Section):
    """AdamW. Weight decay spares norms and biases."""

    max_lr: float = Field(5e-4, gt=0)
    """Learning rate after the warm-up. The default is the paper's."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]
    """Decay of the first and of the second moment per step. The paper is silent; the default is a common choice."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment. The paper is silent; the default is a common choice."""
    weight_decay: float = Field(0.1, ge=0)
    """A step multiplies each weight by 1 - learning rate * `weight_decay`. The default is the paper's."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest norm of the gradient; a longer one is scaled down to it. 0: no clipping. The default is the paper's."""


class Schedule(Section):
    """How the learning rate follows the number of tokens trained on. The shape of each phase stands in `phases`."""

    warmup_tokens: Count = 0
    """Tokens over which the learning rate rises to `optimizer.max_lr`, within the constant phases that the run begins
    with. 0: no warm-up. The paper has 10 billion."""
    initial_lr_ratio: Fraction = 0.1
    """Learning rate at the start of the warm-up, divided by `optimizer.max_lr`. The default is the paper's."""
    final_lr_ratio: Fraction = 0.1
    """Learning rate at the end of an exponential phase, divided by that at its start. The default is the paper's."""


class Guard(Section):
    """A step is bad if the loss or the gradient norm is NaN or infinite, or is a spike (`training/loss_guard.py`)."""

    on_bad_step: Literal["stop", "skip", "rollback"] = "skip"
    """`skip`: leave the weights as they are and continue. `rollback`: continue from the newest checkpoint with the
    data after the bad step. `stop`: end the run with exit status 3."""
    spike_factor: float = Field(10.0, ge=0)
    """A spike is more than this many robust standard deviations above the median of the window. 0: nothing is a
    spike."""
    window: Annotated[int, Field(ge=8)] = 128
    """Good steps that a spike is measured against, and steps among which `budget` counts."""
    budget: Count = 10
    """Bad steps allowed among `window` steps; one more stops the run."""


class Checkpoint(Section):
    """When a run saves, and which checkpoints stay. Each phase ends with a checkpoint, which stays."""

    every_tokens: Count = 0
    """Tokens between two checkpoints. 0: only at the end of each phase and on a signal."""
    keep_last: Positive = 3
    """How many of the newest checkpoints stay, besides those that always stay."""
    keep_every_tokens: Count = 0
    """Checkpoints at multiples of this number of tokens always stay; a multiple of `every_tokens`. 0: none do."""
    asynchronous: bool = True
    """Write beside the training."""
    export_every_tokens: Count = 0
    """Convert the first checkpoint past each multiple of this number of tokens to Hugging Face's format. 0: never."""
    may_change: list[str] = []
    """Keys in which the run may differ from the checkpoint that it resumes: `optimizer.max_lr`, `schedule`, ..."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: continue from the newest whole checkpoint in `output_dir`. `never`: refuse to start if there is one."""


class Logging(Section):
    """What is shown while a run trains. `metrics.jsonl` has every step, whatever is set here."""

    every_steps: Positive = 10
    """Steps between two progress lines."""
    router_every_steps: Count = 20
    """Steps between two lines of `routers.jsonl`, with the load of each expert, and between two norms by part of the
    model. 0: neither."""
    report_every_steps: Count = 0
    """Steps between two writings of `report.html`, beside the training. 0: only at its end."""
    dollars_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of a rank's hour, for `dollars` in the metrics. null: not counted."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off_on), _Also(type="boolean")] = "off"
    """Send metrics to Weights & Biases, or keep them on disk for a later upload (`offline`). `on` means `online`."""
    wandb_project: str = "jetmoe-megatron"
    """Project at Weights & Biases."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too."""
    mlflow: bool = False
    """Send metrics to the MLflow server of `MLFLOW_TRACKING_URI`, or without that write them to `logs/mlflow` of the
    run folder."""
    mlflow_experiment: str = Field("jetmoe-megatron", min_length=1)
    """Experiment at MLflow."""


class Alarms(Section):
    """Beyond which limits a run says that something is wrong. It continues ([monitoring.md](monitoring.md))."""

    dead_experts: bool = True
    """An expert had no token in `logging.router_every_steps` steps."""
    load: Annotated[float, Field(gt=1)] | None = 3.0
    """How many times an even share of the assignments one expert takes. null: no alarm."""
    gate_entropy: Fraction | None = 0.05
    """Entropy of a router's probabilities, over its largest value, below which it is collapsing. null: no alarm."""
    z_loss: Annotated[float, Field(gt=1)] | None = 3.0
    """How many times its lowest value so far the z-loss may be, as means over 50 steps. null: no alarm."""
    data_wait: Fraction | None = 0.05
    """Share of the time of 50 steps in which ranks wait for data. null: no alarm."""
    slow_rank: Annotated[float, Field(gt=1)] | None = 1.1
    """How many times the median time of all ranks one rank may take, where no rank waits for another, as the mean of 50
    steps in most of which it is the slowest. null: no alarm."""
    memory: Fraction | None = 0.02
    """Share of a rank's memory, of its host or its GPU, by which it grows in 1,000 steps. null: no alarm."""
    held_out_loss: bool = True
    """The held-out loss rises twice while the training loss falls twice."""


class Profile(Section):
    """Traces of some steps, with the time of each part of the model ([profiling.md](profiling.md))."""

    steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step that are recorded. null: none."""
    ranks: Annotated[list[Count], Field(min_length=1)] = [0]
    """Ranks that record."""


class Debug(Section):
    """For short trials and for the search of faults."""

    max_steps: Positive | None = None
    """Step after which the run stops, with the schedule unchanged. null: the last one."""
    check_sync: Count = 0
    """Compare replicated weights across ranks every so many steps. 0: never."""


class HeldOut(Section):
    """A data set that the run does not train on."""

    name: str = Field(min_length=1)
    """Name of its loss in the metrics."""
    path: str = Field(min_length=1)
    """Prefix of a Megatron `.bin`/`.idx` pair."""


class Evaluation(Section):
    """Held-out loss, every `every_steps` and at the end."""

    every_steps: Count = 0
    """Steps between two measurements. 0: only at the end."""
    sequences: Positive = 64
    """Sequences of each data set that are measured."""
    data: list[HeldOut] = []
    """Data sets to measure on. Without any nothing is measured."""


class Dataset(Section):
    """A data set in the mixture of a phase."""

    name: str = Field(min_length=1)
    """A name means the same data set in all phases."""
    path: str = Field(min_length=1)
    """Prefix of a Megatron `.bin`/`.idx` pair."""
    weight: float = Field(ge=0)
    """Its share of the phase's tokens, divided by the sum of all weights. 0 leaves the data set out."""


class Phase(Section):
    """A stretch of training with its own tokens, learning-rate shape and data mixture."""

    name: str = Field(min_length=1)
    """Name of the phase; no two phases share one."""
    tokens: Positive
    """Length in tokens, rounded up to whole steps."""
    learning_rate: Annotated[str, _OneOf(LEARNING_RATES)]
    """Shape of the learning rate. `constant`: it stays. `exponential`: it falls to `schedule.final_lr_ratio` of what
    it was."""
    data: list[Dataset] = Field(min_length=1)
    """The mixture."""

    @property
    def shares(self) -> dict[str, float]:
        """The mixture's weights, normalised to a sum of 1."""
        total = sum(dataset.weight for dataset in self.data)
        return {dataset.name: dataset.weight / total for dataset in self.data}


class Data(Section):
    """How training sequences are made of the data sets; the mixture itself stands in the phases."""

    cache: str | None = None
    """Folder of the sample indices. null: `data_index` in `output_dir`."""
    build_limit_tokens: Positive = 20_000_000_000
    """Training builds missing indices of at most this many tokens, and refuses to start if more are missing."""
    warn_epochs: float = Field(4.0, gt=0)
    """A data set that is read for more epochs than this gets a warning."""
    new_blend: bool = False
    """Continue from a checkpoint with other data or weights, which is refused otherwise."""
    reset_positions: bool = False
    """Rotary positions start at 0 in each document; needs `tokenizer`. Whether documents that share a sequence were
    kept apart, by this or the next two keys, the paper does not say."""
    mask_attention: bool = False
    """No attention across documents; needs `tokenizer`."""
    mask_loss: bool = False
    """No loss on predicting the first token of the next document; needs `tokenizer`."""

    @property
    def keeps_documents_apart(self) -> bool:
        return self.reset_positions or self.mask_attention or self.mask_loss


class Run(Section):
    """A whole training run, its phases in order."""

    name: str = Field(min_length=1)
    """Name of the run in what is printed and at Weights & Biases."""
    output_dir: str = Field(min_length=1)
    """Folder of the run: its metrics, checkpoints and exports."""
    seed: Count = 1234
    """Chooses the initial weights and the order of the data."""
    model: Annotated[Model, _FILE_NAME]
    losses: Losses = Losses()
    parallel: Parallel = Parallel()
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What the ranks compute on. `auto`: GPUs if torch sees any; refused if the environment promises GPUs and torch
    sees none. `cuda`: refused if torch sees no GPU. `cpu`: also on a machine with GPUs."""
    precision: Precision = "bf16"
    """Precision of the forward and backward pass. The default is that of the released checkpoint."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again to save memory. `selective`: the experts' SwiGLU. `full`: whole layers."""
    batch: Batch
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    start_from: str | None = None
    """A checkpoint of another run, or of a Hugging Face model, to begin at. null: begin with new weights."""
    phase: int | None = None
    """With `start_from`: the number of the phase, from 2, that begins there; the phase before ends there. null: the
    run continues in the phase of the checkpoint."""
    tokenizer: str | None = None
    """Folder with a Hugging Face tokenizer. Its size is compared with `model.vocab_size`, and exports contain it.
    null: neither happens."""
    data: Data = Data()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    alarms: Alarms = Alarms()
    profile: Profile = Profile()
    debug: Debug = Debug()
    phases: list[Annotated[Phase, _FILE_NAME]] = Field(min_length=1)
    """The phases in order."""
