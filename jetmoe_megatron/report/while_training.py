"""Write `report.html` while a run trains, in a separate process.

python -m jetmoe_megatron.report.while_training RUN_FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from data_tools.printing import say
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.report.write import write_report
from jetmoe_megatron.runtime.beside import start_beside


class Reports:
    """Begins a page after every `every` steps, unless the one before is not done; never if that is 0.

    Training never waits for a page, and a page that fails prints one line. Only rank 0 writes it.
    """

    def __init__(self, every: int, folder: Path) -> None:
        self._every, self._folder = every, folder
        self._process: subprocess.Popen[bytes] | None = None

    def step_done(self, step: int) -> None:
        """Its line must be in metrics.jsonl."""
        if not self._every or step % self._every:
            return
        if self._process:
            if (status := self._process.poll()) is None:
                return
            if status < 0:  # killed; any other failure was printed by the process
                self._warn(f"killed by signal {-status}")
        try:
            self._process = start_beside("jetmoe_megatron.report.while_training", self._folder)
        except OSError as error:
            self._process = None
            self._warn(str(error))

    def close(self) -> None:
        """End a page that is not done: the run writes a newer one."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _warn(self, reason: str) -> None:
        say(f"warning: {RunFolder(self._folder).report}: not written: {reason}", sys.stderr)


if __name__ == "__main__":
    os.nice(10)
    write_report(Path(sys.argv[1]))
