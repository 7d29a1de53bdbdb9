"""What a sequence-parallel relation KL costs: bytes that move, products that are computed, and the seconds of both.

Pure arithmetic for one relation over one segment, forward and backward, in the two ways of dividing it over P ranks:

- mode sequence (`sequence_parallel.py`): ranks hold shards of all heads and fetch one another's keys, a rank's at a
  time, beside the computation with those of the one before; rows of one chunk, and the gradients, travel too.
- mode heads: after an all-to-all ranks hold whole sequences of a part of the heads. Inside the trainer Ulysses has
  done that for attention already. Where there are more ranks than heads, several ranks hold the same head and divide
  its rows.

The bytes of mode sequence are those that its code sends (`tests/kernels/test_relation_kl_cost_model.py` counts them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .exchanges import AT_ONCE

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 4  # of rows with keys; each is 2 D operations a pair and head
FP32 = 4  # bytes


@dataclass(frozen=True)
class Relation:
    """A relation over one segment.

    Attributes:
        tokens: n, over all ranks; a multiple of 2 P.
        heads: of the rows.
        key_heads: of the keys; equal to `heads` for Q.Q, K.K and V.V.
        head_dim: D.
        is_self: rows and keys are the same vectors.
        batch: B.
        element_size: bytes of an input's element.
    """

    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    is_self: bool = True
    batch: int = 1
    element_size: int = 2


@dataclass(frozen=True)
class Machine:
    """Rates; the defaults are of an H200.

    Attributes:
        tflops: of the kernels, forward and backward together: 6 half products of 128K tokens and 32 heads take 782 ms
            so, and took 762 to 827 (README.md).
        link_gb_s: of one rank's link, each direction. 127: NCCL over NVLink between two H200, with the 8 blocks of
            `nccl_options` (README.md); a 400 Gb/s link has 50 by its name.
        launch_seconds: no visit of a chunk's rows to a chunk's keys is faster: the host's launches; not measured.
        message_seconds: before the first byte of a step arrives; not measured.
        memory_gb_s: of passes over buffers: pivots, chunks copied to be sent, gradients zeroed, added up and cast. For
            64K tokens on two H100, when whole shards were copied at the beginning, 1.6 GB took 0.9 ms before the first
            visit, and 2.4 GB 0.8 ms at the end.
    """

    tflops: float = 540.0
    link_gb_s: float = 127.0
    launch_seconds: float = 1e-4
    message_seconds: float = 2e-5
    memory_gb_s: float = 2000.0


@dataclass(frozen=True)
class Cost:
    """Of the rank that takes longest, forward and backward.

    Attributes:
        received, sent: bytes, each of the rank with most.
        operations: floating-point operations of one rank.
        compute: seconds of the products, with nothing else.
        seconds: with what of the transfers cannot be hidden.
    """

    received: int
    sent: int
    operations: float
    compute: float
    seconds: float


def assignment(ranks: int) -> list[tuple[int, int]]:
    """The two of 2 P chunks whose rows each rank computes, the one with less to see first: `chunk_plan.make_plan`."""
    rows: dict[int, tuple[int, int]] = {}
    free = set(range(ranks))
    for i in range(ranks):
        less, more = i, 2 * ranks - 1 - i
        wanted = (less // 2, more // 2) if i % 2 == 0 else (more // 2, less // 2)
        worker = next((rank for rank in wanted if rank in free), min(free))
        free.remove(worker)
        rows[worker] = less, more
    return [rows[rank] for rank in range(ranks)]


def operations(relation: Relation, ranks: int) -> float:
    """Of one rank, forward and backward: 6 half products of n x n over P."""
    pairs = relation.batch * relation.heads * relation.tokens**2 / 2
    return (FORWARD_PRODUCTS + BACKWARD_PRODUCTS) * 2 * relation.head_dim * pairs / ranks


def sequence(relation: Relation, ranks: int, machine: Machine, apart: bool = False) -> Cost:
    """Mode sequence: `relation_kl_value_and_grad` and its like, a pass over the keys for each of forward and backward.

    In forward a rank's own chunk, with itself, hides the coming of the one that it computes for another, and its two
    chunks with each other the first keys; in each further step it computes with the keys that it has, while the next
    ones come in and, in backward, the gradients of the last ones go out. In backward, whose first keys are still there,
    its two chunks with each other hide the last gradients, and its own one, which comes last, the way back of the
    results.

    Args:
        relation: what is computed.
        ranks: P.
        machine: rates.
        apart: forward and backward are calls of their own, as through autograd: chunks and all keys come in for each;
            half of the heads of a rank's own chunk hide the other one's coming in backward.

    Raises:
        ValueError: chunks of unequal length.
    """
    if relation.tokens % (2 * ranks):
        raise ValueError(f"tokens: {relation.tokens} is not a multiple of 2 * {ranks}")
    forward, backward = (_pass(relation, ranks, machine, which, apart) for which in (False, True))
    compute = operations(relation, ranks) / (machine.tflops * 1e12)
    received = max(a.received + b.received for a, b in zip(forward, backward, strict=True))
    sent = max(a.sent + b.sent for a, b in zip(forward, backward, strict=True))
    seconds = max(a.seconds for a in forward) + max(b.seconds for b in backward)
    return Cost(received, sent, operations(relation, ranks), compute, seconds)


def heads(relation: Relation, ranks: int, machine: Machine, in_trainer: bool) -> Cost:
    """Mode heads.

    Args:
        relation: what is computed.
        ranks: P.
        machine: rates.
        in_trainer: q, k, v and their gradients pass the all-to-alls of Ulysses anyway: nothing more moves.
    """
    element, shard = relation.element_size, relation.batch * relation.tokens // ranks
    received = sent = 0
    if not in_trainer and ranks > 1:
        for count in (relation.heads,) if relation.is_self else (relation.heads, relation.key_heads):
            copies = max(ranks // count, 1)  # of each head, on as many ranks
            vectors = shard * count * relation.head_dim * copies * (ranks - 1) // ranks
            received += vectors * (2 * element + FP32 * (copies > 1) + element * (copies == 1))
        received += shard * relation.heads * FP32 * (ranks - 1) // ranks
        sent = received
    total = operations(relation, ranks)
    compute = total / (machine.tflops * 1e12)
    seconds = compute + _transfer(received, sent, machine) + (2 * machine.message_seconds if received else 0.0)
    return Cost(received, sent, total, compute, seconds)


def table(
    relation: Relation, machines: dict[str, Machine], ranks: Iterable[int] = (2, 4, 8, 16, 32, 64, 128, 256, 512)
) -> list[dict[str, float | int | str]]:
    """Both modes at each number of ranks and on each machine: milliseconds, GB that a rank receives, who wins.

    `efficiency` is the time of one rank without any transfer over P times the mode's time. Mode heads is stand-alone;
    inside the trainer its efficiency is 1 wherever Ulysses can run, that is for P up to the number of query heads.
    """
    rows: list[dict[str, float | int | str]] = []
    for size in ranks:
        for name, machine in machines.items():
            found = {"sequence": sequence(relation, size, machine), "heads": heads(relation, size, machine, False)}
            row: dict[str, float | int | str] = {"ranks": size, "link": name}
            for mode, cost in found.items():
                row[f"{mode} ms"] = cost.seconds * 1e3
                row[f"{mode} GB"] = cost.received / 1e9
                row[f"{mode} efficiency"] = cost.compute / cost.seconds
            row["wins"] = min(found, key=lambda mode: found[mode].seconds)
            rows.append(row)
    return rows


@dataclass(frozen=True)
class _Pass:
    """One pass of one rank."""

    received: int
    sent: int
    seconds: float


def _pass(relation: Relation, ranks: int, machine: Machine, backward: bool, apart: bool) -> list[_Pass]:
    """Forward or backward in mode sequence, for every rank, as if no other one were late."""
    chunk = relation.batch * relation.tokens // (2 * ranks)
    vectors = chunk * relation.head_dim
    # With a chunk come its rows' pivots, of student and teacher, and the upstream gradient; in attention its keys, too.
    numbers = (1 if backward else 2) if apart else 3
    key = relation.key_heads * 2 * vectors * relation.element_size
    of_keys = 0 if relation.is_self else 1
    chunk_vectors, chunk_bytes = relation.heads * 2 * vectors * relation.element_size + of_keys * key, 0
    if not backward or apart:
        chunk_bytes = chunk_vectors + relation.heads * numbers * chunk * FP32
    # What it gives: gradients; its divergence, at once, goes back with them.
    gradient = relation.key_heads * vectors * FP32 if backward else 0
    result = gradient * of_keys + (relation.heads * vectors * FP32 if backward else 0)
    result += relation.heads * chunk * FP32 if apart != backward else 0
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    whole = products * 2 * relation.heads * vectors * (relation.tokens / (2 * ranks)) / (machine.tflops * 1e12)
    visit, diagonal = max(machine.launch_seconds, whole), max(machine.launch_seconds, whole / 2)
    rows = assignment(ranks)
    steps = list(range(1, ranks))
    if backward:
        steps.reverse()
    held = AT_ONCE if backward and not apart else 0  # steps whose keys are there

    def visits(computed: Iterable[int], keys: Iterable[int]) -> float:
        """Seconds of these rows with these chunks of keys."""
        return sum(visit if r > k else diagonal for r in computed for k in keys if r >= k)

    def fetches(worker: int, keys: int) -> bool:
        return keys <= rows[worker][1] and keys not in rows[worker]

    found = []
    for rank in range(ranks):
        own = [r for r in rows[rank] if r // 2 == rank]
        others = [r for r in rows[rank] if r not in own]
        away = len(others)  # as many of its own chunks are computed elsewhere
        needed = [[c for c in rows[(rank - step) % ranks] if fetches(rank, c)] for step in steps]
        given = [[c for c in rows[rank] if fetches((rank + step) % ranks, c)] for step in steps]
        # Keys of a rank's own shard do not come back to it, and their gradients stay.
        come = [sum(c // 2 != rank for c in chunks) for chunks in needed]
        go = [sum(c // 2 != (rank + step) % ranks for c in chunks) for step, chunks in zip(steps, given, strict=True)]
        moves = [_transfer(key * a, key * b, machine) for a, b in zip(come, go, strict=True)]
        moves[:held] = [0.0] * min(held, len(moves))
        itself, alone = visits(own, own), len(others) * diagonal
        together = visits(rows[rank], rows[rank]) - itself - alone
        # When the link and the rank are through with what they have to do so far.
        link = _transfer(away * chunk_bytes, away * chunk_bytes, machine)
        first = itself
        if backward:
            first = itself / 2 if apart and relation.key_heads > 1 else 0.0
        busy = link = max(link, first)
        busy += alone if backward else alone + together
        arrivals = []
        for move in moves[:AT_ONCE]:
            link += move
            arrivals.append(link)
        for number, keys in enumerate(needed):
            busy = max(busy, arrivals[number]) + visits(rows[rank], keys)
            if backward:
                link = max(link, busy)
                link += _transfer(gradient * go[number], gradient * come[number], machine)
            for move in moves[number + AT_ONCE : number + AT_ONCE + 1]:
                link = max(link, busy) + move
                arrivals.append(link)
        if backward:
            busy = max(busy + together, link)
        link = max(link, busy) + _transfer(away * result, away * result, machine)
        seconds = max(link, busy + itself - first)
        if ranks > 1:
            # Of a rank's own chunk one copy is sent to all; the other one lies as it came.
            copied = (away * chunk_vectors if chunk_bytes else 0) + (key if any(go[held:]) else 0)
            fetched = sum(map(len, needed))
            passes = _passes(relation, vectors, backward, copied, fetched, sum(go) + fetched - sum(come))
            seconds += passes / machine.memory_gb_s / 1e9
        received = away * (chunk_bytes + result) + sum(come[held:]) * key + sum(go) * gradient
        sent = away * (chunk_bytes + result) + sum(go[held:]) * key + sum(come) * gradient
        found.append(_Pass(received, sent, seconds))
    return found


def _passes(relation: Relation, vectors: int, backward: bool, copied: int, needed: int, added: int) -> int:
    """Bytes read and written beside the visits in a pass of a rank, see `Machine.memory_gb_s`.

    Args:
        relation: what is computed.
        vectors: elements of a chunk of a head.
        backward: which pass.
        copied: bytes of chunks and keys that are copied to be sent: of student and teacher, which lie apart.
        needed: chunks of keys of others, each with a gradient of its own.
        added: such gradients that are added up here.
    """
    both = 0 if relation.is_self else relation.key_heads
    total = 2 * copied
    if not backward:  # a shard of student and of teacher is read for the pivots
        total += 2 * 2 * relation.element_size * vectors * (relation.heads + both)
    else:
        zeroed = 2 * (relation.heads + both) + needed * relation.key_heads
        total += FP32 * vectors * (zeroed + 3 * added * relation.key_heads)
        total += 2 * (FP32 + relation.element_size) * vectors * (relation.heads + both)
    return total


def _transfer(received: int, sent: int, machine: Machine) -> float:
    """Seconds of bytes in both directions at once."""
    most = max(received, sent)
    return most / (machine.link_gb_s * 1e9) + machine.message_seconds if most else 0.0
