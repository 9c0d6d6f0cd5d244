"""Timelines that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.schedule import Order, Pass, orders
from jetmoe_megatron.plan.timeline import Span, StageSeconds, timeline
from tests.parallel.test_equal_to_one_process import run_tree


def order(pipeline: int, micro_batches: int, chunks: int = 1, overlap: bool = False) -> list[Order]:
    """Megatron's."""
    parallel = {"pipeline": pipeline, "virtual_pipeline": chunks, "overlap_grad_reduce": overlap}
    tree = run_tree(parallel=parallel, batch__micro_sequences=1, batch__global_tokens=16 * micro_batches)
    tree["model"]["num_layers"], tree["batch"]["sequence_length"] = pipeline * chunks, 16
    run = Run.model_validate(tree)
    layout = resolve_layout(run, pipeline)
    assert layout.micro_batches == micro_batches
    return orders(run, layout)


def stage(forward: float, backward: float, chunks: int = 1) -> StageSeconds:
    """Without what is outside of passes."""
    return StageSeconds([forward] * chunks, [0.0] * chunks, [backward] * chunks, 0.0, 0.0, 0.0, 0.0, 0.0)


def end(spans: list[list[Span]]) -> float:
    return max(own[-1].end for own in spans)


def busy(own: list[Span]) -> float:
    return sum(span.seconds for span in own)


def test_one_stage_is_never_idle() -> None:
    (own,) = timeline(order(1, 3), [stage(1, 2)])
    assert [(span.direction, span.micro_batch, span.start, span.end) for span in own[:-1]] == [
        ("forward", 0, 0, 1),
        ("backward", 0, 1, 3),
        ("forward", 1, 3, 4),
        ("backward", 1, 4, 6),
        ("forward", 2, 6, 7),
        ("backward", 2, 7, 9),
    ]
    assert busy(own) == own[-1].end == 9


@pytest.mark.parametrize(
    ("pipeline", "micro_batches", "chunks"), [(2, 2, 1), (2, 5, 1), (3, 4, 1), (4, 8, 1), (4, 8, 2)]
)
def test_equal_stages_have_the_known_bubble(pipeline: int, micro_batches: int, chunks: int) -> None:
    """(p - 1) / (v m + p - 1) of the step (arXiv 2104.04473, section 2.2)."""
    spans = timeline(order(pipeline, micro_batches, chunks), [stage(1, 2, chunks)] * pipeline)
    for own in spans:
        assert busy(own) == 3 * micro_batches * chunks
        assert 1 - busy(own) / end(spans) == pytest.approx((pipeline - 1) / (chunks * micro_batches + pipeline - 1))


def test_the_slowest_stage_sets_the_pace() -> None:
    first, second = timeline(order(2, 3), [stage(1, 2), stage(2, 4)])
    assert [(span.start, span.end) for span in second[:-1]] == [(1, 3), (3, 7), (7, 9), (9, 13), (13, 15), (15, 19)]
    # Two forward passes, then a backward pass when the second stage has done its own, and so on.
    assert [(span.direction[0], span.start, span.end) for span in first[:-1]] == [
        ("f", 0, 1),
        ("f", 1, 2),
        ("b", 7, 9),
        ("f", 9, 10),
        ("b", 13, 15),
        ("b", 19, 21),
    ]
    assert end([first, second]) == 21


def test_a_message_that_a_stage_waits_for_takes_time_at_both_ends() -> None:
    first, second = timeline(order(2, 1), [replace(stage(1, 2), message=0.5)] * 2)
    assert [(span.start, span.end) for span in second[:1]] == [(1.5, 2.5)]
    # The gradient is sent when the second stage has its backward pass behind it.
    assert [(span.start, span.end) for span in first[:2]] == [(0, 1), (5, 7)]
    first, second = timeline(order(2, 2), [replace(stage(1, 2), message=0.5)] * 2)
    assert [(span.start, span.end) for span in first[:2]] == [(0, 1), (1.5, 2.5)]


def test_a_message_beside_the_next_pass_delays_its_receiver_alone() -> None:
    forwards = [Pass("forward", 0, number) for number in range(2)]
    backwards = [Pass("backward", 0, number) for number in range(2)]
    both = [Order([*forwards, *backwards])] * 2
    first, second = timeline(both, [replace(stage(1, 1), message=0.5)] * 2)
    assert [(span.start, span.end) for span in first[:2]] == [(0, 1), (1, 2)]
    assert [(span.start, span.end) for span in second[:2]] == [(1.5, 2.5), (2.5, 3.5)]
    assert first[2].start == 5.0


def test_recomputation_is_in_the_backward_pass() -> None:
    (own,) = timeline(order(1, 1), [replace(stage(1, 2), recompute=[0.5])])
    assert [span.seconds for span in own[:-1]] == [1, 2.5]


def test_chunks_take_their_own_time() -> None:
    own = StageSeconds([1, 3], [0, 0], [2, 5], 0, 0, 0, 0, 0)
    spans = timeline(order(2, 2, 2), [own] * 2)
    for line in spans:
        for span in line[:-1]:
            assert (
                span.seconds
                == {("forward", 0): 1, ("forward", 1): 3, ("backward", 0): 2, ("backward", 1): 5}[
                    span.direction, span.chunk
                ]
            )


def test_gradients_are_reduced_from_the_last_backward_pass_on_or_after_it() -> None:
    seconds = [replace(stage(1, 2), reduction_beside=3, update=1)] * 2
    first, second = timeline(order(2, 2, overlap=True), seconds)
    # The first stage reduces beside its last pass, from 7 to 9; the other after its own, while the first computes.
    assert [(span.direction, span.start, span.end) for span in first[-3:]] == [
        ("backward", 7, 9),
        ("reduction", 9, 10),
        ("update", 10, 11),
    ]
    assert [(span.direction, span.start, span.end) for span in second[-3:]] == [
        ("backward", 5, 7),
        ("reduction", 7, 10),
        ("update", 10, 11),
    ]


def test_what_is_reduced_after_the_passes() -> None:
    first, second = timeline(order(2, 2), [replace(stage(1, 2), reduction=2), stage(1, 2)])
    assert [(span.direction, span.start, span.end) for span in first[-2:]] == [("reduction", 9, 11), ("update", 11, 11)]
    assert second[-1].start == 11


def test_the_first_forward_pass_of_a_chunk_needs_its_weights() -> None:
    spans = timeline(order(2, 2, 2), [replace(stage(1, 2, 2), gather=4)] * 2)
    first = [(span.direction, span.chunk, span.start, span.end) for span in spans[0][:4]]
    assert first == [("forward", 0, 0, 1), ("gather", 0, 1, 2), ("forward", 0, 2, 3), ("forward", 1, 3, 4)]


def test_passes_that_wait_for_each_other() -> None:
    forward, backward = Pass("forward", 0, 0), Pass("backward", 0, 0)
    never = [Order([backward, forward]), Order([forward, backward])]
    with pytest.raises(ValueError, match="wait for each other"):
        timeline(never, [stage(1, 1)] * 2)
