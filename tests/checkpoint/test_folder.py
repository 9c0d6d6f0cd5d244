from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.checkpoint.folder import clear_unfinished, keep_last, newest, published


def test_order_and_what_counts(tmp_path: Path) -> None:
    for name in ("tokens_90", "tokens_1000", "tokens_200", "tokens_5000.partial", "other", "tokens_x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in published(tmp_path)] == ["tokens_90", "tokens_200", "tokens_1000"]
    assert newest(tmp_path) == tmp_path / "tokens_1000"
    keep_last(tmp_path, 2)
    assert [p.name for p in published(tmp_path)] == ["tokens_200", "tokens_1000"]
    clear_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "tokens_1000", "tokens_200", "tokens_x"]


def test_no_folder(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
