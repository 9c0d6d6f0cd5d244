"""The scripts that start a run, rendered from `templates/` with the settings of a site."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2

from jetmoe_megatron.config.site import Container, Site, load_site
from jetmoe_megatron.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINER = REPOSITORY / "pretrain_jetmoe.py"
HOST_SCRIPTS = {"job.sh": "hosts.sh", "host.sh": "host.sh"}


def slurm_script(
    site: Site,
    name: str,
    run: Path,
    output: str,
    usage: str,
    trainer: Path = TRAINER,
    python: str | None = None,
) -> str:
    """A script for `sbatch`.

    Args:
        name: of the run.
        run: the run file.
        output: pattern of the file for what the script and the ranks print, as `sbatch --output` takes it.
        usage: path of the script itself, for its comment.
        trainer: path of pretrain_jetmoe.py where the job runs.
        python: the Python to run; by default that of the site.
    """
    gpus = f", each with {site.gpus_per_node} GPUs" if site.gpus_per_node else ""
    return _render(
        "slurm.sh",
        site,
        python,
        tasks=site.tasks,
        title=f"Pretrain {name} on {site.nodes} nodes{gpus}.",
        minutes=f"{site.warning_seconds:,} seconds",
        usage=usage,
        # Paths of the run file start where it was launched.
        options=_options_of_run(site, name, output, Path.cwd() if trainer.is_absolute() else None),
        run=run,
        trainer=trainer,
        pythonpath=trainer.parent if trainer.is_absolute() else None,
        ranks_per_node=site.ranks_per_node or "$SLURM_GPUS_ON_NODE",
        cores="SLURM_CPUS_PER_TASK",
    )


def host_scripts(site: Site, name: str, ssh: bool, usage: str) -> dict[str, str]:
    """Scripts for machines without a scheduler, by file name: job.sh starts host.sh on each host.

    Args:
        name: of the run.
        ssh: start them through ssh on the hosts of the site; else on this machine.
        usage: path of job.sh, for its comment.
    """
    where = f"{site.nodes} of {len(site.hosts)} hosts, on each" if ssh else "this machine,"
    values: dict[str, Any] = {
        "tasks": "node",
        "title": f"Pretrain {name} on {where} with {site.ranks} ranks.",
        "usage": usage,
        "folder": Path.cwd(),
        "run": Path(usage).with_name("run.yaml"),
        "trainer": TRAINER,
        "pythonpath": REPOSITORY,
        "ranks_per_node": site.ranks,
        "cores": "$(nproc)",
        "ssh": ssh,
        "hosts": shlex.join(site.hosts) if ssh else '"$(uname -n)"',
        "nodes": site.nodes if ssh else 1,
        # Below the ephemeral ports; on one machine, any that is free.
        "endpoint": "${chosen[0]#*@}:$((20000 + RANDOM % 10000))" if ssh else "localhost:0",
    }
    return {name: _render(template, site, **values) for name, template in HOST_SCRIPTS.items()}


def tokenize_script(
    site: Site,
    name: str,
    output: str,
    usage: list[str],
    arguments: list[str] | None = None,
    overwrite: bool = False,
    python: str | None = None,
) -> str:
    """A script for `sbatch`, as an array and then as the job that merges.

    Args:
        name: of the data set.
        output: pattern of the file for what a job prints, as `sbatch --output` takes it.
        usage: the commands that submit it, for its comment.
        arguments: what it does if it is given none: the number of parts, the prefix, then arguments of `tokenize`.
        overwrite: replace the merged data set.
        python: the Python to run; by default that of the site. With it, the job starts in the root of the repository.
    """
    return _render(
        "tokenize.sh",
        site,
        python,
        usage=usage,
        options=_sbatch_options(site, f"tokenize-{name}", output, nodes=1, ntasks=1, cpus_per_task=site.cpus_per_node),
        arguments=shlex.join(arguments) if arguments else None,
        overwrite=overwrite,
        pythonpath=None if python else REPOSITORY,
    )


def output_pattern(folder: Path, name: str) -> str:
    """A file in a folder, for `sbatch --output`, which fills in `%j` and others.

    Raises:
        UserError: SLURM cannot write there.
    """
    if "\\" in str(folder):
        raise UserError(f"{folder}: SLURM cannot write to a path with a backslash")
    return f"{str(folder).replace('%', '%%')}/{name}"


def shipped_scripts() -> dict[str, str]:
    """The files of scripts/slurm, which run from the root of the repository."""
    site = load_site(REPOSITORY / "configs/site.yaml")
    pretrain, tokenize = "scripts/slurm/pretrain_jetmoe.sbatch", "scripts/slurm/tokenize.sbatch"
    run, trainer = Path("configs/jetmoe_8b/run.yaml"), Path("pretrain_jetmoe.py")
    python = "${PYTHON:-python}"  # that of the environment that is active where the script is submitted
    submit = [
        f"array=$(sbatch --parsable --array=1-8 {tokenize} 8 data/web corpus/ --tokenizer data/tokenizer)",
        f'sbatch --dependency="afterok:$array" --kill-on-invalid-dep=yes {tokenize} 8 data/web',
    ]
    return {
        pretrain: slurm_script(site, "jetmoe-8b", run, "%x-%j.out", pretrain, trainer, python),
        tokenize: tokenize_script(site, "web", "%x-%j.out", submit, python=python),
    }


def _options_of_run(site: Site, name: str, output: str, folder: Path | None) -> list[str]:
    ranks = site.ranks if site.tasks == "rank" else 1
    return _sbatch_options(
        site,
        name,
        output,
        nodes=site.nodes,
        ntasks_per_node=ranks,
        gpus_per_node=site.gpus_per_node or None,
        cpus_per_task=max(site.cpus_per_node // ranks, 1),
        chdir=shlex.quote(str(folder)) if folder else None,
    )


def _sbatch_options(site: Site, name: str, output: str, **options: int | str | None) -> list[str]:
    chosen = {
        "job-name": re.sub(r"[^\w.-]", "-", name),
        **{option.replace("_", "-"): value for option, value in options.items()},
        "time": site.time,
        "signal": f"B:USR1@{site.warning_seconds}",
        "open-mode": "append",
        "output": shlex.quote(output),
        "account": site.account,
        "partition": site.partition,
    }
    lines = [f"--{option}={value}" for option, value in chosen.items() if value is not None]
    return [*lines, "--requeue", *(["--exclusive", "--mem=0"] if site.exclusive else []), *site.sbatch]


def _render(template: str, site: Site, python: str | None = None, **values: Any) -> str:
    """python: what the script runs; by default that of the site, or the one that runs here."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        comment_start_string="{##",  # bash has its own use for the usual one
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["assignment"] = _assignment
    numa = f" --numa-binding={site.numa_binding}" if site.numa_binding else ""
    return environment.get_template(template).render(
        setup=site.setup,
        python=python or shlex.quote(site.python or ("python" if site.container else sys.executable)),
        environment=site.environment,
        doctor=site.doctor,
        doctor_tolerance=site.doctor_tolerance,
        starts_without_progress=site.starts_without_progress,
        numa_binding=numa,
        container=site.container.runtime if site.container else None,
        container_options=_container_options(site.container),
        inside='"${container[@]}" ' if site.container else "",
        **values,
    )


def _assignment(variable: str) -> str:
    name, _, value = variable.partition("=")
    return f"{name}={shlex.quote(value)}"


def _container_options(container: Container | None) -> str:
    """Elements of a bash array. The working directory is that of the script."""
    if container is None:
        return ""
    mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts)
    image, mounts = _quoted(container.image), _quoted(mounts) if mounts else ""
    if container.runtime == "pyxis":
        mount = f"--container-mounts={mounts} " if mounts else ""
        return f'--container-image={image} {mount}--container-workdir="$PWD"'
    bind = f"--bind {mounts} " if mounts else ""
    return f'apptainer exec --nv {bind}--pwd "$PWD" {image}'


def _quoted(text: str) -> str:
    """As `shlex.quote`, with quotes in any case: in a bash array, a comma looks like a mistake."""
    return shlex.quote(text) if shlex.quote(text) != text else f"'{text}'"


if __name__ == "__main__":  # SCRIPT: one of scripts/slurm
    print(shipped_scripts()[sys.argv[1]], end="")
