"""One rank of a node speaks for all, if all of them find the same wrong.

The first rank of the node tells how far it has come by names that it listens at: abstract Unix sockets, which end with
the process and leave no file. Another rank that finds something wrong looks at them.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from enum import Enum

from jetmoe_megatron.stopping import FIRST_RANK_APPEARS, FIRST_RANK_SPEAKS


class Stage(Enum):
    BEGUN = "begun"
    HAS_DEVICE = "has device"
    CHECKED = "checked"


_listening: dict[Stage, socket.socket] = {}


def is_first_rank() -> bool:
    """Whether this rank is the first of its node, or alone there."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("LOCAL_WORLD_SIZE") == "1"


def passed(stage: Stage) -> None:
    """This rank has come so far."""
    if "RANK" not in os.environ or not is_first_rank():
        return
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_name(stage))
    except OSError:  # the name is taken: nobody finds this rank, and each speaks for itself
        listener.close()
        return
    listener.listen(1024)
    listener.setblocking(False)
    _listening[stage] = listener


def has_spoken() -> None:
    """This rank has said what is wrong."""
    if listener := _listening.pop(Stage.BEGUN, None):
        with listener, suppress(OSError):  # raised when none is left
            listener.shutdown(socket.SHUT_RD)  # no others connect
            while True:
                with listener.accept()[0] as other, suppress(BrokenPipeError):  # it has spoken for itself
                    other.send(b"!")


def first_rank_speaks(after: Stage | None) -> bool:
    """Wait for the first rank of the node after something wrong was found here.

    Args:
        after: the stage that the first rank reaches only if it does not find the same wrong; None: it always does.

    Returns:
        True if the first rank has said what is wrong. False if it has reached that stage, or ended without a word, or
        if the time is over: this rank must speak for itself.
    """
    began, connection = time.monotonic(), None
    while time.monotonic() < began + (FIRST_RANK_SPEAKS if connection else FIRST_RANK_APPEARS):
        if after and (seen := _connect(after)):
            seen.close()
            return False
        connection = connection or _connect(Stage.BEGUN)
        if connection is None:
            if after is None:
                return True
            time.sleep(0.05)  # it has not begun yet; or it has spoken, and the launcher is about to end this rank
            continue
        connection.settimeout(0.05)
        with suppress(TimeoutError):
            try:
                return connection.recv(1) == b"!"
            except ConnectionError:
                return False
    return False


def _connect(stage: Stage) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_name(stage))
        return connection
    except OSError:
        connection.close()
        return None


def _name(stage: Stage) -> str:
    """The same in all ranks of this start on this node."""
    start = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    return "\0" + " ".join(["jetmoe", str(os.getuid()), *start, stage.value])
