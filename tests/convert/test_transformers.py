"""The export under the oldest supported transformers, installed beside the newest: the same logits and text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jetmoe_megatron.convert.to_hf import convert_to_hf
from tests.convert.conftest import Saved
from tests.support import environment

OLDEST = "4.57.*"
PROGRAM = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(tokens).logits
text = model.generate(tokens[:, :4], max_new_tokens=24, do_sample=False, eos_token_id=None)
print(json.dumps({"version": transformers.__version__, "logits": logits.tolist(), "text": text.tolist()}))
"""


@pytest.fixture(scope="module")
def old_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, in front of what is installed."""
    folder = tmp_path_factory.mktemp("transformers")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), f"transformers=={OLDEST}"]
    result = subprocess.run(pip, capture_output=True, text=True, timeout=400)
    if result.returncode:
        pytest.skip(f"transformers {OLDEST} cannot be installed: {result.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.slow
def test_transformers_4_57(saved: Saved, old_transformers: Path, tmp_path: Path) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    tokens = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "hf"), json.dumps(tokens.tolist())],
        env={**environment(), "PYTHONPATH": str(old_transformers)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout.splitlines()[-1])
    assert output["version"].startswith("4.57.")
    torch.testing.assert_close(torch.tensor(output["logits"]), saved.logits(tokens), rtol=1e-5, atol=1e-5)
    ours = tokens[:, :4]
    for _ in range(24):
        ours = torch.cat([ours, saved.logits(ours)[:, -1:].argmax(-1)], dim=1)
    assert output["text"] == ours.tolist()
