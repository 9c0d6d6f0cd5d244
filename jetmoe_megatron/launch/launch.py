"""`jetmoe launch`: the scripts of a run, written into its folder and started."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal, NoReturn

from data_tools.atomic import replacing
from jetmoe_megatron.config import Run, dump_run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.site import Site
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.launch.render import TRAINER, host_scripts, output_pattern, slurm_script
from jetmoe_megatron.runtime.clock import utc_now

Way = Literal["local", "ssh", "slurm"]


def scripts(run: Run, site: Site, way: Way) -> dict[Path, str]:
    """The scripts of a run and its resolved run file, each with the path where it belongs. The first starts the run.

    Raises:
        UserError: the site lacks something, or its number of ranks does not fit the run.
    """
    if not TRAINER.exists():
        raise UserError(f"{TRAINER} is not there: install from a clone, with pip install -e .")
    if not site.ranks:
        raise UserError("ranks_per_node: must be given where gpus_per_node is 0")
    if way == "ssh" and len(site.hosts) < site.nodes:
        raise UserError(f"hosts: {len(site.hosts)} are fewer than nodes ({site.nodes})")
    if site.numa_binding and site.tasks == "rank":
        raise UserError("numa_binding: torchrun's, which `tasks: rank` does not start; leave one of them out")
    if run.checkpoint.resume == "never":
        raise UserError("checkpoint.resume: a run that comes back by itself needs auto, not never")
    if site.container and way != "slurm":
        raise UserError(f"container: `jetmoe launch {way}` starts the ranks outside containers")
    resolve_layout(run, site.ranks * (1 if way == "local" else site.nodes))
    files = RunFolder.of(run)
    folder = files.launches.absolute() / utc_now().replace(":", "")
    if way == "slurm":
        script, output = folder / "job.sbatch", output_pattern(files.logs.absolute(), "job-%j.out")
        texts = {script: slurm_script(site, run.name, folder / "run.yaml", output, usage=str(script))}
    else:
        texts = {
            folder / name: text
            for name, text in host_scripts(site, run.name, way == "ssh", str(folder / "job.sh")).items()
        }
    return {**texts, folder / "run.yaml": dump_run(run)}


def shown(texts: dict[Path, str]) -> str:
    """What `scripts` gives, to be read. The first script has no line above it, which would hide its `#!`."""
    (_, first), *others, (run, _) = texts.items()
    below = [f"\n# --- {path} ---\n{text}" for path, text in others]
    return "".join([first, *below, f"\n# Needs {run}: run this command without --print\n"])


def write(texts: dict[Path, str], run: Run) -> Path:
    """Returns the script that starts the run."""
    RunFolder.of(run).logs.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    return next(iter(texts))


def submit(script: Path, *options: str) -> str:
    """Returns the number of the job of SLURM.

    Raises:
        UserError: SLURM refuses the job.
    """
    sbatch = subprocess.run(["sbatch", "--parsable", *options, script], capture_output=True, text=True)
    if sbatch.returncode:
        raise UserError(f"sbatch refuses {script}: {' '.join(sbatch.stderr.split())}")
    return sbatch.stdout.split(";")[0].strip()


def check_slurm() -> None:
    """Raises UserError if no job can be submitted here."""
    if not shutil.which("sbatch"):
        raise UserError("there is no sbatch here: run this where jobs are submitted to SLURM, or add --print")


def start(script: Path) -> NoReturn:
    """Become the script."""
    os.execvp("bash", ["bash", str(script)])
