"""The commands of docs/data.md work on the output of the tools that the page names."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from data_tools.indexed import read_index

REPOSITORY = Path(__file__).parents[2]


def test_output_of_filters_goes_in_as_documented(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "data" / "tokenizer")
    (tmp_path / "datatrove_output").mkdir()
    for rank in range(2):
        records = [{"text": text, "id": f"{rank}/{i}", "metadata": {"date": "x"}} for i, text in enumerate(texts)]
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / "datatrove_output" / f"{rank:05}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "curator_output").mkdir()
    table = pyarrow.table({"id": range(len(texts)), "text": texts, "language_score": [0.5] * len(texts)})
    pq.write_table(table, tmp_path / "curator_output" / "0a1b2c.parquet")

    section = (REPOSITORY / "docs" / "data.md").read_text().split("## Filtering and deduplication")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line)[2:] for line in block[1].splitlines()]
    assert len(commands) == 2
    for command in commands:
        run = [sys.executable, "-m", "data_tools", *command]
        done = subprocess.run(
            run, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert read_index(tmp_path / "data" / "web").documents == 2 * len(texts)
    assert read_index(tmp_path / "data" / "code").documents == len(texts)
