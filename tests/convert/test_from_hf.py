"""What transformers has saved becomes a checkpoint that computes the same, and comes back the same to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_tools.tokenizer import train_bpe
from jetmoe_megatron.checkpoint.saved_run import is_of_training
from jetmoe_megatron.cli import main
from jetmoe_megatron.convert.from_hf import convert_from_hf
from jetmoe_megatron.convert.to_hf import convert_to_hf
from jetmoe_megatron.convert.verify import compare_tensors
from jetmoe_megatron.errors import UserError
from tests.convert.conftest import ORIGINAL, Saved
from tests.support import command, pretrain, small_run, write_run


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_checkpoint_computes_what_transformers_does(released: Path, tmp_path: Path, world_of_one: None) -> None:
    """Loaded into a model that was built of its model.yaml, in bf16 too."""
    from jetmoe_megatron.checkpoint.load import load_weights
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.model.build import build_model
    from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel

    convert_from_hf(released, tmp_path / "checkpoint")
    tree = small_run(tmp_path, {"code": "unused", "prose": "unused"})
    tree["model"] = yaml.safe_load((tmp_path / "checkpoint/model.yaml").read_text())
    tokens = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    truth = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32).eval()
    for precision in ("fp32", "bf16"):
        run = Run.model_validate({**tree, "precision": precision})
        model = wrap_for_data_parallel(run, build_model(run, resolve_layout(run, 1)))
        load_weights(tmp_path / "checkpoint", model, build_optimizer(run, model))
        if precision == "fp32":
            ours = Saved(tmp_path, model[0], tree).logits(tokens)
            torch.testing.assert_close(ours, truth(tokens).logits, rtol=1e-5, atol=1e-5)
        end = "layers.1.mlp.experts.linear_out.weight"
        (loaded,) = (parameter for name, parameter in model[0].named_parameters() if name.endswith(end))
        stored = truth.get_parameter("model.layers.1.mlp.output_linear.weight")
        assert torch.equal(loaded, stored.to(loaded.dtype))


def test_training_goes_on_from_it(released: Path, tmp_path: Path, data: dict[str, str]) -> None:
    """A step too small to see leaves the weights that Hugging Face had."""
    convert_from_hf(released, tmp_path / "base")
    tree = small_run(tmp_path, data, start_from=str(tmp_path / "base"), schedule={})
    tree |= {"model": str(tmp_path / "base/model.yaml"), "optimizer": {"max_lr": 1e-9, "weight_decay": 0.0}}
    result = pretrain(1, write_run(tmp_path, tree), "debug.max_steps=1")
    assert result.returncode == 0, result.stderr
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    comparison = compare_tensors(checkpoint, released)
    assert comparison.different > 0 and comparison.largest < 1e-7, comparison


@pytest.mark.parametrize("form", ["single", "sharded", "original names", "fp16", "bf16"])
def test_there_and_back(form: str, released: Path, tmp_path: Path) -> None:
    tensors = load_file(released / "model.safetensors")
    if form == "sharded":
        AutoModelForCausalLM.from_pretrained(released).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
        released = tmp_path / "sharded"
        assert len(list(released.glob("*.safetensors"))) > 2
    if form == "original names":
        edit_config(released, lambda c: [c.update({new: c.pop(old)}) for old, new in ORIGINAL.items()])
    if form in ("fp16", "bf16"):
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[form]
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        edit_tensors(released, lambda t: t.update(tensors))
    convert_from_hf(released, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    back = load_file(tmp_path / "hf/model.safetensors")
    assert back.keys() == tensors.keys() and len(back) == 24
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    config = json.loads((tmp_path / "hf/config.json").read_text())
    wanted = {"num_local_experts": 6, "rms_norm_eps": 1e-3, "rope_theta": 2000.0, "max_position_embeddings": 64}
    wanted |= {"num_hidden_layers": 2, "initializer_range": 0.2}
    assert {name: config[name] for name in wanted} == wanted


def test_tokenizer_and_special_tokens_come_back(released: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "one two three " * 50}) + "\n")
    train_bpe([text], 270, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(released / file.name)
    edit_config(released, lambda c: c.update(eos_token_id=7))
    convert_from_hf(released, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == 7


def test_a_tied_head_that_was_saved_twice(released: Path, tmp_path: Path) -> None:
    edit_tensors(released, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert_from_hf(released, tmp_path / "checkpoint")
    edit_tensors(released, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight; JetMoE ties them"):
        convert_from_hf(released, tmp_path / "other")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "complex numbers": (
        lambda path: edit_tensors(
            path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.complex64)})
        ),
        "model.norm.weight has numbers of the type complex64",
    ),
    "pickle": (pickled, "pytorch_model.bin: a pickle, which can run code when it is read; save the model as"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: must hold a JSON object"),
    "another model": (
        lambda f: edit_config(f, lambda c: c.update(model_type="llama")),
        "config.json: model_type: must be 'jetmoe', not 'llama'",
    ),
    "a name missing": (
        lambda f: edit_config(f, lambda c: c.pop("num_local_experts")),
        "config.json: num_local_experts or moe_num_experts: is missing",
    ),
    "names contradict": (
        lambda f: edit_config(f, lambda c: c.update(moe_top_k=1)),
        "config.json: num_experts_per_tok 2 contradicts moe_top_k 1",
    ),
    "no number": (
        lambda f: edit_config(f, lambda c: c.update(vocab_size="many")),
        "config.json: vocab_size: Input should be a valid integer, not 'many'",
    ),
    "scaled rope": (
        lambda f: edit_config(f, lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0)),
        "config.json: rope_parameters: only plain rotary embeddings are supported",
    ),
    "untied": (
        lambda f: edit_config(f, lambda c: c.update(tie_word_embeddings=False)),
        "config.json: tie_word_embeddings: JetMoE has True, not False",
    ),
    "another shape": (
        lambda f: edit_config(f, lambda c: c.update(intermediate_size=40)),
        "has the shape [6, 96, 32], but config.json says [6, 80, 32]",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update({"score.weight": torch.zeros(2, 32)})),
        "'score.weight' is no tensor of a JetMoE of 2 layers",
    ),
    "a tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.bias")),
        "has no tensor 'model.layers.1.mlp.bias'",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors: not a readable safetensors file",
    ),
    "NaN": (
        lambda f: edit_tensors(f, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight: holds values that are not numbers (NaN)",
    ),
    "mixed types": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()})),
        "it has tensors of several types: choose bf16, fp16 or fp32 with --dtype",
    ),
    "an index that leads out": (
        lambda f: (
            (f / "model.safetensors")
            .rename(f / "model.safetensors.index.json")
            .write_text('{"weight_map": {"a": "../a"}}')
        ),
        "weight_map must give a file of this folder for each tensor",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line_with_nothing_left(
    damage: Callable[[Path], Any], message: str, released: Path, tmp_path: Path
) -> None:
    damage(released)
    with pytest.raises(UserError) as refusal:
        convert_from_hf(released, tmp_path / "checkpoint")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == ["released"]


def test_command(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "from-hf", str(released), str(tmp_path / "checkpoint")]
    result = command("jetmoe", *arguments)
    output = f"{released} -> {tmp_path}/checkpoint\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, output, "")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/checkpoint: exists already")


@pytest.fixture
def with_tokenizer(released: Path, tmp_path: Path) -> Path:
    """A checkpoint that has all that one can have."""
    (tmp_path / "text.txt").write_text("one two three " * 50)
    train_bpe([tmp_path / "text.txt"], 270, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(released / file.name)
    convert_from_hf(released, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_one_flipped_byte_in_any_file_is_refused(
    with_tokenizer: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By to-hf and by verify; a file that is lost likewise."""
    checkpoint = with_tokenizer
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(files) > 8 and checkpoint / "hf/tokenizer.json" in files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        for damaged in (content, None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            if damaged is None and file.name == "checksums.json":
                continue  # as of an earlier version
            for arguments in (["to-hf", checkpoint, tmp_path / "out"], ["verify", checkpoint, released]):
                assert main(["convert", *map(str, arguments)]) == 2, (file, damaged)
                assert capsys.readouterr().err.startswith(f"error: {checkpoint}")
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert not (tmp_path / "out").exists()
    assert compare_tensors(checkpoint, released).different == 0


def test_a_checkpoint_of_an_earlier_version_has_a_warning(
    with_tokenizer: Path, released: Path, tmp_path: Path, data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (with_tokenizer / "checksums.json").unlink()
    warning = f"{with_tokenizer}: has no checksums.json, so damage in it may not be noticed\n"
    assert main(["convert", "to-hf", str(with_tokenizer), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"warning: {warning}"
    assert main(["convert", "verify", str(with_tokenizer), str(released)]) == 0
    assert capsys.readouterr().err == f"warning: {warning}"
    tree = small_run(tmp_path, data, start_from=str(with_tokenizer), schedule={})
    result = pretrain(1, write_run(tmp_path, tree | {"model": str(with_tokenizer / "model.yaml")}), "debug.max_steps=1")
    assert (result.returncode, result.stderr) == (0, f"warning: start_from: {warning}")


def test_the_list_of_checksums_makes_it_no_checkpoint_of_a_training(with_tokenizer: Path, saved: Saved) -> None:
    """It is weights alone; one of a training that has lost its run and its progress is not."""
    assert not is_of_training(with_tokenizer)
    (with_tokenizer / "model.yaml").unlink()
    assert is_of_training(with_tokenizer)  # damaged, as its checksums say
    assert is_of_training(saved.checkpoint)
    for lost in (["run.yaml"], ["progress.json"], ["run.yaml", "progress.json"], ["run.yaml", "checksums.json"]):
        copy = with_tokenizer.with_name("_".join(lost))
        shutil.copytree(saved.checkpoint, copy)
        for name in lost:
            (copy / name).unlink()
        assert is_of_training(copy)


@pytest.mark.parametrize("command", ["to-hf", "verify"])
@pytest.mark.parametrize("place", ["hf/tokenizer.model", "hf/anything", "hf"])
def test_what_is_not_listed_is_not_copied(
    with_tokenizer: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    """A link in a checkpoint would bring a file from elsewhere into an export."""
    (tmp_path / "secret").write_text("secret")
    if place == "hf":
        (with_tokenizer / "hf").rename(tmp_path / "elsewhere")
        (with_tokenizer / "hf").symlink_to(tmp_path / "elsewhere")
    else:
        (with_tokenizer / place).symlink_to(tmp_path / "secret")
    other = tmp_path / "out" if command == "to-hf" else released
    assert main(["convert", command, str(with_tokenizer), str(other)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {with_tokenizer}: is damaged: {place} is not ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_part_of_a_tokenizer_stay(released: Path, tmp_path: Path) -> None:
    (released / "tokenizer_secret").write_text("secret")
    convert_from_hf(released, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint/hf/tokenizer_secret").exists()


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null"])
def test_a_device_for_a_file(with_tokenizer: Path, released: Path, tmp_path: Path, target: str) -> None:
    """It may never end."""
    for folder, convert in ((released, convert_from_hf), (with_tokenizer, convert_to_hf)):
        config = next(folder.rglob("config.json"))
        config.unlink()
        config.symlink_to(target)
        (folder / "checksums.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"config\.json: is no file"):
            convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_file_and_the_index_of_an_older_save(released: Path, tmp_path: Path) -> None:
    """transformers takes the one file, also where the others are still there."""
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    older = {path: path.read_bytes() for path in (tmp_path / "hf").glob("model*")}
    assert len(older) > 2
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "hf")
    for path, content in older.items():
        path.write_bytes(content)
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "truth")
    assert compare_tensors(tmp_path / "checkpoint", tmp_path / "truth").different == 0


def test_two_accounts_of_the_rotation(released: Path, tmp_path: Path) -> None:
    edit_config(released, lambda config: config.update(rope_scaling={"rope_type": "linear", "factor": 2.0}))
    with pytest.raises(UserError, match="config.json: rope_scaling: only plain rotary embeddings are supported"):
        convert_from_hf(released, tmp_path / "checkpoint")
