"""The loop equals plain matmuls of every token, every backend equals the loop, and which backend a device gets."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS, ExpertBackend
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.model import experts
from jetmoe_megatron.model.experts import loop, open_backend
from jetmoe_megatron.model.experts.choose_backend import choose_backend
from jetmoe_megatron.model.experts.swiglu import swiglu
from jetmoe_megatron.model.permutation import Permutation
from tests.model.experts_oracle import CASES, EXPERTS, TOLERANCE, Layer, check, choices, differences, layer, run
from tests.support import small_run


def token_by_token(layer: Layer, expert_TK: Tensor) -> dict[str, Tensor]:
    """What `run` computes, without sorting anything, in fp64."""
    x, gate, w, v, q = (tensor.detach().double().requires_grad_() for tensor in vars(layer).values())
    tokens, top_k = expert_TK.shape
    position = torch.linspace(0.5, 1.5, tokens * top_k * x.shape[1]).view(tokens, top_k, -1).double()
    sums = []
    for token in range(tokens):
        total = torch.zeros_like(x[0])
        for slot in range(top_k):
            expert = expert_TK[token, slot]
            activated, linear = (w[expert] @ x[token]).chunk(2)
            mlp = v[expert] @ (activated * torch.sigmoid(activated) * linear)
            total = total + gate[token, slot] * (mlp + position[token, slot] * (q[expert] @ x[token]))
        sums.append(total)
    y = torch.stack(sums)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    names = (f"gradient of {name}" for name in vars(layer))
    return {"output": y.detach(), **dict(zip(names, (t.grad for t in (x, gate, w, v, q)), strict=True))}


@pytest.mark.parametrize(("routing", "top_k"), CASES)
def test_loop_equals_each_token_alone(routing: str, top_k: int) -> None:
    inputs, expert_TK = layer(top_k, 20, torch.float32, "cpu"), choices(routing, 20, top_k)
    for name, error in differences(run("loop", inputs, expert_TK), token_by_token(inputs, expert_TK)):
        assert error < TOLERANCE[torch.float32], f"{name}: {error:.1e}"


ON_A_CPU = [name for name, entry in EXPERT_BACKENDS.items() if entry.capability is None and not entry.packages]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", sorted(set(ON_A_CPU) - {"loop"}))
def test_equals_loop(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, "cpu")


@pytest.mark.parametrize("name", ["loop", "torch"])
def test_no_rows_at_all_stay_in_the_graph(name: str) -> None:
    x, w = torch.randn(0, 16, requires_grad=True), torch.randn(5, 24, 16, requires_grad=True)
    y = open_backend(name).linear(x, w, torch.zeros(5, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 24)
    assert w.grad is not None and not w.grad.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(9, 32, dtype=dtype, requires_grad=True)
    g = torch.randn(9, 16, dtype=dtype)
    y = swiglu(x)
    y.backward(g)
    truth = x.detach().double().requires_grad_()
    activated, linear = truth.chunk(2, dim=-1)
    expected = activated / (1 + (-activated).exp()) * linear
    expected.backward(g.double())
    tolerance = 3 * TOLERANCE[dtype]
    assert x.grad is not None
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=tolerance, atol=tolerance)


def test_permutation_counts_every_expert() -> None:
    expert_TK = choices("uneven", 50, 2)
    permutation = Permutation.by_expert(expert_TK, EXPERTS)
    assert permutation.count_E.tolist() == expert_TK.flatten().bincount(minlength=EXPERTS).tolist()
    assert permutation.count_E[-2:].tolist() == [0, 0]
    assert torch.equal(expert_TK.flatten()[permutation.order_N], permutation.expert_N)


def choose(precision: str = "fp32", parallel: dict | None = None, **model: Any) -> str:
    """The backend of a small model, on as many ranks as the layout has."""
    shape = {"num_layers": 1, "hidden_size": 32, "num_kv_heads": 2, "kv_channels": 8, "ffn_hidden_size": 48}
    model = {**shape, "vocab_size": 64, **model}
    tree = small_run(Path("unused"), {"code": "unused", "prose": "unused"}, model=model)
    run = Run.model_validate({**tree, "precision": precision, "parallel": parallel or {}})
    world = math.prod(value for value in (parallel or {}).values() if isinstance(value, int))
    return choose_backend(run, resolve_layout(run, world)).name


def refusal(precision: str = "bf16", parallel: dict | None = None, **model: Any) -> str:
    with pytest.raises(UserError) as error:
        choose(precision, parallel, **model)
    return str(error.value)


def test_auto_without_a_gpu() -> None:
    assert choose() == "torch"
    assert choose(ffn_hidden_size=50) == "loop"
    assert choose(ffn_hidden_size=52) == "torch"
    assert choose("bf16", ffn_hidden_size=52) == "loop"
    assert choose(expert_backend="loop") == "loop"


# The widths of the whole model are even in all of these.
UNEVEN: dict[str, tuple[dict[str, int], dict[str, Any], str | None]] = {
    "MLP": ({"tensor": 2, "expert_tensor": 1}, {"ffn_hidden_size": 36}, None),
    "MLP, split": ({"expert_tensor": 2}, {"ffn_hidden_size": 36}, "ffn_hidden_size / expert_tensor (36 / 2 = 18)"),
    "attention, replicated": ({"tensor": 2}, {"kv_channels": 6}, "num_kv_heads x kv_channels / tensor (12 / 2 = 6)"),
    "attention, split over the MLP's alone": ({"expert_tensor": 2}, {"kv_channels": 6}, None),
    "attention, experts split": ({"expert": 2}, {"kv_channels": 6, "ffn_hidden_size": 36}, None),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_widths_are_those_of_a_rank(case: str) -> None:
    parallel, model, uneven = UNEVEN[case]
    assert choose(parallel=parallel, **model) == ("loop" if uneven else "torch")
    if uneven is None:
        assert choose(parallel=parallel, **model, expert_backend="torch") == "torch"
        return
    expected = f"torch needs widths that are multiples of 4 in fp32; {uneven} is not: use loop"
    assert refusal("fp32", parallel, **model, expert_backend="torch") == f"model.expert_backend: {expected}"


def test_widths_of_sharded_attention_experts() -> None:
    parallel = {"tensor": 2, "expert_tensor": 2, "attention_experts": "sharded"}
    assert "(12 / 2 = 6) is not" in refusal("fp32", parallel, kv_channels=6, expert_backend="torch")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def have(gpu: pytest.MonkeyPatch, *backends: str) -> None:
    """The packages of these alone are there."""
    gpu.setattr(
        "jetmoe_megatron.model.experts.choose_backend._missing", lambda name: None if name in backends else "no"
    )


def test_auto_on_gpus(gpu: pytest.MonkeyPatch) -> None:
    assert choose("bf16") == "torch"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    have(gpu, "torch", "megablocks")
    assert choose("bf16") == "megablocks"
    assert choose("fp32") == "torch"
    have(gpu, "torch", "megablocks", "te")
    assert choose("bf16") == "te"
    assert choose("bf16", {"expert_tensor": 4}) == "loop"  # 12 columns of 48 are left to a rank


@pytest.mark.parametrize(("name", "multiple"), [("torch", 8), ("megablocks", 8), ("te", 8), ("te_fp8", 16)])
def test_widths_on_gpus(gpu: pytest.MonkeyPatch, name: str, multiple: int) -> None:
    have(gpu, *EXPERT_BACKENDS)
    even = {"num_kv_heads": 2, "kv_channels": multiple, "ffn_hidden_size": 2 * multiple, "expert_backend": name}
    both = {"tensor": 2, "expert_tensor": 1}
    assert choose("bf16", both, **even) == choose("bf16", {"expert_tensor": 2}, **even) == name
    assert f"({multiple} / 2 = {multiple // 2}) is not" in refusal(
        "bf16", {"expert_tensor": 2}, **{**even, "ffn_hidden_size": multiple}
    )
    assert f"({multiple} / 2 = {multiple // 2}) is not" in refusal(
        "bf16", both, **{**even, "kv_channels": multiple // 2}
    )


def test_blackwell(gpu: pytest.MonkeyPatch) -> None:
    """Where torch's kernel leaves the gradients of experts without a token as the memory was."""
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert "expert_backend: torch gives experts without a token wrong" in refusal(expert_backend="torch")
    assert choose(expert_backend="torch") == "torch"
    have(gpu, *EXPERT_BACKENDS)
    assert choose("bf16") == "te"
    have(gpu, "torch")
    assert choose("bf16") == "loop"


