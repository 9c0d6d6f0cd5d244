"""What a run reads, kept in its checkpoints. A resumed run must read the same data, or set `data.new_blend`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.mixture import Position
from jetmoe_megatron.data.storage import content_key
from jetmoe_megatron.errors import UserError


@dataclass(frozen=True)
class Ledger:
    """The data part of a checkpoint."""

    blend: dict[str, Any]  # its fingerprint
    began: Position = Position()  # where this blend began
    read: Position = Position()  # where the run is
    past: list[dict[str, Any]] = field(default_factory=list)  # blends that ended before, each as a ledger without past

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Ledger:
        return cls(saved["blend"], Position(**saved["began"]), Position(**saved["read"]), saved["past"])

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def rolled_back(self) -> bool:
        return bool(self.past) and "kept" in self.past[-1]

    @property
    def reads_again(self) -> list[str]:
        """Why a run that begins this blend reads every data set from its beginning; empty if it does not."""
        return _other_order(self.past[-1]["blend"], self.blend) if self.past and self.read == self.began else []

    def back_to(self, kept: Position) -> Ledger:
        """Continue at sample `kept.sample` with unread data. The ledger that ends keeps both positions."""
        ended = {key: value for key, value in self.dump().items() if key != "past"}
        now = Position(kept.sample, self.read.sequences)
        return Ledger(self.blend, began=now, read=now, past=[*self.past, {**ended, "kept": asdict(kept)}])


def fingerprint(run: Run, cache: Path) -> dict[str, Any]:
    """Everything that determines the samples of a run. Paths are not included, because data may move."""
    paths = {d.name: d.path for phase in run.phases for d in phase.data if d.weight > 0}
    documents = {"reset_positions": run.data.reset_positions, "mask_attention": run.data.mask_attention}
    return {
        "seed": run.seed,
        "sequence_length": run.batch.sequence_length,
        "global_tokens": run.batch.global_tokens,  # phases are rounded up to whole steps
        "tokenizer": _tokenizer_key(Path(run.tokenizer)) if run.tokenizer else None,
        "documents": {**documents, "mask_loss": run.data.mask_loss},
        "content": {name: content_key(path, cache) for name, path in sorted(paths.items())},
        "phases": {
            phase.name: {
                "tokens": phase.tokens,
                "share": {d: round(share, 12) for d, share in phase.shares.items() if share},
            }
            for phase in run.phases
        },
    }


def ledger_of(
    run: Run, blend: dict[str, Any], saved: dict[str, Any] | None, where: Path | None, told: Collection[str] = ()
) -> Ledger:
    """The ledger that a run continues with: a new one, that of the checkpoint `where`, or that with a new blend.

    A data set with changed content counts as a new one, of which nothing was read. The same holds for all data sets if
    another seed or sequence length changes the order of their sequences.

    Args:
        told: keys of `blend` that the caller refuses for the same reason.

    Raises:
        UserError: the checkpoint has another blend and `data.new_blend` does not allow it; names all differences.
    """
    if saved is None:
        return Ledger(blend)
    ledger = Ledger.load(saved)
    changes = differences(ledger.blend, blend)
    if not changes:
        return ledger
    if not run.data.new_blend:
        changes = [text for text in changes if text.split(" ")[0] not in told]
    if changes and not run.data.new_blend:
        raise UserError(
            f"{where}: was trained on other data: {'; '.join(changes)}. Set it back, or continue with the new blend "
            "from here: data.new_blend=true"
        )
    before: dict[str, str] = {}  # a data set that a blend leaves out may come back
    for one in (*ledger.past, {"blend": ledger.blend}):
        before |= one["blend"]["content"]
    now = before | blend["content"]
    still = {name: n for name, n in ledger.read.sequences.items() if now.get(name) == before.get(name)}
    read = Position(ledger.read.sample, still)
    if _other_order(ledger.blend, blend):
        tokens = ledger.read.sample * ledger.blend["sequence_length"]
        read = Position(tokens // blend["sequence_length"])
    ended = {key: value for key, value in ledger.dump().items() if key != "past"}
    return Ledger(blend, began=read, read=read, past=[*ledger.past, ended])


def _other_order(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences that make sequence n of a data set a different one than before."""
    first, second = ({key: blend.get(key) for key in ("seed", "sequence_length")} for blend in (before, now))
    return differences(first, second)


def differences(before: dict[str, Any], now: dict[str, Any], key: str = "") -> list[str]:
    """One short text for each entry that was added, left out or changed."""
    found = []
    for name in sorted({**before, **now}):
        a, b = before.get(name), now.get(name)
        where = f"{key}.{name}" if key else name
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, where)
        elif a != b:
            found.append(f"{where} {_shown(a)} -> {_shown(b)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items()) + "}"
    return "none" if value is None else str(value)


def _tokenizer_key(folder: Path) -> str | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
    return None
