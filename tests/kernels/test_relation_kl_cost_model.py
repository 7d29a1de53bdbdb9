"""The cost model of the sequence-parallel forms: its bytes are those that the code sends, its work is all the work."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import relation_kl as rk
import torch
import torch.distributed as dist
from relation_kl import cost_model as cost
from relation_kl.exchanges import Exchanges
from test_relation_kl_group import spawn

FREE = cost.Machine(link_gb_s=1e12, launch_seconds=0.0, message_seconds=0.0, memory_gb_s=1e12)
SELF = cost.Relation(tokens=64, heads=2, key_heads=2, head_dim=8, element_size=4)
ATTENTION = dataclasses.replace(SELF, heads=4, is_self=False)
LONG = cost.Relation(tokens=2**17, heads=32, key_heads=32, head_dim=128)


def _count(out: str) -> None:
    """Saves the bytes that this rank receives and sends for each relation, forward and backward, at once and apart."""
    os.environ.pop("TRITON_INTERPRET", None)
    moved = {"receive": 0, "send": 0}

    def counting(name: str) -> Any:
        original = getattr(Exchanges, name)

        def counted(self: Any, x: torch.Tensor, peer: int) -> Any:
            moved[name] += x.numel() * x.element_size()
            return original(self, x, peer)

        return counted

    for name in moved:
        setattr(Exchanges, name, counting(name))
    found = []
    for relation in (SELF, ATTENTION):
        moved.update(receive=0, send=0)
        shape = (1, relation.heads, relation.tokens // dist.get_world_size(), relation.head_dim)
        rows, upstream = torch.randn(shape), torch.ones(shape[:3])
        operands = [rows]
        if not relation.is_self:
            operands.append(rows[:, : relation.key_heads].contiguous())
        teachers, kind = [x.flip(2) for x in operands], "relation" if relation.is_self else "attention"
        options: Any = {"group": dist.group.WORLD, "backend": "torch"}
        getattr(rk, f"{kind}_kl_value_and_grad")(*operands, *teachers, upstream, **options)
        found.append((moved["receive"], moved["send"]))
        moved.update(receive=0, send=0)
        leaves = [x.detach().requires_grad_() for x in operands]
        getattr(rk, f"{kind}_kl")(*leaves, *teachers, **options).backward(upstream)
        found.append((moved["receive"], moved["send"]))
    torch.save(found, f"{out}-{dist.get_rank()}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_are_those_that_are_sent(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, _count, tmp_path, str(tmp_path / "bytes"))
    counted = [torch.load(tmp_path / f"bytes-{rank}") for rank in range(ranks)]
    cases = [(relation, apart) for relation in (SELF, ATTENTION) for apart in (False, True)]
    for i, (relation, apart) in enumerate(cases):
        found = cost.sequence(relation, ranks, FREE, apart)
        assert found.received == max(each[i][0] for each in counted)
        assert found.sent == max(each[i][1] for each in counted)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 32])
def test_chunks_are_dealt_out_once_and_evenly(ranks: int) -> None:
    rows = cost.assignment(ranks)
    assert sorted(chunk for pair in rows for chunk in pair) == list(range(2 * ranks))
    assert {less + more for less, more in rows} == {2 * ranks - 1}


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_with_free_links_the_work_is_divided_without_loss(ranks: int) -> None:
    whole = 6 * LONG.heads * LONG.head_dim * float(LONG.tokens) ** 2  # half products: D n^2 operations a head
    for found in (cost.sequence(LONG, ranks, FREE), cost.heads(LONG, ranks, FREE, in_trainer=False)):
        assert found.operations == pytest.approx(whole / ranks)
        assert found.seconds == pytest.approx(found.compute, rel=1e-6)
    assert cost.sequence(LONG, 1, cost.Machine()).received == 0


def test_seconds_lie_between_compute_and_the_sum_of_all() -> None:
    for ranks in (2, 4, 16):
        for machine in (cost.Machine(), cost.Machine(link_gb_s=50.0), cost.Machine(link_gb_s=1.0)):
            for apart in (False, True):
                found = cost.sequence(LONG, ranks, machine, apart)
                transfer = max(found.received, found.sent) / (machine.link_gb_s * 1e9)
                launches = (2 * ranks + 1) * 2 * machine.launch_seconds + 4 * ranks * machine.message_seconds
                assert max(found.compute, transfer / 2) < found.seconds < found.compute + 2 * transfer + launches


def test_heads_inside_the_trainer_move_nothing_and_replicas_cost_bytes() -> None:
    machine = cost.Machine()
    inside = cost.heads(LONG, 8, machine, in_trainer=True)
    assert (inside.received, inside.seconds) == (0, inside.compute)
    shard = LONG.tokens // 8
    alone = cost.heads(LONG, 8, machine, in_trainer=False)
    vectors = shard * LONG.heads * LONG.head_dim * 7 // 8
    assert alone.received == vectors * 3 * 2 + shard * LONG.heads * 4 * 7 // 8
    few = dataclasses.replace(LONG, heads=8, key_heads=8)
    per_rank = [cost.heads(few, ranks, machine, in_trainer=False).received for ranks in (4, 8, 16, 32)]
    assert per_rank[0] > per_rank[1] and per_rank[2] > per_rank[1]  # from 8 ranks on they hold whole heads all the same
    assert cost.heads(few, 32, machine, in_trainer=True).operations == pytest.approx(
        cost.heads(few, 8, machine, in_trainer=True).operations / 4
    )


def test_the_table_says_who_wins() -> None:
    rows = cost.table(LONG, {"NVLink": cost.Machine(), "400 Gb/s": cost.Machine(link_gb_s=50.0)}, ranks=(2, 4, 16))
    assert [(row["ranks"], row["link"]) for row in rows][:3] == [(2, "NVLink"), (2, "400 Gb/s"), (4, "NVLink")]
    for row in rows:
        modes = ("sequence", "heads")
        assert row["wins"] == min(modes, key=lambda mode: row[f"{mode} ms"])
        assert all(0 < float(row[f"{mode} efficiency"]) <= 1 for mode in modes)
    by_link = {row["link"]: row["sequence efficiency"] for row in rows if row["ranks"] == 4}
    assert float(by_link["NVLink"]) > float(by_link["400 Gb/s"])


def test_chunks_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens: 66 is not a multiple of 2"):
        cost.sequence(dataclasses.replace(SELF, tokens=66), 4, FREE)
