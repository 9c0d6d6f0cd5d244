"""Layouts that are one change away."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from jetmoe_megatron.plan.settings import Settings, legal, needs_more, neighbours, saving, spending
from tests.plan.small_plans import run

OWN = Settings(1, 2, 1, 2, 1, "replicated", 1, "selective")


def changed(one: Settings, other: Settings) -> set[str]:
    return {name for name, value in asdict(one).items() if asdict(other)[name] != value}


def test_settings_are_those_of_the_run_and_back() -> None:
    own = run(parallel={"pipeline": 2, "layers_per_stage": [1, 3], "expert": 2}, recompute="full")
    settings = Settings.of(own)
    assert settings == Settings(1, 2, 1, 2, 1, "replicated", own.batch.micro_sequences, "full")
    assert settings.apply(own) == own
    assert Settings(1, 1, 1, 1, 1, "replicated", 1, "none").apply(own).parallel.layers_per_stage is None


def test_neighbours_are_legal_and_near() -> None:
    found = list(neighbours(run(), OWN, 4))
    assert len(set(found)) == len(found) and OWN not in found
    for settings in found:
        assert legal(run(), settings, 4)
        assert len(changed(settings, OWN)) in (1, 2)
    single = {name for settings in found for name in changed(settings, OWN) if len(changed(settings, OWN)) == 1}
    assert {"recompute", "micro_sequences", "expert", "attention_experts"} <= single


def test_a_pair_is_changed_where_one_alone_is_not_legal() -> None:
    """Sharded attention experts need as many expert-tensor as tensor ranks."""
    own = Settings(2, 1, 1, 2, 2, "sharded", 1, "none")
    pairs = [settings for settings in neighbours(run(), own, 4) if len(changed(settings, own)) == 2]
    assert any(settings.tensor == settings.expert_tensor == 1 for settings in pairs)
    assert not any(changed(settings, own) == {"tensor"} for settings in neighbours(run(), own, 4))


def test_experts_that_are_not_divided_are_not_sharded() -> None:
    own = Settings(1, 1, 1, 1, 1, "replicated", 1, "none")
    assert all(settings.attention_experts == "replicated" for settings in neighbours(run(), own, 4))


@pytest.mark.parametrize("name", ["recompute", "micro_sequences"])
def test_what_saves_memory_and_what_spends_it(name: str) -> None:
    order = {"recompute": ["none", "selective", "full"], "micro_sequences": [4, 2, 1]}[name]
    own = Settings(1, 1, 1, 1, 1, "replicated", 2, "selective")
    (less,) = [getattr(settings, name) for settings in saving(run(), own, 1) if name in changed(settings, own)]
    (more,) = [getattr(settings, name) for settings in spending(run(), own, 1) if name in changed(settings, own)]
    assert [more, getattr(own, name), less] == order


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (Settings(1, 1, 1, 1, 1, "replicated", 4, "none"), True),
        (Settings(1, 1, 1, 1, 1, "replicated", 4, "selective"), True),
        (Settings(1, 1, 1, 2, 1, "replicated", 4, "selective"), False),  # more of one, less of another
        (Settings(2, 1, 1, 1, 1, "replicated", 2, "selective"), False),
        (Settings(1, 1, 1, 1, 1, "replicated", 2, "selective"), False),
    ],
)
def test_what_needs_more_memory_in_all_that_differs(settings: Settings, more: bool) -> None:
    assert needs_more(settings, Settings(1, 1, 1, 1, 1, "replicated", 2, "selective")) is more
