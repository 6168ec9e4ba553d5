"""What DeepEP can move, and what this machine lacks to run it; without torch, DeepEP and Megatron-Core.

Limits are those that the host code and the kernels of DeepEP 1.2.1 assert, on devices with Hopper's copies.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from conf.errors import Violation
from model.moe.config import MoeConfig
from parallel.config.parallel import ParallelConfig

# Later releases have no deep_ep.utils.EventOverlap, without which Megatron-Core 0.16.1 finds no DeepEP.
RELEASE = "1.2.1"
# Ranks that share NVLink; groups of more are whole nodes of so many.
NODE = 8
# Its recommended settings also name 24 ranks, for which no kernel is compiled.
RANKS = (2, 4, 8, 16, 32, 64, 128, 144, 160)
# On one node and on several: what divides the width, and the largest width of which a token fits its buffers.
WIDTHS = ((16, 8176), (256, 7936))
# On one node and on several: experts of a rank that its counting kernels have threads for.
EXPERTS = (128, 64)
# A lane of a warp per choice.
CHOICES = 32
# Nodes that a token may be sent to.
NODES = 8


def deepep_violations(
    config: ParallelConfig,
    world_size: int,
    width: int,
    moe: MoeConfig,
    compute: Literal["float64", "float32", "bfloat16"],
) -> list[Violation]:
    """What keeps DeepEP from moving the tokens of a run on so many processes, each with a legal value."""
    if config.ep_dispatch != "deepep":
        return []
    ep, spans = config.ep, int(config.ep > NODE)
    found = []
    if ep not in RANKS or moe.num_experts > ep * EXPERTS[spans]:
        held = f" with {-(-moe.num_experts // ep)} experts each" if ep in RANKS else ""
        message = (
            f"parallel.ep_dispatch=deepep has no kernels for it; found {ep}{held}; "
            f"{_legal_ranks(config, world_size, moe.num_experts)}"
        )
        found.append(Violation("parallel.ep", message))
    unit, most = WIDTHS[spans]
    if width % unit or width > most:
        below = min(width, most) // unit * unit
        legal = " or ".join(str(n) for n in (below, below + unit) if 0 < n <= most)
        message = (
            f"parallel.ep_dispatch=deepep on ep {ep} moves multiples of {unit} up to {most}; found {width}; "
            f"use {legal}, or parallel.ep_dispatch=all_to_all"
        )
        found.append(Violation("model.width", message))
    # A token goes to each node once.
    most = NODES if ep // NODE > NODES else CHOICES
    if moe.top_k > most:
        message = (
            f"parallel.ep_dispatch=deepep on ep {ep} takes at most {most} choices of a token; "
            f"found {moe.top_k}; lower it to {most}, or set parallel.ep_dispatch=all_to_all"
        )
        found.append(Violation("moe.top_k", message))
    if compute != "bfloat16":
        message = (
            f"parallel.ep_dispatch=deepep moves bfloat16 alone; found {compute}; set precision=bf16, or "
            f"parallel.ep_dispatch=all_to_all"
        )
        found.append(Violation("precision.compute", message))
    return found


def _legal_ranks(config: ParallelConfig, world_size: int, experts: int) -> str:
    degrees = config.degrees(world_size)
    ranks = degrees.dp_shard * degrees.cp * degrees.tp
    legal = [
        str(ep)
        for ep in RANKS
        if ranks % ep == 0 and ranks > 0 and experts % ep == 0 and experts <= ep * EXPERTS[int(ep > NODE)]
    ]
    other = "parallel.ep_dispatch=all_to_all"
    return f"legal values are {', '.join(legal)}, or set {other}" if legal else f"set {other}"


def missing_for_deepep(config: ParallelConfig) -> list[Violation]:
    """What this machine lacks to run `parallel.ep_dispatch`."""
    if config.ep_dispatch != "deepep":
        return []
    found, key = [], "parallel.ep_dispatch"
    try:
        release = version("deep_ep")
    except PackageNotFoundError:
        release = "none"
    # Its builds add a commit: 1.2.1+9af0e0d.
    if release.partition("+")[0] != RELEASE:
        source = f"git+https://github.com/deepseek-ai/DeepEP@v{RELEASE}"
        message = (
            f"deepep needs deep_ep {RELEASE}; found {release}; pip install --no-build-isolation {source} "
            f"(with NVSHMEM_DIR set where ep is above {NODE}), or set all_to_all"
        )
        found.append(Violation(key, message))
    import torch

    if not torch.cuda.is_available():
        message = "deepep runs on GPUs; found none that torch can use; set all_to_all"
        found.append(Violation(key, message))
    return found
