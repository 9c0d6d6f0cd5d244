"""What a site file may say: how runs are started on one cluster. `jetmoe launch` reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from jetmoe_megatron.config.load import load_file
from jetmoe_megatron.config.schema import Count, Fraction, Positive, Section
from jetmoe_megatron.errors import UserError


class _Like:
    """Text that matches a pattern, with a plain message where it does not."""

    def __init__(self, pattern: str, must: str) -> None:
        self.pattern, self.must = pattern, must

    def _check(self, value: str) -> str:
        if not re.fullmatch(self.pattern, value):
            raise PydanticCustomError("pattern", "{must}", {"must": self.must})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: Any) -> dict[str, Any]:
        return {**handler(core), "pattern": f"^({self.pattern})$"}


_Word = Annotated[str, _Like(r"\S+", "must be one word")]
_Path = Annotated[str, Field(min_length=1)]
_Time = Annotated[str, _Like(r"(\d+-)?\d+:\d\d:\d\d", "must be hours:minutes:seconds or days-hours:minutes:seconds")]
_Option = Annotated[str, _Like(r"--(?!ar)\S+", "must be one option, as --qos=long, and not --array")]
_Variable = Annotated[str, _Like(r"[A-Za-z_]\w*=.*", "must be NAME=value")]


class Container(Section):
    """A container that the ranks run in. It needs the repository, the data and `output_dir` as mounts."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: NVIDIA's plugin of `srun` (enroot). `apptainer`: the program of that name."""
    image: _Path
    """Path or address of the image, as the runtime takes it."""
    mounts: list[_Path] = Field([])
    """Folders of the host that the container sees under the same name, or as `HOST:CONTAINER`."""


class Site(Section):
    """How runs are started on this cluster."""

    nodes: Positive = 1
    """Nodes of a run."""
    gpus_per_node: Count = 8
    """GPUs of a node, each with a rank. 0: the ranks compute on CPUs."""
    ranks_per_node: Positive | None = None
    """Ranks of a node. null: one for each GPU."""
    tasks: Literal["node", "rank"] = "node"
    """What SLURM starts on a node: one launcher, which starts the ranks, or each rank by itself."""
    cpus_per_node: Positive = 96
    """Cores that a run takes on each node."""
    exclusive: bool = True
    """Whether a run has its nodes, and all of their memory, to itself."""
    account: _Word | None = None
    """Account of SLURM."""
    partition: _Word | None = None
    """Partition of SLURM. null: the default one."""
    time: _Time = "24:00:00"
    """Time limit of a job, as hours:minutes:seconds or days-hours:minutes:seconds. The run goes on in the next job."""
    warning_seconds: Annotated[Positive, Field(le=65535)] = 600
    """How long before the time limit the run is told to save and to stop; less than `time`."""
    sbatch: list[_Option] = Field([])
    """More options of `sbatch`, such as `--qos=long`."""
    starts_without_progress: Positive = 3
    """Starts that save no new checkpoint, after which a job does not come back by itself."""
    doctor: bool = True
    """Whether `jetmoe doctor --ranks` examines the nodes before each start of the ranks; with SLURM only."""
    doctor_tolerance: Fraction = 0.2
    """How far below the median a rate may be before the doctor calls a rank sick."""
    setup: list[_Path] = Field([])
    """Lines of bash that run first on the machine that starts the ranks: modules, or a virtual environment."""
    python: _Path | None = None
    """The Python to run. null: the one that runs `jetmoe launch`, and `python` in a container."""
    container: Container | None = None
    """null: the ranks run on the nodes themselves."""
    environment: list[_Variable] = Field([])
    """Variables of the ranks, as `NCCL_IB_HCA=mlx5_0`."""
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = None
    """How torchrun binds each rank to the cores near its GPU. null: not at all."""
    hosts: list[_Word] = Field([])
    """For `jetmoe launch ssh`: the hosts, the first of which hosts the rendezvous."""

    @property
    def ranks(self) -> int:
        """Of a node."""
        return self.ranks_per_node or self.gpus_per_node


def load_site(path: Path) -> Site:
    """Raises UserError: one line that names the file and the key."""
    site = load_file(path, Site)
    if 0 < _seconds(site.time) <= site.warning_seconds:  # 0: no limit
        raise UserError(f"{path}: warning_seconds: {site.warning_seconds} are not less than time ({site.time})")
    return site


def _seconds(time: str) -> int:
    days, _, of_day = time.rpartition("-")
    hours, minutes, seconds = map(int, of_day.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
