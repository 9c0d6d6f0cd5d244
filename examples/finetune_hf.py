"""Fine-tune an exported JetMoE with transformers' Trainer and the auxiliary losses it was pretrained with.

    python examples/finetune_hf.py lm       MODEL TEXTS.jsonl    OUT [--max-steps 100]
    python examples/finetune_hf.py classify MODEL LABELLED.jsonl OUT

Lines are {"text": "..."}, for `classify` also with "label": 0, 1, ... OUT becomes a Hugging Face folder.

transformers' own auxiliary loss (output_router_logits=True) is not JetMoE's. Up to version 5.0 it raises an error.
Later versions count the attention's routers twice, average over layers where JetMoE adds up, and have no z-loss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating


def balance_and_z(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of one router over T tokens (arXiv 2404.07413, equations 10 and 11). A perfectly even router has balance = 1."""
    tokens, experts = logits_TE.shape
    chosen_TK = logits_TE.topk(top_k, dim=-1).indices
    share_E = chosen_TK.flatten().bincount(minlength=experts) / (tokens * top_k)
    balance = experts * (share_E * logits_TE.softmax(-1).mean(0)).sum()
    return balance, logits_TE.logsumexp(-1).square().mean()


class RouterLosses:
    """Collects the logits of every router, two in each layer, whenever `model` runs."""

    def __init__(self, model: nn.Module) -> None:
        self._logits: list[Tensor] = []
        self._routers = [module for module in model.modules() if isinstance(module, JetMoeTopKGating)]
        for router in self._routers:
            router.register_forward_hook(lambda module, inputs, output: self._logits.append(output[-1]))

    def sums(self, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Balance and z-loss of the last run, each summed over the routers. Padding does not count."""
        logits, self._logits = self._logits, []
        assert len(logits) == len(self._routers), "the model must have run once since the last call"
        if attention_mask is not None:
            logits = [logits_TE[attention_mask.flatten().bool()] for logits_TE in logits]
        losses = [balance_and_z(logits_TE, self._routers[0].top_k) for logits_TE in logits]
        balances, z_losses = zip(*losses, strict=True)
        return torch.stack(balances).sum(), torch.stack(z_losses).sum()


class JetMoeTrainer(Trainer):
    """L = L_model + balance_coefficient * sum of balances + z_coefficient * sum of z-losses, while training."""

    def __init__(self, *args: Any, balance_coefficient: float = 0.01, z_coefficient: float = 0.001, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._balance, self._z = balance_coefficient, z_coefficient
        self._losses = RouterLosses(self.model)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        balance, z = self._losses.sums(inputs.get("attention_mask"))
        if model.training:
            auxiliary = self._balance * balance + self._z * z
            # With the number of items given, the loss is this batch's share of an accumulated step.
            loss = loss + auxiliary / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss


def read_lines(path: Path, keys: list[str]) -> list[dict[str, Any]]:
    """Raises OSError or ValueError that says which line is not a JSON object with these keys and fit values."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            try:
                line = json.loads(text)
            except ValueError:
                raise ValueError(f"line {number}: not valid JSON") from None
            if not isinstance(line, dict) or not set(keys) <= line.keys():
                raise ValueError(f"line {number}: expected an object with {' and '.join(keys)}")
            if not isinstance(line["text"], str):
                raise ValueError(f"line {number}: text must be a string")
            if "label" in keys and (type(line["label"]) is not int or line["label"] < 0):
                raise ValueError(f"line {number}: label must be 0, 1, 2, ...")
            lines.append(line)
    if not lines:
        raise ValueError("no lines")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["lm", "classify"], help="predict the next token, or the label of a text")
    parser.add_argument("model", type=Path, help="a folder that `jetmoe convert to-hf` wrote, with its tokenizer")
    parser.add_argument("data", type=Path, help="a file of JSON lines with text, for classify also with label")
    parser.add_argument("out", type=Path, help="the Hugging Face folder to write; it must not exist")
    parser.add_argument("--max-steps", type=int, default=100, help="steps of the optimizer (100)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="at the start; it falls to 0 (1e-5)")
    parser.add_argument("--batch", type=int, default=8, help="texts in a step, on each device (8)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text; the rest is cut off (512)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)

    if not (arguments.model / "config.json").is_file():  # transformers would look for that name on the network
        parser.error(f"{arguments.model}: not a Hugging Face folder: it has no config.json")
    if arguments.out.exists():
        parser.error(f"{arguments.out}: exists already; remove it or choose another folder")
    try:
        lines = read_lines(arguments.data, ["text"] if arguments.task == "lm" else ["text", "label"])
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.data}: {error}")
    try:
        arguments.out.mkdir(parents=True)
        arguments.out.rmdir()  # only checks, before training, that it can be made
    except OSError as error:
        parser.error(f"{arguments.out}: {error.strerror}")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    samples = [tokenizer(line["text"], truncation=True, max_length=arguments.max_length) for line in lines]
    for sample in samples:
        sample.pop("token_type_ids", None)
    if arguments.task == "lm":
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        # Each text ends as documents did in pretraining. The collator for language models would not train on that
        # token, because it takes it for padding.
        ends = [[*sample["input_ids"][: arguments.max_length - 1], tokenizer.eos_token_id] for sample in samples]
        samples = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in ends]
        collator: Any = DataCollatorForSeq2Seq(tokenizer)
    else:
        labels = [line["label"] for line in lines]
        samples = [{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)]
        model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=max(labels) + 1)
        model.config.pad_token_id = tokenizer.pad_token_id
        collator = DataCollatorWithPadding(tokenizer)
    trainer = JetMoeTrainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.max_steps,
            learning_rate=arguments.learning_rate,
            per_device_train_batch_size=arguments.batch,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=samples,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
