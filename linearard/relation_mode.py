"""How the relations of a run are spread over the ranks of a sequence: in whole windows, by heads, or by sequence.

`parallel.relation_parallel: auto` is decided here, by what `relation_kl.cost_model` foretells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relation_kl import cost_model

from linearard.cluster import Cluster

WINDOWS, HEADS, SEQUENCE = "windows", "heads", "sequence"


@dataclass(frozen=True)
class RelationShape:
    """What of a run the choice depends on.

    Attributes:
        seq_len: n, tokens of one sequence over all ranks.
        window: tokens that a relation's row sees at most.
        sequence_parallel_size: P.
        num_attention_heads: H.
        num_key_value_heads: Hkv.
        head_dim: D.
        micro_batch_size: sequences at once.
        element_size: bytes of an element of q, k, v.
    """

    seq_len: int
    window: int
    sequence_parallel_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    micro_batch_size: int = 1
    element_size: int = 2

    @property
    def shards_hold_windows(self) -> bool:
        return self.seq_len // self.sequence_parallel_size % self.window == 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same key-value head in mode heads."""
        return max(self.sequence_parallel_size // self.num_key_value_heads, 1)


@dataclass(frozen=True)
class RelationMode:
    """A decision.

    Attributes:
        name: windows (shards hold whole windows, no communication), heads (inside Ulysses) or sequence (on shards, keys
            exchanged).
        why: in words.
    """

    name: str
    why: str


def pick(wanted: str, shape: RelationShape, relations: Sequence[str], cluster: Cluster, tflops: float) -> RelationMode:
    """The mode of a run.

    Args:
        wanted: parallel.relation_parallel: auto, heads or sequence.
        shape: of the run.
        relations: those that are on.
        cluster: whose link the ranks are joined by.
        tflops: of the relation's kernels.
    """
    size = shape.sequence_parallel_size
    if shape.shards_hold_windows and (wanted != HEADS or size == 1):
        return RelationMode(WINDOWS, f"shards hold whole windows of {shape.window:,} tokens: no communication")
    if size == 1:
        return RelationMode(HEADS, "one rank holds the whole sequence")
    if wanted != "auto":
        return RelationMode(wanted, "as parallel.relation_parallel says")
    waits = {
        mode: sum(waiting_seconds(mode, shape, each, cluster, tflops) for each in relations)
        for mode in (HEADS, SEQUENCE)
    }
    by_heads, by_sequence = (f"{waits[mode] * 1e3:.2f} ms in mode {mode}" for mode in (HEADS, SEQUENCE))
    link = f"{size} ranks at {cluster.link_gb_s(size):.0f} GB/s"
    why = f"by the cost model a layer's relations wait {by_heads} and {by_sequence} for other ranks ({link})"
    return RelationMode(SEQUENCE if waits[SEQUENCE] < waits[HEADS] else HEADS, why)


def waiting_seconds(mode: str, shape: RelationShape, relation: str, cluster: Cluster, tflops: float) -> float:
    """Seconds of a layer's relation, forward and backward, beyond the computation, which is the same in every mode.

    In mode heads Ulysses has exchanged q, k and v for attention already. In mode sequence a window spans as many ranks
    as it has shards.
    """
    if mode == WINDOWS:
        return 0.0
    size = shape.sequence_parallel_size
    ranks = min(size, -(-shape.window // (shape.seq_len // size)))
    queries, keys = shape.num_attention_heads, shape.num_key_value_heads
    problem = cost_model.Relation(
        tokens=2 * ranks * max(1, shape.window // (2 * ranks)),
        heads=queries if "q" in relation else keys,
        key_heads=queries if relation == "qq" else keys,
        head_dim=shape.head_dim,
        is_self=relation != "qk",
        batch=shape.micro_batch_size,
        element_size=shape.element_size,
    )
    machine = cost_model.Machine(tflops=tflops, link_gb_s=cluster.link_gb_s(size))
    if mode == HEADS:
        cost = cost_model.heads(problem, ranks, machine, in_trainer=True)
    else:
        cost = cost_model.sequence(problem, ranks, machine)
    return cost.seconds - cost.compute
