"""Blocks that a group of query heads chooses together do not depend on who has its heads, or on chunks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.compressed_attention import Choice, entry_importance, select_by_entries
from kernels.document_windows import document_windows
from model.block_choice import select_across_shards
from model.mixer import Sequence
from model.tensor_shards import AllHeads


@dataclass
class Replica(AllHeads):
    """Shares each key head with another, who has attention `other` to blocks; chunks come in order."""

    other: Tensor
    kv_replicas: int = 2
    seen: int = 0

    def sum_kv_replicas(self, x: Tensor) -> Tensor:
        part = self.other[:, self.seen : self.seen + x.shape[1]]
        self.seen += x.shape[1]
        return x + part


@pytest.mark.parametrize("chunk_elements", [1, 100, 1 << 24])
def test_replicas_of_a_key_head_choose_as_one_rank(
    chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.block_choice.CHUNK_ELEMENTS", chunk_elements)
    view = Sequence.whole(torch.zeros(2, 60, dtype=torch.long)).view()
    entries, blocks = (document_windows(view.position, length, stride) for length, stride in ((4, 2), (4, 4)))
    q = torch.randn(2, 60, 6, 8, dtype=torch.float64)
    k = torch.randn(2, entries.start.shape[1], 1, 8, dtype=torch.float64)
    options = {"entries": entries, "blocks": blocks, "scale": 0.4}
    choice = Choice(count=3, initial=1, local=1)
    expected = select_by_entries(q, k, position=view.position, **options, **choice)
    assert torch.equal(select_across_shards(q, k, view, AllHeads(), **options, choice=choice), expected)
    other = entry_importance(q[:, :, 2:], k, position=view.position, **options)
    found = select_across_shards(q[:, :, :2], k, view, Replica(other), **options, choice=choice)
    assert torch.equal(found, expected)
    own = select_by_entries(q[:, :, :2], k, position=view.position, **options, **choice)
    assert not torch.equal(own, expected)
