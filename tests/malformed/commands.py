"""The real commands, thousands a minute: one process has loaded the libraries, and each command is a fork of it.

A fork runs the command's `main` with its arguments, folder and streams, and ends as the interpreter would end it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent.parent)  # in the place of tests/malformed/

from tests.support import REPO, environment

MAIN = {"pretrain": "pretrain_jetmoe", "jetmoe": "jetmoe_megatron.cli", "data_tools": "data_tools.__main__"}
_MEMORY = 4 << 30  # bytes that a command may use, so that one that grows without end ends
_LOADED = (
    *MAIN.values(),
    "data_tools.inspect",
    "data_tools.merge",
    "data_tools.split",
    "data_tools.tokenize",
    "fastokens",
    "jetmoe_megatron.convert.from_hf",
    "jetmoe_megatron.convert.verify",
    "jetmoe_megatron.data.prepare",
    "jetmoe_megatron.model.experts.choose",
    "jetmoe_megatron.monitor.report",
    "jetmoe_megatron.training.loop",
    "jetmoe_megatron.training.parallel",
    "jetmoe_megatron.training.preflight",
    "psutil",
    "sentencepiece",
    "transformers.models.auto.tokenization_auto",
)


class Commands:
    """`run` may be called again and again; use it as a context manager."""

    def __enter__(self) -> Commands:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment(), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            cwd=REPO,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.kill()
        self._server.wait()

    def run(self, *arguments: object, cwd: Path, scratch: Path, timeout: int = 60) -> tuple[int, str, str]:
        """`pretrain RUN.yaml`, `jetmoe ...` or `data_tools ...`: exit status, stdout, stderr.

        scratch: for temporary files of the command.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {
                "arguments": [str(argument) for argument in arguments],
                "cwd": str(cwd),
                "scratch": str(scratch),
                "streams": [str(out), str(err)],
                "timeout": timeout,
            }
            stdin, stdout = _pipes(self._server)
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
            assert answer, f"the server has died: {arguments}"
            return int(answer), out.read_text(errors="replace"), err.read_text(errors="replace")


def _pipes(server: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert server.stdin is not None and server.stdout is not None
    return server.stdin, server.stdout


def _serve() -> None:
    for name in _LOADED:
        importlib.import_module(name)
    gc.freeze()  # what is not touched is not copied
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _be(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be(request: dict) -> NoReturn:
    status = 1
    try:
        signal.alarm(request["timeout"])  # which ends it: the status is then not 2
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        for descriptor, file in ((0, os.devnull), *zip((1, 2), request["streams"], strict=True)):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
        os.chdir(request["cwd"])
        os.environ["TMPDIR"] = request["scratch"]
        tempfile.tempdir = None
        name, *sys.argv[1:] = request["arguments"]
        sys.argv[0] = name
        status = importlib.import_module(MAIN[name]).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
