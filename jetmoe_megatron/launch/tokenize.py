"""`jetmoe launch tokenize`: an array of jobs of SLURM that tokenizes, and a job that merges what they made."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.atomic import replacing
from data_tools.engines import open_reference
from data_tools.errors import writing
from data_tools.inputs import find_files
from data_tools.outputs import check_output
from data_tools.parts import check_parts
from jetmoe_megatron.config.site import Site
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.launch.launch import submit
from jetmoe_megatron.launch.render import output_pattern, tokenize_script


@dataclass(frozen=True)
class Work:
    """What to tokenize, as the user named it.

    options: more of `jetmoe data tokenize`; overwrite: replace an existing dataset.
    """

    inputs: list[str]
    prefix: str
    tokenizer: str
    parts: int
    options: list[str] = field(default_factory=list)
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """For the script, and for what the jobs print."""
        return Path(f"{self.prefix}.tokenize").absolute()

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"

    @property
    def output(self) -> str:
        """Of the job that merges, as `sbatch --output` takes it."""
        return output_pattern(self.folder, "merge-%j.out")


def check(work: Work) -> None:
    """Raises InputError: what a task would find wrong, or the output exists."""
    check_output(work.prefix, [], work.overwrite)
    check_parts(work.parts, find_files(work.inputs))
    open_reference(work.tokenizer)


def script(work: Work, site: Site) -> str:
    """For `sbatch`, without arguments. Relative paths are those of the folder that it is submitted in."""
    quoted = shlex.quote(str(work.script))
    after = f"--kill-on-invalid-dep=yes --output={shlex.quote(work.output)}"
    return tokenize_script(
        site,
        Path(work.prefix).name,
        output_pattern(work.folder, "part-%a-job-%A.out"),
        [
            f"array=$(sbatch --parsable --array=1-{work.parts} {quoted})",
            f'sbatch --dependency="afterok:$array" {after} {quoted}',
        ],
        [str(work.parts), work.prefix, *work.inputs, "--tokenizer", work.tokenizer, *work.options],
        work.overwrite,
    )


def submit_all(work: Work, site: Site) -> tuple[str, str]:
    """Returns the numbers of the array and of the job that merges.

    Raises:
        UserError: SLURM refuses one of them; then neither is left.
    """
    with writing(work.script):
        work.folder.mkdir(parents=True, exist_ok=True)
        with replacing(work.script) as file:
            file.write(script(work, site).encode())
    array = submit(work.script, f"--array=1-{work.parts}")
    try:
        after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", f"--output={work.output}"]
        return array, submit(work.script, *after)
    except UserError:
        subprocess.run(["scancel", array], check=False)
        raise
