"""Export a run's checkpoints as Hugging Face folders during training, each in a separate process.

python -m jetmoe_megatron.convert.export CHECKPOINT OUT
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from data_tools.printing import say
from jetmoe_megatron.runtime.beside import start_beside


class Exports:
    """Exports the first checkpoint at or after each multiple of `every_tokens`; nothing if that is 0.

    Training waits for exports only at its end. An export that fails prints one line and never stops training. Only
    rank 0 exports.
    """

    def __init__(self, every_tokens: int, root: Path) -> None:
        """root: the folder of the exports `tokens_<N>`. Unfinished exports in it are removed."""
        self._every, self._root = every_tokens, root
        if every_tokens:
            for unfinished in root.glob("tokens_*.partial"):
                shutil.rmtree(unfinished, ignore_errors=True)
            for lock in root.glob("tokens_*.partial.lock"):  # of an export that was killed
                lock.unlink(missing_ok=True)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by the tokens of the checkpoint

    def checkpoint_published(self, checkpoint: Path) -> None:
        """Begin an export of `tokens_<N>` if one is due."""
        tokens = _tokens(checkpoint)
        if not is_due(self._every, tokens, newest_of(self._root.glob("tokens_*"))):
            return
        out = self._root / checkpoint.name
        try:
            _begun(out).mkdir(parents=True)
            self._processes[tokens] = start_beside("jetmoe_megatron.convert.export", checkpoint, out)
        except OSError as error:
            _warn(out, error)

    def is_reading(self, tokens: int) -> bool:
        """Whether an export still reads the checkpoint at `tokens`, which must stay until it is done."""
        return tokens in self._processes and self._processes[tokens].poll() is None

    def wait(self) -> None:
        """Wait for the running exports, because a batch system may end them with the job."""
        for tokens, process in self._processes.items():
            if process.wait() < 0:  # killed; any other failure was printed by the process
                _warn(self._root / f"tokens_{tokens}", ChildProcessError(f"killed by signal {-process.returncode}"))
        self._processes.clear()


def is_due(every: int, tokens: int, begun: int) -> bool:
    """Whether the checkpoint at `tokens` is to be exported. begun: tokens of the newest export so far."""
    return every > 0 and tokens // every > begun // every


def newest_of(exports: Iterable[Path]) -> int:
    """Tokens of the newest one, 0 if there is none."""
    return max(map(_tokens, exports), default=0)


def _begun(out: Path) -> Path:
    """The folder of an unfinished export, where the conversion writes."""
    return out.with_name(out.name + ".partial")


def _tokens(path: Path) -> int:
    """Of a checkpoint, or of an export, also an unfinished one; 0 for another name."""
    match = re.fullmatch(r"tokens_(\d+)(\.partial)?", path.name)
    return int(match[1]) if match else 0


def _warn(out: Path, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    say(f"warning: {out}: not exported: {reason}", sys.stderr)


def main() -> int:
    from jetmoe_megatron.convert.to_hf import convert_to_hf  # here, because training imports this file

    checkpoint, out = map(Path, sys.argv[1:])
    os.nice(10)
    try:
        convert_to_hf(checkpoint, out, check=False)  # its checksums were computed a moment ago
    except Exception as error:
        shutil.rmtree(_begun(out), ignore_errors=True)
        _warn(out, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
