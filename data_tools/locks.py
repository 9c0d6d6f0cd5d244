"""Files and folders that one process at a time may work in."""

import fcntl


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until its descriptor is closed, at the latest at the end of the process.

    Returns:
        False if another process has locked it. True also if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
