"""Open an indexed dataset, on disk or in object storage (`s3://bucket/prefix`, `msc://profile/prefix`).

Megatron's own readers read object storage: the index is copied into a local folder, and tokens are fetched when they
are read. An existing copy is used without a check: delete it if the object has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import (
    ObjectStorageConfig,
    cache_index_file,
    get_index_cache_path,
    is_object_storage_path,
)

from data_tools.atomic import temporary_path
from jetmoe_megatron.errors import UserError

_LOOKS, _LOOK_BYTES = 2048, 4096  # of content_key
_PACKAGES = {"s3": ("boto3", "boto3"), "msc": ("multistorageclient", "multi-storage-client")}


def in_object_storage(path: str) -> bool:
    return is_object_storage_path(path)


def fetch_index(path: str, folder: Path) -> Path:
    """Copy the index of an object-storage dataset to where Megatron looks for it. Several processes may call it.

    Raises:
        UserError: the path has another scheme, the reader's package is not installed, or the object cannot be read.
    """
    scheme = path.split("://")[0]
    if scheme not in _PACKAGES:
        raise UserError(f"{path}: data is read from files, s3:// and msc://")
    module, package = _PACKAGES[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{path}: reading it needs {module}, which is not installed: pip install {package}")
    local = Path(get_index_cache_path(f"{path}.idx", _config(folder)))
    if not local.is_file():
        aside = temporary_path(local)
        try:
            cache_index_file(f"{path}.idx", str(aside))
            os.replace(aside, local)
        except Exception as error:  # botocore's and the file system's have no other base in common
            raise UserError(f"{path}.idx: cannot be read ({error})") from error
        finally:
            aside.unlink(missing_ok=True)
    return local


def open_dataset(path: str, folder: Path) -> IndexedDataset:
    """`folder` holds the indices fetched from object storage."""
    if not in_object_storage(path):
        return IndexedDataset(path)
    fetch_index(path, folder)
    dataset = IndexedDataset.__new__(IndexedDataset)  # its __init__ would overwrite the index that others read
    dataset.initialize(path, multimodal=False, mmap=False, object_storage_config=_config(folder))
    return dataset


def count_tokens(indexed: IndexedDataset) -> int:
    """The number of tokens, from the end of the index without reading the rest of it."""
    if not len(indexed):
        return 0
    pointer, length, _ = indexed.index[len(indexed) - 1]
    return int(pointer) // np.dtype(indexed.index.dtype).itemsize + int(length)


def content_key(path: str, folder: Path) -> str:
    """A short hash of a dataset: the size of its index and, on disk, of its tokens, and samples spread over both.

    A small file is read completely. In a large file, a change of a thousandth of it is noticed, for example shards
    joined in a different order. A smaller change may be missed.
    """
    digest = hashlib.sha256()
    files = [fetch_index(path, folder)] if in_object_storage(path) else [f"{path}.idx", f"{path}.bin"]
    for file in files:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for start in range(0, size, max(_LOOK_BYTES, size // _LOOKS)):
                digest.update(os.pread(stream.fileno(), _LOOK_BYTES, start))
    return digest.hexdigest()[:16]


def _config(folder: Path) -> ObjectStorageConfig:
    return ObjectStorageConfig(path_to_idx_cache=str(folder))
