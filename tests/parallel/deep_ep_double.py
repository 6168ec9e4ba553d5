"""A double of deep_ep 1.2.1 for CPU ranks, over gloo, from its documented contract and Megatron-Core's calls.

It differs from deep_ep in what it must: tensors lie on the CPU, numbers may be float32 and float64 besides
bfloat16, and widths and numbers of ranks are free. Tokens arrive in an order of its own, which depends on
their number alone; nothing documents one. What is under way holds NaN until its event is waited for.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Skipped when Megatron-Core is imported: what they run at import takes seconds on every rank.
PACKAGES = ("core", "core.transformer", "core.transformer.moe", "core.dist_checkpointing")


class EventHandle:
    """The moment when something under way is there; on creation, now."""

    def __init__(self, arrive: Callable[[], None] = lambda: None) -> None:
        self.arrive = arrive

    def current_stream_wait(self) -> None:
        self.arrive()


class EventOverlap:
    """An event that may be missing."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None, "nothing is under way"
        self.event.current_stream_wait()


class Settings:
    """How many bytes a buffer needs."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 256 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Handle(NamedTuple):
    """Which tokens went where, and where those that came lie: row i came as source_row[i]."""

    is_token_in_rank: Tensor
    received: list[int]
    source_row: Tensor


class Buffer:
    """Brings each token once to every rank that holds experts of its choice, and sums what comes back."""

    # What is done wrong: none, probability, lost token, expert, unsummed gradient.
    fault = "none"
    built = 0

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        Buffer.built += 1

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Settings:
        return Settings()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        check_matrix(topk_idx, torch.int64)
        ranks = self.group.size()
        assert num_experts % ranks == 0
        assert bool(((topk_idx >= -1) & (topk_idx < num_experts)).all()), "an expert that nobody holds"
        chosen = torch.nn.functional.one_hot(topk_idx + 1, num_experts + 1)[..., 1:].sum(1)
        is_token_in_rank = chosen.unflatten(1, (ranks, num_experts // ranks)).sum(2) > 0
        per_rank = is_token_in_rank.sum(0, dtype=torch.int32)
        event = EventOverlap(EventHandle() if async_finish else None)
        return per_rank, None, chosen.sum(0, dtype=torch.int32), is_token_in_rank, event

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        check_matrix(x)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            arrived, event = self._sent(x, handle, async_finish)
            return arrived, None, None, None, None, event
        assert is_token_in_rank is not None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        check_matrix(topk_idx, torch.int64)
        check_matrix(topk_weights, torch.float32)
        assert topk_idx.shape == topk_weights.shape
        assert len(topk_idx) == len(x)
        sent = num_tokens_per_rank.to(torch.int64)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        total = int(received.sum())
        source_row = torch.randperm(total, generator=torch.Generator().manual_seed(total))
        handle = Handle(is_token_in_rank, received.tolist(), source_row)
        ids, _ = self._sent(topk_idx, handle, False)
        weights, _ = self._sent(topk_weights, handle, False)
        held = len(num_tokens_per_expert) // self.group.size()
        first = held * self.group.rank()
        is_held = (ids >= first) & (ids < first + held)
        ids, weights = torch.where(is_held, ids - first, -1), torch.where(is_held, weights, 0.0)
        counts = torch.bincount(ids[is_held], minlength=held).tolist()
        arrived, event = self._sent(x, handle, async_finish)
        self._break(ids, weights, held)
        return arrived, ids, weights, counts, handle, event

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        check_matrix(x)
        total, weights = self._returned(x, handle, "none"), None
        if topk_weights is not None:
            check_matrix(topk_weights, torch.float32)
            weights = self._returned(topk_weights, handle, self.fault)
        out = torch.full_like(total, torch.nan)

        def arrive() -> None:
            out.copy_(total)

        if async_finish:
            return out, weights, EventOverlap(EventHandle(arrive))
        arrive()
        return out, weights, EventOverlap()

    def _sent(self, x: Tensor, handle: Handle, is_async: bool) -> tuple[Tensor, EventOverlap]:
        """Rows of tokens as they arrive, NaN until waited for."""
        leaving = [x[is_there] for is_there in handle.is_token_in_rank.T]
        raw = x.new_empty(sum(handle.received), x.shape[1])
        sizes = [len(rows) for rows in leaving]
        work = dist.all_to_all_single(
            raw, torch.cat(leaving), handle.received, sizes, group=self.group, async_op=True
        )
        assert work is not None
        out = torch.full_like(raw, torch.nan) if x.is_floating_point() else torch.full_like(raw, -7)

        def arrive() -> None:
            work.wait()
            out.copy_(raw[handle.source_row])
            if self.fault == "lost token" and x.is_floating_point() and len(out):
                out[-1] = 0.0

        if is_async:
            return out, EventOverlap(EventHandle(arrive))
        arrive()
        return out, EventOverlap()

    def _returned(self, x: Tensor, handle: Handle, fault: str) -> Tensor:
        """Rows of tokens summed over the ranks that they went to, unweighted, in float32 at least."""
        assert len(x) == len(handle.source_row), "other rows than were received"
        back = torch.empty_like(x)
        back[handle.source_row] = x
        sizes = handle.is_token_in_rank.sum(0).tolist()
        raw = x.new_empty(sum(sizes), x.shape[1])
        dist.all_to_all_single(raw, back, sizes, handle.received, group=self.group)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(len(handle.is_token_in_rank), x.shape[1], dtype=wide)
        for rank, rows in enumerate(raw.split(sizes)):
            if fault == "unsummed gradient" and rank != self.group.rank():
                continue
            total[handle.is_token_in_rank[:, rank]] += rows.to(wide)
        return total.to(x.dtype)

    def _break(self, ids: Tensor, weights: Tensor, held: int) -> None:
        if self.fault == "probability" and weights.numel():
            weights[ids >= 0] *= 1.01
        if self.fault == "expert" and held > 1:
            ids[ids >= 0] = (ids[ids >= 0] + 1) % held


def check_streams(previous: EventOverlap | None, is_async: bool, is_on_comm_stream: bool) -> None:
    # Allocations can go to the stream of the communication only behind an event, and without a wait.
    assert not is_on_comm_stream or (is_async and previous is not None and previous.event is not None)


def check_matrix(x: Tensor, dtype: torch.dtype | None = None) -> None:
    assert x.ndim == 2, x.shape
    assert x.is_contiguous()
    assert dtype is None or x.dtype == dtype, x.dtype


def install() -> None:
    """Makes the double the deep_ep that this process imports."""
    assert "deep_ep" not in sys.modules
    double, parts = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    vars(double).update(Buffer=Buffer)
    vars(parts).update(EventHandle=EventHandle, EventOverlap=EventOverlap)
    sys.modules |= {"deep_ep": double, "deep_ep.utils": parts}


def skip_packages() -> None:
    """Lets modules of Megatron-Core be imported without what their packages import. Once per process.

    Their files are run as they are; the __init__ files of the packages above them are not.
    """
    found = importlib.util.find_spec("megatron")
    assert found is not None
    assert found.submodule_search_locations
    assert "megatron.core" not in sys.modules
    for name in PACKAGES:
        package = ModuleType(f"megatron.{name}")
        package.__path__ = [f"{found.submodule_search_locations[0]}/{name.replace('.', '/')}"]
        sys.modules[package.__name__] = package
    # What the package itself imports first; the modules need each other in this order.
    importlib.import_module("megatron.core.parallel_state")