@pytest.mark.parametrize("name", ["megablocks", "te", "te_fp8"])
def test_a_gpu_backend_is_refused_on_a_cpu(name: str) -> None:
    assert refusal(expert_backend=name).startswith(
        f"model.expert_backend: {name} needs a GPU, and there is none: use auto"
    )


def test_refused_by_name(gpu: pytest.MonkeyPatch) -> None:
    assert refusal(expert_backend="torch", ffn_hidden_size=52) == (
        "model.expert_backend: torch needs widths that are multiples of 8 in bf16; "
        "ffn_hidden_size (52) is not: use loop"
    )
    assert "te needs precision: bf16, not fp32" in refusal("fp32", expert_backend="te")
    gpu.setitem(sys.modules, "transformer_engine.pytorch", None)
    gpu.setitem(sys.modules, "megablocks.ops", None)
    assert "te cannot be imported" in refusal(expert_backend="te")
    assert "install_gpu.sh --te, or use auto" in refusal(expert_backend="te")
    assert "install_gpu.sh --megablocks, or use auto" in refusal(expert_backend="megablocks")
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "te_fp8 needs a GPU of CUDA capability 9.0 or newer" in refusal(expert_backend="te_fp8")


def test_a_backend_is_a_row_and_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="mine"):
        open_backend("mine")
    monkeypatch.setitem(EXPERT_BACKENDS, "mine", ExpertBackend("mine", {"fp32": 1}))
    monkeypatch.setitem(sys.modules, "jetmoe_megatron.model.experts.mine", types.ModuleType("mine"))
    sys.modules["jetmoe_megatron.model.experts.mine"].grouped_linear = loop.grouped_linear  # type: ignore[attr-defined]
    check("mine", torch.float32, "cpu")


@pytest.mark.parametrize("name", EXPERT_BACKENDS)
def test_each_row_has_its_file(name: str) -> None:
    assert (Path(experts.__file__).parent / f"{EXPERT_BACKENDS[name].module}.py").is_file()


def test_auto_says_what_it_took_and_why(data: dict, world_of_one: None, capsys: pytest.CaptureFixture) -> None:
    from tests.model.test_parity import build

    build({"ffn_hidden_size": 50}, data)
    widths = "torch needs widths that are multiples of 4 in fp32; ffn_hidden_size (50) is not"
    assert f"expert matmuls: loop, because {widths}" in capsys.readouterr().out
    build({}, data, backend="loop")
    assert capsys.readouterr().out == ""
