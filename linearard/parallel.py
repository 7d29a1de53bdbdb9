"""Ranks, devices and process groups; Ulysses sequence parallelism."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from relation_kl import nccl_options

from linearard.errors import UserError

T = TypeVar("T")
# Ranks of this node: the deepspeed launcher's variable, torchrun's and Open MPI's.
LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's variable, and its old name


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands. Sequence-parallel ranks are neighbours: rank = data_parallel_rank * P + sp rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence_parallel_size: int
    sequence_parallel_group: dist.ProcessGroup | None  # None at size 1

    @property
    def sequence_parallel_rank(self) -> int:
        return self.rank % self.sequence_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        return self.rank // self.sequence_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.sequence_parallel_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's contiguous part of [B, T, ...] along the sequence: [B, T / P, ...]."""
        length = tensor.shape[1] // self.sequence_parallel_size
        return tensor.narrow(1, self.sequence_parallel_rank * length, length)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; returns the tensor."""
        dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        dist.barrier()

    def main_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0, then on the others, which find its results on disk.

        Raises:
            UserError: on every rank, when rank 0 raised one; no rank is left waiting.
        """
        message: list[str | None] = [None]
        result: list[T] = []
        if self.is_main:
            try:
                result.append(work())
            except UserError as error:
                message[0] = str(error)
            except BaseException as error:
                message[0] = f"rank 0 failed: {error!r}"
                dist.broadcast_object_list(message, src=0)
                raise
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise UserError(message[0])
        return result[0] if result else work()


def initialize(sequence_parallel_size: int, timeout: timedelta = timedelta(minutes=30)) -> ParallelContext:
    """Starts torch.distributed as the launcher asks and builds the sequence-parallel groups; once per process.

    Raises:
        UserError: started under MPI without a working mpi4py, or the world size does not fit P.
    """
    under_mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    if "RANK" not in os.environ and not under_mpi:
        # A plain `python -m`: one process. DeepSpeed would look for an MPI launcher and fail there.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    _let_segments_grow()
    _share_cores()
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Only inference_all_reduce uses this op; building it takes 40 s and needs ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:  # also where torch.distributed was started already: DeepSpeed wraps it
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(), timeout=timeout, verbose=False
        )
    except (ImportError, RuntimeError) as error:
        if under_mpi and "mpi" in str(error).lower():
            raise UserError(
                "started under MPI, but mpi4py cannot load libmpi; install an MPI library (Debian: libopenmpi-dev) "
                "or start with the deepspeed launcher"
            ) from error
        raise
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % sequence_parallel_size:
        raise UserError(
            f"parallel.sequence_parallel_size: {sequence_parallel_size} does not divide the {world_size} started "
            "processes; start a multiple of it"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    group: Any = None
    if sequence_parallel_size > 1:
        parallel_state_sp.initialize_sequence_parallel(sequence_parallel_size)
        group = parallel_state_sp.get_sequence_parallel_group()
    return ParallelContext(rank, world_size, local_rank, device, sequence_parallel_size, group)


def finalize() -> None:
    """Leaves the process group; safe to call on every path."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mpu(context: ParallelContext) -> Any:
    """What `deepspeed.initialize(mpu=...)` takes: DeepSpeed's own sequence-parallel state, None at size 1."""
    return parallel_state_sp if context.sequence_parallel_size > 1 else None


def ulysses(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    model_config: Any,
    batch_size: int,
    context: ParallelContext,
) -> UlyssesSPAttentionHF | None:
    """DeepSpeed's Ulysses around `attention`; None at size 1.

    The class is used as it is; `register_with_transformers` is not, because that replaces a function of every model
    in the process and fixes the batch size of all of them. Called with shards q [B, H, T/P, D] and
    k, v [B, Hkv, T/P, D]; inside, `attention` gets q [B, H/P, T, D] and k, v [B, max(Hkv/P, 1), T, D].
    """
    if context.sequence_parallel_size == 1:
        return None
    heads = model_config.num_attention_heads
    return UlyssesSPAttentionHF(
        attn=attention,
        batch_size=batch_size,
        attn_head_count=heads,
        attn_head_size=getattr(model_config, "head_dim", None) or model_config.hidden_size // heads,
        kv_head_count=model_config.num_key_value_heads,
        num_hidden_layers=model_config.num_hidden_layers,
        process_group=cast(Any, context.sequence_parallel_group),
        seq_length_is_variable=True,
    )


def relation_group(context: ParallelContext) -> dist.ProcessGroup | None:
    """The sequence-parallel ranks as a group for the relations alone, on GPUs with `relation_kl.nccl_options`.

    A collective call of all ranks.
    """
    if context.device.type != "cuda" or context.sequence_parallel_group is None:
        return context.sequence_parallel_group
    groups: list[Any] = []
    for first in range(0, context.world_size, context.sequence_parallel_size):
        ranks = list(range(first, first + context.sequence_parallel_size))
        groups.append(dist.new_group(ranks, backend="nccl", pg_options=nccl_options(len(ranks))))
    return groups[context.data_parallel_rank]


def _let_segments_grow() -> None:
    """Tells torch's allocator so, before it has a tensor on a GPU and unless the user has told it something: a step's
    tensors are of many sizes, and in segments that cannot grow 25 GiB of an H200 were fragments at 114,688 tokens."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _share_cores() -> None:
    """Leaves the ranks of a node half of its cores between them for torch's threads, 8 each at most, unless
    OMP_NUM_THREADS is set; the deepspeed launcher does not set it.

    By default each rank has as many threads as there are cores, and they wait for one another: on four H200 with 64
    cores a traced step began with 0.7 s of cutting up a batch of 65,536 tokens, 16 to 48 ms for each small operation.
    """
    ranks = next((int(os.environ[name]) for name in LOCAL_SIZES if name in os.environ), 1)
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) // (2 * ranks)
        torch.set_num_threads(min(max(cores, 1), 8, torch.get_num_threads()))
