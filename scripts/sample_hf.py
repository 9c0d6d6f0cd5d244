"""Print a text that a Hugging Face folder writes: python scripts/sample_hf.py FOLDER PROMPT"""

from __future__ import annotations

import sys
import warnings

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, prompt = sys.argv[1:]
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.95)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
