"""Data sets in object storage, read by Megatron's own S3 reader from a server on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.errors import UserError
from tests.support import losses, pretrain, small_run, write_run

boto3 = pytest.importorskip("boto3")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket(data: dict[str, str]) -> Iterator[dict[str, str]]:
    """The data sets as objects."""
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        for name, path in data.items():
            for suffix in (".bin", ".idx"):
                client.upload_file(path + suffix, "corpus", f"sets/{name}{suffix}")
        yield {name: f"s3://corpus/sets/{name}" for name in data}
    running.stop()


def test_training_from_objects_equals_training_from_files(tmp_path: Path, data: dict, bucket: dict) -> None:
    for name, source, ranks in (("files", data, 1), ("objects", bucket, 2)):
        held_out = {"data": [{"name": "v", "path": source["held_out"]}], "sequences": 4}
        ended = pretrain(ranks, write_run(tmp_path / name, small_run(tmp_path / name, source, evaluation=held_out)))
        assert ended.returncode == 0, ended.stderr
    for ours, truth in zip(losses(tmp_path / "objects" / "run"), losses(tmp_path / "files" / "run"), strict=True):
        assert ours == pytest.approx(truth, rel=1e-5)
    assert not list((tmp_path / "objects" / "run").rglob("*.bin"))


def test_what_cannot_be_read_is_one_line(tmp_path: Path, bucket: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetmoe_megatron.data.ledger import fingerprint

    missing = {name: path.replace("sets", "nowhere") for name, path in bucket.items()}
    with pytest.raises(UserError, match=r"^s3://corpus/nowhere/code.idx: cannot be read \(.*404"):
        fingerprint(Run.model_validate(small_run(tmp_path, missing)), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs boto3, which is not installed: pip install boto3$"):
        fingerprint(Run.model_validate(small_run(tmp_path, bucket)), tmp_path)


def test_mix_counts_objects(tmp_path: Path, data: dict, bucket: dict) -> None:
    from jetmoe_megatron.data.mixture_report import shares

    files, objects = (shares(Run.model_validate(small_run(tmp_path, d)), tmp_path) for d in (data, bucket))
    assert objects == files
