from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.checkpoint.folder import (
    clear_unfinished,
    newest,
    publish,
    published,
    retain,
    set_aside,
    unfinished_path,
)


def test_order_and_what_counts(tmp_path: Path) -> None:
    for name in ("tokens_90", "tokens_1000", "tokens_200", "tokens_5000.partial-ab", "other", "tokens_x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in published(tmp_path)] == ["tokens_90", "tokens_200", "tokens_1000"]
    assert newest(tmp_path) == tmp_path / "tokens_1000"
    retain(tmp_path, 1, lambda tokens: tokens == 90)
    assert [p.name for p in published(tmp_path)] == ["tokens_90", "tokens_1000"]
    (tmp_path / "tokens_2000").mkdir()
    retain(tmp_path, 1, lambda tokens: tokens in (90, 2000))
    assert [p.name for p in published(tmp_path)] == ["tokens_90", "tokens_1000", "tokens_2000"]
    (tmp_path / "tokens_2000").rmdir()
    clear_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "tokens_1000", "tokens_90", "tokens_x"]


def test_no_folder(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None


def test_publish_replaces_and_set_aside_keeps(tmp_path: Path) -> None:
    path = tmp_path / "tokens_5"
    for content in ("first", "second"):
        aside = unfinished_path(path)
        aside.mkdir()
        (aside / "file").write_text(content)
        assert published(tmp_path) == ([] if content == "first" else [path])
        publish(aside, path)
    assert (path / "file").read_text() == "second"
    assert set_aside(path).name == "tokens_5.damaged"
    path.mkdir()
    other = set_aside(path)
    assert other.name.startswith("tokens_5.damaged-") and (tmp_path / "tokens_5.damaged" / "file").exists()
    assert published(tmp_path) == []
