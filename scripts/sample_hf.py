"""Print a text that a Hugging Face folder writes: python scripts/sample_hf.py FOLDER PROMPT"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").is_file():  # transformers would look for that name on the network
        parser.error(f"{arguments.folder}: not a Hugging Face folder: it has no config.json")
    if not arguments.prompt:
        parser.error("PROMPT: must have at least one character, which the model continues")
    if not any(arguments.folder.glob("tokenizer*")):
        parser.error(f"{arguments.folder}: it has no tokenizer: give `jetmoe convert to-hf` one with --tokenizer")
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    torch.manual_seed(0)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.95)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
