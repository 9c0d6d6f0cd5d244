"""The disk of a run: may it be written, and is there room for a checkpoint?"""

from __future__ import annotations

import os

from data_tools.units import shown
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.doctor.disk import checkpoint_bytes, nearest_folder
from jetmoe_megatron.doctor.host import room
from jetmoe_megatron.doctor.problems import Problem
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.training.preflight import check_output


def disk_of(run: Run) -> tuple[list[tuple[str, str]], list[Problem]]:
    folder, needed = RunFolder.of(run).root, checkpoint_bytes(run)
    answers = [("a checkpoint", f"about {shown(needed, 'B')}")]
    try:
        check_output(run)
    except UserError as error:
        return answers, [Problem("wrong", str(error), "", "change output_dir, or make it writable")]
    there = nearest_folder(folder)
    answers.append(("disk", f"{folder}: {room(there)}"))
    disk = os.statvfs(there)
    if (free := disk.f_bavail * disk.f_frsize) < needed:
        what = f"output_dir: {folder} has {shown(free, 'B')} free"
        return answers, [Problem("wrong", what, "that is less than one checkpoint", "make room, or change output_dir")]
    return answers, []
