"""From the numbers of many ranks to the ones that are named."""

from __future__ import annotations

from dataclasses import replace

from jetmoe_megatron.doctor.can_join import cannot_join, unusable
from jetmoe_megatron.doctor.clocks import Offset
from jetmoe_megatron.doctor.disk import DiskRate
from jetmoe_megatron.doctor.facts import RankFacts, named_gpus
from jetmoe_megatron.doctor.judge import judge
from jetmoe_megatron.doctor.nvidia_smi import GPU
from jetmoe_megatron.doctor.pair_rates import chains, rounds
from jetmoe_megatron.doctor.report import Report
from jetmoe_megatron.runtime.machine import Machine


def cluster(nodes: int = 3, each: int = 4) -> list[RankFacts]:
    """Healthy: two groups of tensor-parallel ranks on each node."""
    ranks = [
        RankFacts(rank, f"node{rank // each}", f"GPU {rank % each}", runs_on={"torch": "2.13.0"})
        for rank in range(nodes * each)
    ]
    its_chains = chains([rank.node for rank in ranks])
    for rank in ranks:
        rank.rates = {"matmul": 640e12, "memory": 3e12}
        half = rank.rank // 2 * 2
        rank.groups = {"all-reduce, tensor": ((half, half + 1), 200e9)}
        for kind, chains_of_kind in its_chains.items():
            pairs = [pair for chain in chains_of_kind for round in rounds(chain) for pair in round if rank.rank in pair]
            rank.pairs[kind] = [(pair, 300e9 if kind == "pairs in a node" else 40e9) for pair in pairs]
        if rank.rank % each == 0:
            rank.disk = DiskRate("/runs", 2**30, 2e9, 3e9)
    return ranks


def lines(ranks: list[RankFacts], tolerance: float = 0.2) -> list[str]:
    return [str(finding) for finding in judge(ranks, tolerance)]


def test_a_healthy_cluster() -> None:
    assert lines(cluster()) == []


def test_a_slow_rank() -> None:
    ranks = cluster()
    ranks[5].rates["matmul"] = 212e12
    ranks[6].rates["matmul"] = 513e12  # within the tolerance
    assert lines(ranks) == ["sick: rank 5 on node1, GPU 1: matmul 212 TFLOP/s, median 640 TFLOP/s"]
    assert [finding.node for finding in judge(ranks, 0.2)] == ["node1"]
    assert len(lines(ranks, 0.1)) == 2 and lines(ranks, 0.7) == []


def test_of_two_ranks_the_better_one_is_the_measure() -> None:
    ranks = cluster(1, 2)
    ranks[0].rates["memory"] = 2e12
    assert lines(ranks) == ["sick: rank 0 on node0, GPU 0: memory 2 TB/s, median 3 TB/s"]


def test_a_rank_is_found_by_its_pairs_and_explains_its_groups() -> None:
    ranks = cluster()
    for rank in ranks:
        found = rank.pairs["pairs between nodes"]
        rank.pairs["pairs between nodes"] = [(pair, 5e9 if 5 in pair else rate) for pair, rate in found]
    for member in (4, 5):
        ranks[member].groups["all-reduce, tensor"] = ((4, 5), 20e9)
    assert lines(ranks) == [
        "sick: rank 5 on node1, GPU 1: each of its pairs between nodes 5 GB/s, median 40 GB/s",
    ]


def test_a_slow_link_between_two_good_ranks() -> None:
    ranks = cluster()
    for member in (4, 5):
        found = ranks[member].pairs["pairs in a node"]
        ranks[member].pairs["pairs in a node"] = [(pair, 9e9 if pair == (4, 5) else rate) for pair, rate in found]
    assert lines(ranks) == ["sick: rank 4, 5 on node1: pairs in a node 9 GB/s, median 300 GB/s"]


def test_a_slow_group_that_no_pair_explains() -> None:
    ranks = cluster()
    for member in (8, 9):
        ranks[member].groups["all-reduce, tensor"] = ((8, 9), 50e9)
    assert lines(ranks) == ["sick: rank 8, 9 on node2: all-reduce, tensor 50 GB/s, median 200 GB/s"]


def test_groups_are_compared_with_those_that_are_spread_alike() -> None:
    ranks = cluster(2, 4)
    for rank in ranks:
        members = (0, 1) if rank.rank < 2 else (2, 4) if rank.rank in (2, 4) else (3, 5)
        if rank.rank < 6:
            rank.groups["all-reduce, odd"] = (members, 200e9 if members == (0, 1) else 20e9)
    assert lines(ranks) == []


