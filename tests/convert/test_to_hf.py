"""An export behaves as the model trained: loaded by plain transformers, it gives Megatron's logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from data_tools.tokenizer import train_bpe
from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.convert.to_hf import convert_to_hf
from jetmoe_megatron.errors import UserError
from tests.support import command, pretrain, small_run, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """The checkpoint of a run whose every shape differs from transformers' defaults."""
    folder = tmp_path_factory.mktemp("trained")
    tree = small_run(folder, data, model__norm_eps=1e-3, model__rope_theta=2000.0, model__num_experts=6)
    assert pretrain(2, write_run(folder, tree)).returncode == 0
    checkpoint = newest(folder / "run/checkpoints")
    assert checkpoint
    return checkpoint


def test_logits_equal_the_trained_model(trained: Path, tmp_path: Path, world_of_one: None) -> None:
    from jetmoe_megatron.checkpoint.saved_run import read_saved_run
    from jetmoe_megatron.checkpoint.store import load_checkpoint
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.model.build import build_model
    from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel

    convert_to_hf(trained, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    run = read_saved_run(trained)
    model = wrap_for_data_parallel(run, build_model(run, resolve_layout(run, 1)))
    assert load_checkpoint(trained, model, build_optimizer(run, model)) == 8 * 256
    tokens = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = model[0].eval()(tokens, torch.arange(32).expand(2, 32), None)
    torch.testing.assert_close(exported(tokens).logits, ours, rtol=1e-5, atol=1e-5)
    greedy = exported.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False)
    assert greedy.shape == (1, 12)


def test_files_and_names(trained: Path, tmp_path: Path) -> None:
    convert_to_hf(trained, tmp_path / "hf")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "hf/config.json").read_text())
    both = [("num_local_experts", "moe_num_experts"), ("intermediate_size", "ffn_hidden_size")]
    both += [("num_experts_per_tok", "moe_top_k"), ("num_hidden_layers", "num_layers")]
    for transformers_name, original in both:
        assert config[transformers_name] == config[original]
    loaded = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (loaded.num_local_experts, loaded.rms_norm_eps, loaded.intermediate_size) == (6, 1e-3, 48)
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 + 2 * 11
        assert file.get_slice("model.layers.1.mlp.input_linear.weight").get_shape() == [6, 96, 32]


def test_shards(trained: Path, tmp_path: Path) -> None:
    convert_to_hf(trained, tmp_path / "one")
    convert_to_hf(trained, tmp_path / "many", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("one", "many"))
    for (name, a), (_, b) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype(trained: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    convert_to_hf(trained, tmp_path / "hf", dtype=name)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == dtype


def test_tokenizer_comes_along(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "one two three " * 50}) + "\n")
    train_bpe([text], 270, tmp_path / "tokenizer")
    convert_to_hf(trained, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer.encode("two three")) == "two three"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == 2


def test_command(trained: Path, tmp_path: Path) -> None:
    result = command("jetmoe", "convert", "to-hf", trained.parent.parent, tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert (tmp_path / "hf/model.safetensors").is_file()
    again = command("jetmoe", "convert", "to-hf", trained, tmp_path / "hf")
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path}/hf: exists already; remove it or choose another folder\n"


@pytest.mark.parametrize("kind", ["missing", "empty folder", "no tensors"])
def test_not_a_checkpoint(trained: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    if kind != "missing":
        checkpoint.mkdir()
    if kind == "no tensors":
        (checkpoint / "run.yaml").write_text((trained / "run.yaml").read_text())
    with pytest.raises(UserError, match=str(checkpoint)):
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint"}


def test_missing_tokenizer_is_refused_before_work(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer folder"):
        convert_to_hf(trained, tmp_path / "hf", tokenizer=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
