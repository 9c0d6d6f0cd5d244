"""The model equals Hugging Face's JetMoE: same weights, same logits, same gradient of every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import JetMoeConfig, JetMoeForCausalLM

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.convert.hf_config import hf_config
from jetmoe_megatron.convert.hf_names import EMBEDDING, FINAL_NORM, LAYER
from tests.support import small_run

SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "top-1": {"top_k": 1},
    "top-3 of 6": {"top_k": 3, "num_experts": 6},
    "all experts": {"top_k": 4, "num_experts": 4},
    "one kv head": {"num_kv_heads": 1, "kv_channels": 16},
    "attention wider than hidden": {"num_kv_heads": 4, "kv_channels": 16},
    "narrow ffn, three layers": {"ffn_hidden_size": 20, "num_layers": 3},
    "odd widths, loop backend": {"ffn_hidden_size": 21, "hidden_size": 30, "vocab_size": 61},
    "other eps and theta": {"norm_eps": 1e-3, "rope_theta": 500.0},
    "eight experts": {"num_experts": 8, "hidden_size": 64, "kv_channels": 32},
}


def build(shape: dict[str, Any], data: dict[str, str], backend: str = "auto") -> tuple[Run, Any]:
    from jetmoe_megatron.model.build import build_model

    changes = {f"model__{key}": value for key, value in shape.items()}
    tree = small_run(Path("unused"), data, **changes, model__init_std=0.2, model__expert_backend=backend)
    run = Run.model_validate(tree)
    (model,) = build_model(run, resolve_layout(run, 1))
    return run, model


def hugging_face_twin(run: Run, model: Any) -> JetMoeForCausalLM:
    config = JetMoeConfig(**hf_config(run.model, run.batch.sequence_length, "float32", {}))
    twin = JetMoeForCausalLM(config)
    state, ours = twin.state_dict(), dict(model.named_parameters())
    with torch.no_grad():
        for hf_name, name, to_hf in pairs(run):
            state[hf_name].copy_(to_hf(ours[name], run.model))
    return twin


def pairs(run: Run) -> list[tuple[str, str, Any]]:
    result = [(name.hugging_face, name.megatron, name.to_hf) for name in (EMBEDDING, FINAL_NORM)]
    for i in range(run.model.num_layers):
        for name in LAYER:
            hf, ours = f"model.layers.{i}.{name.hugging_face}", f"decoder.layers.{i}.{name.megatron}"
            result.append((hf, ours, name.to_hf))
    return result


def disturb_norms_and_biases(model: Any) -> None:
    """Ones and zeros would hide a norm or a bias that is left out."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            assert name


@pytest.mark.parametrize("blocks", [True, False], ids=["attention over blocks", "torch's attention"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_equal_hugging_face(
    shape: dict, blocks: bool, data: dict, world_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jetmoe_megatron.model.attention.is_faster", lambda length, dtype: blocks)
    run, model = build(shape, data)
    disturb_norms_and_biases(model)
    twin = hugging_face_twin(run, model)
    length, vocab = run.batch.sequence_length, run.model.vocab_size
    tokens = torch.randint(vocab, (3, length + 1), generator=torch.Generator().manual_seed(5))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(length).expand_as(inputs)

    model.eval()
    logits = model(inputs, positions, None)
    expected = twin.eval()(inputs).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()

    model(inputs, positions, None, labels=labels).mean().backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    for hf_name, name, to_hf in pairs(run):
        gradient, truth = to_hf(ours[name].grad, run.model), theirs[hf_name].grad
        if "router" in name and run.model.top_k == 1:  # a softmax over one logit is 1 whatever the logit
            assert truth.abs().max() == gradient.abs().max() == 0
            continue
        assert truth.abs().max() > 0, f"{hf_name} has no gradient: nothing is compared"
        error = (gradient - truth).abs().max() / truth.abs().max()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_every_parameter_is_compared(data: dict, world_of_one: None) -> None:
    run, model = build({}, data)
    twin = hugging_face_twin(run, model)
    assert {name for _, name, _ in pairs(run)} == dict(model.named_parameters()).keys()
    assert {name for name, _, _ in pairs(run)} == dict(twin.named_parameters()).keys()


def test_backends_give_the_same_model(data: dict, world_of_one: None) -> None:
    tokens = torch.arange(32)[None]
    outputs = [build({}, data, backend)[1].eval()(tokens, tokens, None) for backend in ("loop", "torch")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
