"""Read a pickle into plain values and inert records: nothing that it names is called, whatever it says.

Only what torch and Megatron-Core write into the small files of a checkpoint, and torch's flight recorder into dumps, is
known. This is a restricted version of Python's unpickler, which would also call functions, take any memory that a file
asks for, and hash keys without end.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Collection, Mapping
from typing import Any

import torch

_Unpickler: Any = pickle._Unpickler  # the version in C cannot be restricted
Names = Mapping[str, Collection[str]]  # for each module, what a pickle may name in it


def read_pickle(content: bytes, name: str, known: Names) -> Any:
    """Plain values, dtypes, and inert records of what is `known`.

    Raises:
        ValueError: with a short reason that begins with `name`.
    """
    try:
        return _Reader(io.BytesIO(content), known).load()
    except Exception as error:  # unpickling rubbish raises anything
        raise ValueError(f"{name} cannot be read: {str(error)[:200] or type(error).__name__}") from None


class Record:
    """Stands for an object of the pickle. It does nothing."""

    kind = ""

    def __new__(cls, *arguments: Any, **more: Any) -> Record:
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


@functools.cache
def _record(kind: str) -> type[Record]:
    return type(kind, (Record,), {"kind": kind})


class _Reader(_Unpickler):
    stack: list[Any]
    append: Any

    def __init__(self, content: io.BytesIO, known: Names) -> None:
        super().__init__(content)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if name in self._known.get(module, ()):
            return _record(name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Any:
        """What `torch.save` writes for the numbers of a tensor: a tuple about them."""
        return pid

    def _keyed(self) -> None:
        """Set entries of a dictionary. A key must be a text or a record.

        The hash of nested tuples can take endless time, or the whole stack. Many numbers can have the same hash, so
        that each would be compared with all others.
        """
        items = self.pop_mark()
        if not all(isinstance(key, str | Record) for key in items[::2]):
            raise pickle.UnpicklingError("a key that no checkpoint has")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _keyed_by_one(self) -> None:
        self.metastack.append(self.stack[:-2])
        self.stack = self.stack[-2:]
        self.append = self.stack.append
        self._keyed()


_KNOWN = (
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET BINPUT LONG_BINPUT SHORT_BINUNICODE BINUNICODE GLOBAL "
    "STACK_GLOBAL REDUCE NEWOBJ BUILD EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS "
    "BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE BINPERSID"
)
_Reader.dispatch = {
    **{(code := getattr(pickle, name)[0]): _Unpickler.dispatch[code] for name in _KNOWN.split()},
    pickle.SETITEM[0]: _Reader._keyed_by_one,
    pickle.SETITEMS[0]: _Reader._keyed,
}
