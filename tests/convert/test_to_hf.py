"""An export behaves like the trained model: loaded by plain transformers, it gives Megatron's logits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

from data_tools.tokenizer import train_bpe
from jetmoe_megatron.checkpoint.checksums import write_checksums
from jetmoe_megatron.cli import main
from jetmoe_megatron.convert.to_hf import convert_to_hf
from jetmoe_megatron.convert.verify import compare_tensors
from jetmoe_megatron.errors import UserError
from tests.convert.conftest import Saved
from tests.support import command


def test_logits_and_greedy_text_equal_the_trained_model(saved: Saved, tmp_path: Path) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exported(tokens).logits, saved.logits(tokens), rtol=1e-5, atol=1e-5)
    ours = tokens[:, :4]
    for _ in range(24):
        ours = torch.cat([ours, saved.logits(ours)[:, -1:].argmax(-1)], dim=1)
    greedy = exported.generate(tokens[:, :4], max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, ours)


def test_files_and_names(saved: Saved, tmp_path: Path) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "hf/config.json").read_text())
    both = [("num_local_experts", "moe_num_experts"), ("intermediate_size", "ffn_hidden_size")]
    both += [("num_experts_per_tok", "moe_top_k"), ("num_hidden_layers", "num_layers")]
    both += [("rms_norm_eps", "layer_norm_epsilon"), ("max_position_embeddings", "n_positions")]
    for transformers_name, original in both:
        assert config[transformers_name] == config[original]
    loaded = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (loaded.num_local_experts, loaded.rms_norm_eps, loaded.intermediate_size) == (6, 1e-3, 48)
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 + 2 * 11
        assert file.get_slice("model.layers.1.mlp.input_linear.weight").get_shape() == [6, 96, 32]


def test_shards(saved: Saved, tmp_path: Path) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "one")
    convert_to_hf(saved.checkpoint, tmp_path / "many", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("one", "many"))
    for (name, a), (_, b) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype(saved: Saved, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "hf", dtype=name)
    convert_to_hf(saved.checkpoint, tmp_path / "as stored")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == dtype
    cast, stored = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "as stored/model.safetensors")
    for tensor_name, tensor in stored.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(cast[tensor_name], tensor.to(dtype))


def test_a_bf16_run_is_exported_in_bf16(save: Callable[..., Saved], tmp_path: Path) -> None:
    convert_to_hf(save(precision="bf16").checkpoint, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf/model.safetensors").values()} == {torch.bfloat16}


def test_tokenizer_comes_along(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "one two three " * 50}) + "\n")
    train_bpe([text], 270, tmp_path / "tokenizer")
    convert_to_hf(saved.checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer.encode("two three")) == "two three"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == 2


def test_progress_ends_at_the_total(saved: Saved, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_to_hf(saved.checkpoint, tmp_path / "hf", progress=lambda *amounts: seen.append(amounts))
    assert seen == sorted(seen) and len(seen) >= 24
    assert seen[-1] == (sum(t.nbytes for t in load_file(tmp_path / "hf/model.safetensors").values()),) * 2


def test_command(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = command("jetmoe", "convert", "to-hf", saved.checkpoint.parent.parent, tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert (tmp_path / "hf/model.safetensors").is_file()
    assert main(["convert", "to-hf", str(saved.checkpoint), str(tmp_path / "hf")]) == 2
    error = f"error: {tmp_path}/hf: exists already; remove it or choose another folder\n"
    assert capsys.readouterr().err == error


def copy(saved: Saved, tmp_path: Path) -> Path:
    shutil.copytree(saved.checkpoint, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def no_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


def empty_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def no_tensors(checkpoint: Path) -> None:
    for file in checkpoint.glob(".metadata"):
        file.unlink()


def damaged_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"nothing")


class Crafted:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def crafted_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Crafted(checkpoint.parent / "code was run")))


def truncated(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 4)


def missing_file(checkpoint: Path) -> None:
    next(checkpoint.glob("*.distcp")).unlink()


def change_run(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = yaml.safe_load((checkpoint / "run.yaml").read_text())
    change(tree)
    (checkpoint / "run.yaml").write_text(yaml.safe_dump(tree))


def another_width(checkpoint: Path) -> None:
    change_run(checkpoint, lambda tree: tree["model"].update(ffn_hidden_size=50))


def more_layers(checkpoint: Path) -> None:
    change_run(checkpoint, lambda tree: tree["model"].update(num_layers=3))


def no_model(checkpoint: Path) -> None:
    change_run(checkpoint, lambda tree: tree.pop("model"))


def other_program(checkpoint: Path) -> None:
    for file in [*checkpoint.glob("*.distcp"), checkpoint / ".metadata"]:
        file.unlink()
    dcp.save({"weight": torch.zeros(3)}, checkpoint_id=checkpoint, no_dist=True)
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    metadata.storage_meta = None  # which has a path, that no checkpoint of ours needs
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


REFUSED: dict[Callable[[Path], None], str] = {
    no_folder: "no such checkpoint folder",
    empty_folder: "not a checkpoint of this program: it has neither run.yaml nor model.yaml",
    no_tensors: "not a whole checkpoint: it has no .metadata",
    damaged_metadata: ".metadata cannot be read: ",
    crafted_metadata: ".metadata cannot be read: it names posix.mkdir, which no checkpoint needs",
    truncated: "damaged: ",
    missing_file: "No such file",
    another_width: "has the shape [2, 6, 2, 48, 32], but the model of the checkpoint says [2, 6, 2, 50, 32]",
    more_layers: "has the shape [2, 32], but the model of the checkpoint says [3, 32]",
    no_model: "run.yaml: damaged, or of another program",
    other_program: "has no tensor 'embedding.word_embeddings.weight'",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_refused_in_one_line_with_nothing_left(damage: Callable[[Path], None], saved: Saved, tmp_path: Path) -> None:
    """By its checksums; where there are none, by what it holds."""
    checkpoint = copy(saved, tmp_path)
    damage(checkpoint)
    with pytest.raises(UserError, match=f"^{checkpoint}: (is damaged: |no such|not a checkpoint)"):
        convert_to_hf(checkpoint, tmp_path / "hf")
    (checkpoint / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(UserError) as refusal:
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert REFUSED[damage] in str(refusal.value) and str(checkpoint) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint"}


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), None, "model.norm.weight: holds values that are not numbers (NaN)"),
        (1e5, "fp16", "model.norm.weight: holds 100000, which fp16 cannot hold: use another --dtype"),
        (float("-inf"), "fp32", "model.norm.weight: holds inf, which fp32 cannot hold: use another --dtype"),
    ],
)
def test_values_without_a_place(
    value: float, dtype: str | None, message: str, saved: Saved, save: Callable[..., Saved], tmp_path: Path
) -> None:
    from jetmoe_megatron.convert.from_hf import convert_from_hf

    convert_to_hf(saved.checkpoint, tmp_path / "good")
    convert_from_hf(tmp_path / "good", tmp_path / "checkpoint")
    norm = load_file(tmp_path / "good/model.safetensors")["model.norm.weight"].numpy().tobytes()
    file = tmp_path / "checkpoint/__0_0.distcp"
    content = file.read_bytes()
    assert content.count(norm) == 1
    file.write_bytes(content.replace(norm, torch.tensor([value]).numpy().tobytes() + norm[4:]))
    write_checksums(tmp_path / "checkpoint")
    with pytest.raises(UserError) as refusal:
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", dtype)
    assert str(refusal.value) == message
    assert not list(tmp_path.glob("hf*"))


def test_missing_tokenizer_is_refused_before_work(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer folder"):
        convert_to_hf(saved.checkpoint, tmp_path / "hf", tokenizer=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_work(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_files=0, f_favail=0, f_bavail=10, f_frsize=100)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(UserError, match=r"hf: [\d.]+ kB are needed, 1 kB are free"):
        convert_to_hf(saved.checkpoint, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_half_way(saved: Saved, tmp_path: Path) -> None:
    """Files may not pass 64 KiB in that shell."""
    line = f"ulimit -f 64; jetmoe convert to-hf {saved.checkpoint} {tmp_path}/hf"
    result = command("bash", "-c", line)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}/hf: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_in_nobodys_way(saved: Saved, tmp_path: Path) -> None:
    half = (
        "import os, sys, pathlib; from jetmoe_megatron.convert.new_folder import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1]), 0) as aside:\n"
        "    (aside / 'model-00007-of-00009.safetensors').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert command(sys.executable, "-c", half, tmp_path / "hf").returncode == -9
    assert (tmp_path / "hf.partial/model-00007-of-00009.safetensors").exists()
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert len(list((tmp_path / "hf").iterdir())) == 3


def test_what_another_process_is_writing_is_left_to_it(saved: Saved, tmp_path: Path) -> None:
    from jetmoe_megatron.convert.new_folder import new_folder

    with new_folder(tmp_path / "hf", 0) as aside:
        (aside / "model.safetensors").write_text("half")
        with pytest.raises(UserError, match=r"hf.partial: another process is writing there"):
            convert_to_hf(saved.checkpoint, tmp_path / "hf")
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


def damaged_copy(saved: Saved, root: Path, file: str, tokens: int = 2048) -> Path:
    """With a byte changed in the middle of the file: of the optimizer's or the model's numbers, or of the progress."""
    checkpoint = Path(shutil.copytree(saved.checkpoint, root / f"checkpoints/tokens_{tokens}"))
    content = bytearray((checkpoint / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / file).write_bytes(content)
    return checkpoint


def test_a_changed_byte_is_seen(saved: Saved, tmp_path: Path) -> None:
    checkpoint = damaged_copy(saved, tmp_path / "run", "__0_0.distcp")
    with pytest.raises(UserError, match="is damaged: __0_0.distcp is not what was written"):
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))
    for a, b in ((checkpoint, saved.checkpoint), (saved.checkpoint, checkpoint)):
        with pytest.raises(UserError, match="is damaged"):
            compare_tensors(a, b)


def test_a_run_whose_newest_checkpoint_is_damaged(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged_copy(saved, tmp_path / "run", "progress.json", tokens=4096)
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "progress.json is not what was written (its checksum differs); no whole" in capsys.readouterr().err
    shutil.copytree(saved.checkpoint, tmp_path / "run/checkpoints/tokens_2048")
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path}/run/checkpoints/tokens_4096 is damaged: progress.json")
    assert warning.endswith("; taking tokens_2048\n")
    assert compare_tensors(tmp_path / "hf", saved.checkpoint).different == 0


def test_a_sentencepiece_model_alone(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would make other ids of it than training had."""
    (tmp_path / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["import os, sys", "the quick brown fox jumps over the lazy dog"] * 20),
        model_prefix=str(tmp_path / "tokenizer/tokenizer"),
        vocab_size=96,
        model_type="bpe",
        hard_vocab_limit=False,
        eos_id=3,
        bos_id=4,
        unk_id=0,
        minloglevel=2,
    )
    convert_to_hf(saved.checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/tokenizer: not copied, because transformers would")
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, {"eos_token_id": 2}),
        ({"pad_token_id": 5}, {"eos_token_id": 2, "pad_token_id": 5}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": [7, 8]}),
    ],
)
def test_a_config_beside_the_tokenizer(saved: Saved, tmp_path: Path, config: dict, expected: dict) -> None:
    """Where it names no end the tokenizer is asked."""
    (tmp_path / "texts.txt").write_text("some text " * 50)
    train_bpe([tmp_path / "texts.txt"], 280, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer/tokenizer").mkdir()  # no file to copy
    convert_to_hf(saved.checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    written = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert {name: written[name] for name in expected} == expected


def test_somebodys_own_folder_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial/notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"hf\.partial: the name is needed, but this program did not make that folder"):
        convert_to_hf(saved.checkpoint, tmp_path / "hf")
    assert (tmp_path / "hf.partial/notes.txt").read_text() == "precious"
