"""The loop against plain matmuls of every token, every backend against the loop, and which backend a device gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jetmoe_megatron.config import Model
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.model.experts import open_backend
from jetmoe_megatron.model.experts.choose import choose_backend
from jetmoe_megatron.model.experts.swiglu import swiglu
from jetmoe_megatron.model.permutation import Permutation
from tests.model.experts_oracle import CASES, EXPERTS, TOLERANCE, Layer, check, choices, differences, layer, run


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


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch_equals_loop(dtype: torch.dtype) -> None:
    check("torch", dtype, "cpu")


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
    tolerance = {"rtol": 3 * TOLERANCE[dtype], "atol": 3 * TOLERANCE[dtype]}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), truth.grad, **tolerance)


def test_permutation_counts_every_expert() -> None:
    expert_TK = choices("uneven", 50, 2)
    permutation = Permutation.by_expert(expert_TK, EXPERTS)
    assert permutation.count_E.tolist() == expert_TK.flatten().bincount(minlength=EXPERTS).tolist()
    assert permutation.count_E[-2:].tolist() == [0, 0]
    assert torch.equal(expert_TK.flatten()[permutation.order_N], permutation.expert_N)


def shape(**changes: object) -> Model:
    tree = dict(num_layers=1, hidden_size=32, num_kv_heads=2, kv_channels=8, ffn_hidden_size=48, vocab_size=64)
    return Model.model_validate({**tree, **changes})


def test_auto_without_a_gpu() -> None:
    assert choose_backend(shape(), "fp32").name == "torch"
    assert choose_backend(shape(ffn_hidden_size=50), "fp32").name == "loop"
    assert choose_backend(shape(ffn_hidden_size=52), "fp32").name == "torch"
    assert choose_backend(shape(ffn_hidden_size=52), "bf16").name == "loop"
    assert choose_backend(shape(expert_backend="loop"), "fp32").name == "loop"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_auto_on_gpus(gpu: pytest.MonkeyPatch) -> None:
    assert choose_backend(shape(), "bf16").name == "torch"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu.setattr("jetmoe_megatron.model.experts.choose._missing", lambda name: None if name == "megablocks" else "no")
    assert choose_backend(shape(), "bf16").name == "megablocks"
    assert choose_backend(shape(), "fp32").name == "torch"
    gpu.setattr("jetmoe_megatron.model.experts.choose._missing", lambda name: None)
    assert choose_backend(shape(), "bf16").name == "te"


def test_blackwell(gpu: pytest.MonkeyPatch) -> None:
    """Where torch's kernel leaves the gradients of experts without a token as the memory was."""
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    with pytest.raises(UserError, match="expert_backend: torch gives experts without a token wrong gradients"):
        choose_backend(shape(expert_backend="torch"), "bf16")
    assert choose_backend(shape(expert_backend="torch"), "fp32").name == "torch"
    for missing, name in ((lambda name: None, "te"), (lambda name: "no", "loop")):
        gpu.setattr("jetmoe_megatron.model.experts.choose._missing", missing)
        assert choose_backend(shape(), "bf16").name == name


@pytest.mark.parametrize("name", ["megablocks", "te", "te_fp8"])
def test_a_gpu_backend_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(UserError, match=f"^model.expert_backend: {name} needs a GPU, and there is none: use auto"):
        choose_backend(shape(expert_backend=name), "bf16")


def test_refused_by_name(gpu: pytest.MonkeyPatch) -> None:
    def refusal(precision: str = "bf16", **changes: object) -> str:
        with pytest.raises(UserError) as error:
            choose_backend(shape(**changes), precision)
        return str(error.value)

    assert refusal(expert_backend="torch", ffn_hidden_size=52) == (
        "model.expert_backend: torch needs widths that are multiples of 8 in bf16; "
        "ffn_hidden_size (52) is not: use loop"
    )
    assert "te needs precision: bf16, not fp32" in refusal("fp32", expert_backend="te")
    gpu.setitem(__import__("sys").modules, "transformer_engine.pytorch", None)
    gpu.setitem(__import__("sys").modules, "megablocks.ops", None)
    assert "te cannot be imported" in refusal(expert_backend="te")
    assert "install_gpu.sh --te, or use auto" in refusal(expert_backend="te")
    assert "install_gpu.sh --megablocks, or use auto" in refusal(expert_backend="megablocks")
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert refusal(expert_backend="te_fp8").endswith("te_fp8 needs a Hopper GPU or a newer one: use te")


def test_auto_says_what_it_took_and_why(data: dict, world_of_one: None, capsys: pytest.CaptureFixture) -> None:
    from tests.model.test_parity import build

    build({"ffn_hidden_size": 50}, data)
    widths = "torch needs widths that are multiples of 4 in fp32; ffn_hidden_size (50) is not"
    assert f"expert matmuls: loop, because {widths}" in capsys.readouterr().out
    build({}, data, backend="loop")
    assert capsys.readouterr().out == ""
