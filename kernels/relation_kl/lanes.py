"""Two streams of a GPU on which pieces of work that need nothing of one another take turns.

No memory is handed to the allocator while another stream still uses it, without `record_stream`, by this rule:

- What a piece makes, it uses and drops on its lane. The allocator gives such a block to the same lane again, in order.
- What pieces share, inputs and what is made of them, results, was made on the caller's stream before, and the caller
  holds it until `take_turns` returns. The caller's stream has then been told to wait for the lanes, so that whatever is
  freed afterwards is used again after them.
- Nothing goes from one lane to the other.
- What an exchange reads or writes is dropped after its work was waited for, on the lane that started it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

_END = object()


def take_turns(pieces: Sequence[Iterator[None]], device: torch.device, lead: int) -> None:
    """Runs all pieces to their end, two at a time.

    A piece yields where it is about to wait for another process. The host then starts what the other lane's piece has
    to do until it would wait, and so on: in an order that only depends on the number of pieces and of their yields.

    Args:
        pieces: one is run where the caller is, more on two lanes in turn; on a CPU in the same order.
        device: whose lanes.
        lead: how many yields the first piece is ahead of the second.
    """
    if len(pieces) == 1:
        for _ in pieces[0]:
            pass
        return
    lanes = [chain.from_iterable(pieces[lane::2]) for lane in (0, 1)]
    with _forked(device) as streams:

        def go_on(lane: int) -> bool:
            stream = streams[lane]
            # Not within the pieces: they would take the stream along when they yield.
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                return next(lanes[lane], _END) is not _END

        for _ in range(lead):
            go_on(0)
        while any([go_on(1), go_on(0)]):
            pass


@contextmanager
def _forked(device: torch.device) -> Iterator[Sequence[Any]]:
    """The lanes' streams, which have waited for the current one; it waits for them in the end, also after an error."""
    if device.type != "cuda":
        yield None, None
        return
    caller, lanes = torch.cuda.current_stream(device), _streams(device)
    for lane in lanes:
        lane.wait_stream(caller)
    try:
        yield lanes
    finally:
        for lane in lanes:
            caller.wait_stream(lane)


@lru_cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
