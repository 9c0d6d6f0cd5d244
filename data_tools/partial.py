"""An unfinished dataset: the folder `PREFIX.partial`, from which a killed run continues."""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, get_args

import numpy as np

from data_tools.atomic import replacing, sync
from data_tools.encoding import Part
from data_tools.engines import EngineName
from data_tools.errors import InputError, writing
from data_tools.indexed import bin_path, idx_path, write_index
from data_tools.inputs import SKIPPED
from data_tools.locks import open_locked
from data_tools.reading import locate

LOCK_IS_FREE_AFTER_REQUEUE = 600.0  # seconds: a node that SLURM lost may still hold it

_OURS = re.compile(r"lock|bin|lengths|skipped|idx|(settings|state)\.json|(idx|(settings|state)(\.json)?)\.tmp|parts-.*")


def skipped_path(prefix: str | Path) -> Path:
    """The list of broken lines that were left out of a dataset. Without broken lines, there is no such file."""
    return Path(f"{prefix}{SKIPPED}")


@dataclass(frozen=True)
class Stats:
    """What was done so far.

    documents: written; tokens: including end-of-document tokens; bytes: of UTF-8 text; empty: texts without tokens,
    left out; skipped: broken lines, rows and files, left out; seconds: of all runs together; read: bytes of the inputs.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    skipped: int = 0
    seconds: float = 0.0
    read: int = 0


@dataclass(frozen=True)
class State(Stats):
    """How far a run has come.

    engine: encodes the text; shards: how many are complete in the files; path, lines: the input file of the last shard,
    and its lines so far; problems, list_bytes: lines and bytes of the list of broken lines, where many rows may share a
    line; whole: everything is done except giving the files their names.
    """

    engine: EngineName = "tokenizers"
    shards: int = 0
    path: str = ""
    lines: int = 0
    problems: int = 0
    list_bytes: int = 0
    whole: bool = False


class Partial:
    """Use it as a context manager, which locks the folder against other processes.

    What was appended before a `commit` is kept for the next run with the same settings. A run that ends before its
    first commit leaves nothing behind.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.integer], settings: dict[str, Any]) -> None:
        self.folder = Path(f"{prefix}.partial")
        self._prefix, self._dtype, self._settings = prefix, np.dtype(dtype), settings
        self._state_path, self._settings_path = self.folder / "state.json", self.folder / "settings.json"
        self._index_path = self.folder / "idx"
        self._keep = False
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> "Partial":
        with writing(self.folder):
            self._lock = _locked(self.folder)
        if foreign := [path for path in self.folder.iterdir() if not _OURS.fullmatch(path.name)]:
            self._lock.close()
            raise InputError(f"{foreign[0]} is not a file of this program; move it away or choose another output")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self._keep:
            self._state_path.unlink(missing_ok=True)  # first, because without it the rest is ignored
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def is_whole(self) -> bool:
        """Whether an earlier run did everything except giving the files their names."""
        try:
            return json.loads(self._state_path.read_text())["whole"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return False

    def resume(self, overwrite: bool) -> State | None:
        """The state of an earlier run with the same settings, if there is one.

        Raises:
            InputError: the earlier run had other settings. With overwrite, its work is discarded instead.
        """
        if not self._state_path.exists():
            return None
        self._keep = True
        try:
            state = self._read_state()
            differs = difference(self._read_settings(), self._settings)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{self.folder}: cannot be read; delete it to start from the beginning") from error
        if not differs:
            return state
        if not overwrite:
            raise InputError(
                f"{self.folder} belongs to a run with {differs}; use the same inputs and settings, or start from "
                "the beginning with --overwrite"
            )
        return None

    def kept(self) -> State | None:
        """The state that a run with these settings left when it ended; None if it left nothing."""
        return self._read_state() if self._keep and self._read_settings() == self._settings else None

    def _read_settings(self) -> dict[str, Any]:
        return json.loads(self._settings_path.read_text())

    def _read_state(self) -> State:
        return _checked(State(**json.loads(self._state_path.read_text())))

    def open(self, state: State) -> Path:
        """Continue from a state and discard what was written after it. Returns an empty folder for workers' files."""
        self._close()
        with writing(self.folder):
            for folder in self.folder.glob("parts-*"):  # left by a killed run
                shutil.rmtree(folder, ignore_errors=True)
            if not state.shards:
                self._keep = False
                self._state_path.unlink(missing_ok=True)
                self._write_json(self._settings_path, self._settings)
            self._files = [open(self.folder / name, "ab") for name in ("bin", "lengths", "skipped")]
            sizes = (state.tokens * self._dtype.itemsize, state.documents * 4, state.list_bytes)
            for file, size in zip(self._files, sizes, strict=True):
                if file.tell() < size:
                    raise InputError(f"{file.name}: {file.tell()} bytes instead of {size}; delete {self.folder}")
                file.truncate(size)
                file.seek(size)
            # A new name each time: a worker that outlives its killed parent for a moment must not write here.
            return Path(tempfile.mkdtemp(prefix="parts-", dir=self.folder))

    def forget(self) -> None:
        """Keep nothing for a next run: the end of the `with` block removes the folder."""
        self._keep = False

    def append(self, state: State, part: Part, folder: Path) -> tuple[State, list[str]]:
        """Append the files of the next shard. Returns the new state, and the first problems of the shard."""
        before = state.lines if str(part.shard.path) == state.path else 0
        ids, lengths, skipped = self._files
        with writing(self.folder):
            for source, target in (("bin", ids), ("lengths", lengths)):
                with open(folder / f"{part.name}.{source}", "rb") as stream:
                    shutil.copyfileobj(stream, target, 1 << 22)
            first: list[str] = []
            with open(folder / f"{part.name}.problems", encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    number, _, message = line.rstrip("\n").partition(" ")
                    problem = locate(part.shard.path, before, int(number), message)
                    first += [problem] if len(first) < 20 else []
                    skipped.write(f"{problem}\n".encode())
            for kind in ("bin", "lengths", "problems"):
                (folder / f"{part.name}.{kind}").unlink()
        after = replace(
            state,
            shards=state.shards + 1,
            path=str(part.shard.path),
            lines=before + part.lines,
            documents=state.documents + part.documents,
            tokens=state.tokens + part.tokens,
            bytes=state.bytes + part.bytes,
            empty=state.empty + part.empty,
            skipped=state.skipped + part.skipped,
            problems=state.problems + part.problems,
            read=state.read + part.shard.size,
            list_bytes=skipped.tell(),
        )
        return after, first

    def commit(self, state: State) -> None:
        """Write everything that was appended to disk, and then the state that describes it."""
        with writing(self.folder):
            for file in self._files:
                sync(file)
            self._write_json(self._state_path, asdict(state))
        self._keep = True

    def publish(self, state: State) -> None:
        """Give the files their names, `.idx` last, and remove the folder. Can be repeated from any point."""
        with writing(self.folder):
            if not state.whole:
                self._write_index(state)
                self.commit(replace(state, whole=True))
            self._close()
            if self._index_path.exists():  # if not, it has its name already
                idx_path(self._prefix).unlink(missing_ok=True)  # an older one must never stand beside the new .bin
                _move(self.folder / "bin", bin_path(self._prefix))
                if state.skipped:
                    _move(self.folder / "skipped", skipped_path(self._prefix))
                else:
                    skipped_path(self._prefix).unlink(missing_ok=True)
                _sync_folder(idx_path(self._prefix).parent)
                _move(self._index_path, idx_path(self._prefix))
            _sync_folder(idx_path(self._prefix).parent)
        self._keep = False

    def _write_index(self, state: State) -> None:
        for file in self._files:
            file.flush()
        with replacing(self._index_path) as stream:
            lengths = np.memmap(self.folder / "lengths", np.int32, "r") if state.documents else np.zeros(0, np.int32)
            write_index(stream, self._dtype, lengths)

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        with replacing(path) as stream:
            stream.write(json.dumps(content).encode())

    def _close(self) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk, already reported; what counts has been synced
                file.close()
        self._files = []


def _locked(folder: Path) -> IO[bytes]:
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    deadline = time.monotonic() + (LOCK_IS_FREE_AFTER_REQUEUE if restarted else 0)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the process that held it has just ended and removed the folder
            if lock := open_locked(folder / "lock"):
                return lock
            if time.monotonic() > deadline and restarted:
                raise TimeoutError(errno.ETIMEDOUT, "is in use by another process, perhaps on a lost node", str(folder))
            if time.monotonic() > deadline:
                raise InputError(f"{folder} is in use: another process is making this dataset")
            time.sleep(0.2)


def _checked(state: State) -> State:
    """Raises ValueError if no run can have this state."""
    for field in fields(State):
        value = getattr(state, field.name)
        if type(value) is not type(field.default) or (isinstance(value, int | float) and not value >= 0):
            raise ValueError(f"{field.name} is {value!r}")
    if state.engine not in get_args(EngineName):
        raise ValueError(f"engine is {state.engine!r}")
    return state


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first difference, in words; empty if there is none. `inputs` has [path, size, time] of each file."""
    for name in new.keys() - {"inputs"}:
        if old[name] != new[name]:
            return f"{name} {old[name]!r}, not {new[name]!r}"
    before, now = ({path: about for path, *about in settings["inputs"]} for settings in (old, new))
    for path in now:
        if path not in before:
            return f"other inputs, without {path}"
        if before[path] != now[path]:
            return f"an older or newer {path}"
    for path in before:
        if path not in now:
            return f"other inputs, also {path}"
    return "" if list(before) == list(now) else "its inputs in another order"


def _move(source: Path, target: Path) -> None:
    if source.exists():
        os.replace(source, target)


def _sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
