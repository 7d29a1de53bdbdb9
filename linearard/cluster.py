"""What a GPU and its links can do: the figures that the plan of a run computes with, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from linearard.config import ClusterConfig
from linearard.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; rates are those that the trainer's kernels reach, links are per GPU and direction.

    Attributes:
        memory_gib: what the driver lets a process have.
        peak_tflops: dense bf16, of the data sheet; for MFU.
        matmul_tflops: the linear layers.
        attention_tflops, relation_tflops: of causal half products over one long segment (`Plan` lowers them for
            short ones); relation_tflops is forward and backward.
        memory_gb_s: what element-wise kernels reach.
        nvlink_gb_s, network_gb_s: collectives inside a node, and between nodes.
        measured: whether the rates come from measurements here, or are scaled from those of the H200.
    """

    memory_gib: float
    peak_tflops: float
    matmul_tflops: float
    attention_tflops: float
    relation_tflops: float
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    measured: bool = False


# H200: relation and attention from kernels/relation_kl's benchmark of commit 30c7054 (relation_kl 49.9 ms and SDPA 56.4
# ms at 32K tokens, 32 heads, forward and backward), extrapolated to infinite length; a large matrix product reaches 811
# TFLOP/s there, and 700 is what fits the early 7B step of `costs` together with `costs.ELEMENTWISE`. Memory and links:
# 0.83 and 0.8 of the data sheets' 4,800, 450 and 50 GB/s, not measured. The others: the H200's shares of their data
# sheets.
GPUS = {
    "H200": Gpu(139.8, 989, 700, 565, 545, 4000, 360, 40, measured=True),
    "H100": Gpu(79.1, 989, 700, 565, 545, 2800, 360, 40),
    "A100": Gpu(79.1, 312, 221, 178, 110, 1700, 240, 20),
    "B200": Gpu(178.0, 2250, 1590, 1100, 700, 6600, 720, 40),
}
DEFAULT = "H200"
_OVERRIDES = tuple(each.name for each in fields(Gpu) if each.name != "measured")  # keys of ClusterConfig, too


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run.

    Attributes:
        name: of the GPU.
        gpu: its figures, with the configuration's overrides.
        gpus: all of them; a multiple of the sequence-parallel size.
        gpus_per_node: that share NVLink.
        source: where this came from, in words.
    """

    name: str
    gpu: Gpu
    gpus: int
    gpus_per_node: int
    source: str

    def link_gb_s(self, ranks: int) -> float:
        """Of a collective over `ranks` neighbouring GPUs, per GPU and direction."""
        return self.gpu.nvlink_gb_s if ranks <= self.gpus_per_node else self.gpu.network_gb_s


def resolve(config: ClusterConfig, sequence_parallel_size: int, world_size: int | None = None) -> Cluster:
    """The cluster of a run: what the configuration says, else the GPUs that are here, else `DEFAULT`.

    Args:
        config: the section `cluster`.
        sequence_parallel_size: P; without any other number the run is planned for P GPUs.
        world_size: processes that were started, for a run that has begun.

    Raises:
        UserError: unknown GPU, or a number of GPUs that P does not divide.
    """
    name, source, memory, here = config.gpu, "cluster.gpu", None, 0
    if name == "auto":
        name, source, memory, here = _found()
    if name not in GPUS:
        raise UserError(f"cluster.gpu: {name!r}; use auto or one of {', '.join(GPUS)}, and the other keys of cluster")
    size = sequence_parallel_size
    gpus = world_size or config.gpus or max(here // size * size, size)
    if gpus % size:
        raise UserError(f"cluster.gpus: {gpus} is not a multiple of parallel.sequence_parallel_size {size}; change one")
    overrides = {key: getattr(config, key) for key in _OVERRIDES if getattr(config, key) is not None}
    if memory is not None:
        overrides = {"memory_gib": memory, **overrides}
    return Cluster(name, replace(GPUS[name], **overrides), gpus, min(config.gpus_per_node, gpus), source)


def _found() -> tuple[str, str, float | None, int]:
    """The GPUs here: name in `GPUS`, in words, memory in GiB, and how many. One not listed counts as `DEFAULT`."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT, "assumed: no GPU here, see the section cluster", None, 0
    properties, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    name = next((key for key in GPUS if key in properties.name), None)
    words = f"here: {count} x {properties.name}" + ("" if name else f", whose figures are not known: {DEFAULT}'s taken")
    return name or DEFAULT, words, properties.total_memory / GIB, count
