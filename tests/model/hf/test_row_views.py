"""What a piece takes of a tensor of ours, by rows, is what it takes of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.hf.family import families
from model.hf.pieces import Mapped, Piece, entry
from model.hf.pretrained import state_of
from model.hf.row_views import RowViews
from model.language_model import LanguageModel
from tests.architectures import small_architecture
from tests.model.hf.draws import drawn_families

DRAWN = drawn_families()


class Rows:
    """Our tensors, with a count of the numbers that are read."""

    def __init__(self, ours: dict[str, Tensor]) -> None:
        self.ours, self.read = ours, 0

    def __call__(self, name: str, first: int, stop: int) -> Tensor:
        found = self.ours[name].reshape(self.ours[name].shape or (1,))[first:stop].clone()
        self.read += found.numel()
        return found


def numbered(model: LanguageModel) -> dict[str, Tensor]:
    """Every parameter and buffer with a number of its own in each element."""
    return {
        name: torch.arange(x.numel(), dtype=torch.float64).view(x.shape)
        for name, x in state_of(model).items()
    }


@pytest.mark.parametrize("name", DRAWN)
@settings(max_examples=2)
@given(data=st.data())
def test_every_view_of_every_family_is_read_by_rows(name: str, data: st.DataObject) -> None:
    config = small_architecture(data.draw(DRAWN[name].overrides))
    with torch.device("meta"):
        model = LanguageModel(config)
    mapped = Mapped(families()[name].pieces(config), state_of(model))
    ours = numbered(model)
    rows = Rows(ours)
    views = RowViews(state_of(model), rows)
    for parts in mapped.by_theirs.values():
        for piece in parts:
            whole = piece.ours_view(ours[piece.ours])
            rows.read = 0
            found = views(piece)
            assert torch.equal(found, whole), piece
            is_stack = ours[piece.ours].ndim == 3 and ".moe.experts." in piece.ours
            if is_stack and whole.ndim == 2:
                assert rows.read == ours[piece.ours][0].numel(), "more than one expert was read"


def test_a_piece_that_makes_a_copy_is_no_view() -> None:
    views = RowViews({"w": torch.empty(4, 3)}, Rows({"w": torch.randn(4, 3)}))
    with pytest.raises(AssertionError, match="makes a copy"):
        views(Piece("w", "theirs", lambda x: x.T.reshape(-1)))
    assert torch.equal(views(Piece("w", "theirs", entry(2))), views(Piece("w", "theirs"))[2])
