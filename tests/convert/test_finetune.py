"""The fine-tuning example: its auxiliary losses are those of pretraining, and it trains what was exported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data_tools.tokenizer import train_bpe
from examples.finetune_hf import JetMoeTrainer, RouterLosses, build_parser, main
from jetmoe_megatron.convert.from_hf import convert_from_hf
from jetmoe_megatron.convert.hf_names import LAYER
from jetmoe_megatron.convert.to_hf import convert_to_hf
from tests.convert.conftest import Saved
from tests.support import REPO, command

TEXTS = ("one two three " * 4, "left right up down " * 3)


def test_losses_and_router_gradients_are_those_of_pretraining(save: Callable[..., Saved], tmp_path: Path) -> None:
    saved = save(losses={"balance": 0.5, "z": 0.05})
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).train()
    tokens = torch.randint(96, (3, 33), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()

    routers = RouterLosses(network)
    lm = torch.nn.functional.cross_entropy(network(inputs).logits.flatten(0, 1), labels.flatten())
    balance, z = routers.sums()
    (lm + 0.5 * balance + 0.05 * z).backward()

    ours = saved.model.module
    modules = [module for module in ours.modules() if hasattr(module, "record") and hasattr(module, "kind")]
    assert len(modules) == 4
    for module in modules:
        module.record.reset()
    saved.model.zero_grad_buffer()
    ours.train()
    ours(inputs, torch.arange(32).expand_as(inputs), None, labels=labels).mean().backward()
    assert balance.item() == pytest.approx(sum(float(module.record.balance_loss) for module in modules), rel=1e-5)
    assert z.item() == pytest.approx(sum(float(module.record.z_loss) for module in modules), rel=1e-5)
    mine, theirs = dict(ours.named_parameters()), dict(network.named_parameters())
    for i in range(2):
        for name in LAYER:
            if "router" in name.megatron:
                gradient = mine[f"decoder.layers.{i}.{name.megatron}"].main_grad
                truth = theirs[f"model.layers.{i}.{name.hugging_face}"].grad
                assert (gradient - truth).abs().max() < 1e-5 * truth.abs().max()


def test_every_option_is_explained() -> None:
    for action in build_parser()._actions:
        assert action.help, action.dest
        if action.option_strings[:1] and action.default not in (None, "==SUPPRESS=="):
            shown = action.help.rpartition("(")[2].rstrip(")")
            assert type(action.default)(shown) == action.default


def test_padding_does_not_count(saved: Saved, tmp_path: Path) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    routers = RouterLosses(network)
    tokens = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(1))
    network(tokens[:, :12])
    expected = routers.sums()
    mask = (torch.arange(20) < 12).long()[None]
    network(tokens, attention_mask=mask)
    for a, b in zip(routers.sums(mask), expected, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5)


@pytest.fixture(scope="module")
def exported(save: Callable[..., Saved], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and texts of two kinds beside it."""
    folder = tmp_path_factory.mktemp("finetune")
    lines = [json.dumps({"text": text, "label": label}) for label, text in enumerate(TEXTS)] * 16
    (folder / "texts.jsonl").write_text("\n".join(lines))
    train_bpe([folder / "texts.jsonl"], 280, folder / "tokenizer")
    saved = save(model__vocab_size=280, model__init_std=0.02)
    convert_to_hf(saved.checkpoint, folder / "hf", tokenizer=folder / "tokenizer")
    return folder / "hf"


def test_language_model(exported: Path, tmp_path: Path) -> None:
    options = ("--max-steps", 20, "--learning-rate", 3e-3)
    result = command(
        sys.executable,
        REPO / "examples/finetune_hf.py",
        "lm",
        exported,
        exported.with_name("texts.jsonl"),
        tmp_path / "out",
        *options,
    )
    assert result.returncode == 0, result.stderr
    text = AutoTokenizer.from_pretrained(exported)("one two three one two three", return_tensors="pt").input_ids
    before, after = (
        AutoModelForCausalLM.from_pretrained(f)(text, labels=text).loss for f in (exported, tmp_path / "out")
    )
    assert after < before - 1
    convert_from_hf(tmp_path / "out", tmp_path / "checkpoint")  # pretraining can continue from it


def test_classifier(exported: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "80", "--learning-rate", "5e-3"]
    torch.manual_seed(0)  # the head is drawn from it
    main(["classify", str(exported), str(exported.with_name("texts.jsonl")), str(tmp_path / "out"), *options])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for label, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        assert model(**inputs).logits.argmax().item() == label


def test_accumulated_batches_weigh_the_losses_as_one_batch_does(exported: Path, tmp_path: Path) -> None:
    """Four batches of the same samples as one step, or one of them: the same gradient."""
    from transformers import DataCollatorForLanguageModeling, TrainerCallback, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(exported)
    sample = {"input_ids": tokenizer("one two three left right").input_ids}
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
            gradients.append({n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if "router" in n})

    for accumulated in (1, 4):
        trainer = JetMoeTrainer(
            AutoModelForCausalLM.from_pretrained(exported),
            TrainingArguments(
                str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=accumulated,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=[sample] * 4,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[Keep()],
            balance_coefficient=1.0,
        )
        trainer.train()
    one, four = gradients
    for name, gradient in one.items():
        torch.testing.assert_close(four[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0