def test_versions_and_clocks() -> None:
    ranks = cluster()
    ranks[0].runs_on["torch"] = "2.12.0"
    for rank in ranks[:4]:
        rank.clock = Offset(0.0, 0.0)
    for rank in ranks[4:]:
        rank.clock = Offset(-30.0, 0.01)
    assert lines(ranks) == [
        "sick: rank 0 on node0, GPU 0: torch 2.12.0, 11 of 12 ranks have 2.13.0",
        "warning: rank 0 on node0, GPU 0: its clock is 30.0 s ahead",
    ]
    late_answers = cluster()
    late_answers[4].clock = Offset(3.0, 2.5)
    assert lines(late_answers) == []


def test_ranks_that_were_refused_have_no_numbers() -> None:
    ranks = [RankFacts(rank, f"node{rank}", runs_on={"device": "CPU"}) for rank in range(2)]
    assert lines(ranks) == []
    assert "clock" not in str(Report("now", "", "bf16", 0.2, [], ranks))


def test_disks() -> None:
    ranks = cluster()
    ranks[4].disk = DiskRate("/runs", 2**30, problem="Input/output error")
    ranks[8].disk = DiskRate("/runs", 2**30, 0.2e9, 3e9)
    assert [(str(finding), finding.node) for finding in judge(ranks, 0.2)] == [
        ("sick: rank 4 on node1, GPU 0: a file in /runs (output_dir): Input/output error", "node1"),
        ("warning: rank 8 on node2, GPU 0: a file in /runs (output_dir) written with 200 MB/s, median 2 GB/s", ""),
    ]
    for rank in (0, 4, 8):
        ranks[rank].disk = DiskRate("/runs", 2**30, problem="Read-only file system")
    assert [finding.node for finding in judge(ranks, 0.2)] == ["", "", ""]  # leaving them all out would not help


def test_gpus_are_named_with_their_serial_numbers() -> None:
    ranks = cluster()
    ranks[4].gpus = [GPU("3", "GPU-ab-1", "1650", "1200", "1980", "91", "2", ("hw_thermal_slowdown",))]
    ranks[5].uuid = "ab-1"
    who = "sick: rank 5 on node1, GPU 3 (serial 1650, GPU-ab-1): nvidia-smi: "
    assert lines(named_gpus(ranks)) == [
        f"{who}hw_thermal_slowdown holds the clock at 1200 MHz",
        f"{who}2 uncorrected memory (ECC) errors",
    ]


MACHINE = Machine("NVIDIA H100", "570", "2.13.0", "13.0", "2.28.9", "91900", "0.19.2", "")


def test_who_cannot_join() -> None:
    good = [(f"node{number}", MACHINE) for number in range(3)]
    on_cpu = ("node3", replace(MACHINE, device="CPU", NCCL=""))
    other_nccl = ("node4", replace(MACHINE, NCCL="2.20.0"))
    broken = ("node5", replace(MACHINE, device=unusable("a matmul fails: CUDA error")))
    other_torch = ("node6", replace(MACHINE, torch="2.12.0"))  # named later, when all is measured
    assert cannot_join([*good, other_torch]) == []
    assert [str(finding) for finding in cannot_join([on_cpu, *good, other_nccl, broken])] == [
        "sick: rank 0 on node3: it has a CPU, 3 of 6 ranks have a GPU with NCCL 2.28.9: it cannot connect to them",
        "sick: rank 4 on node4: it has a GPU with NCCL 2.20.0, 3 of 6 ranks have a GPU with NCCL 2.28.9: it cannot "
        "connect to them",
        "sick: rank 5 on node5: no GPU that can be used (a matmul fails: CUDA error)",
    ]
    assert len(cannot_join([broken, broken])) == 2


def test_each_pair_is_measured_once_and_no_rank_is_in_two_at_a_time() -> None:
    for length in range(1, 10):
        chain = [10 + place for place in range(length)]
        pairs = [set(pair) for its_round in rounds(chain) for pair in its_round]
        wanted = [{a, b} for a, b in zip(chain, chain[1:] + chain[:1], strict=True) if a != b]
        assert len(pairs) == len(wanted if length > 2 else wanted[:1]) and all(pair in wanted for pair in pairs)
        for its_round in rounds(chain):
            members = [rank for pair in its_round for rank in pair]
            assert len(members) == len(set(members))


def test_neighbours_are_on_the_same_place_of_other_nodes() -> None:
    assert chains(["a", "a", "b", "b", "c"]) == {
        "pairs in a node": [[0, 1], [2, 3], [4]],
        "pairs between nodes": [[0, 2, 4], [1, 3]],
    }


def test_nothing_reaches_a_terminal_raw() -> None:
    ranks = cluster(1, 2)
    ranks[1].node = "evil\x1b[2J\nnode"
    ranks[1].rates["matmul"] = 1.0
    report = str(Report("now", "", "bf16", 0.2, judge(ranks, 0.2), ranks))
    assert "\x1b" not in report and "evil\\x1b[2J\\nnode" in report
