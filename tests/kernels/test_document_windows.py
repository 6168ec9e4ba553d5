import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.document_windows import document_windows, top_slots
from tests.kernels.test_block_attention import positions_of


@given(
    tokens=st.integers(1, 30),
    stride=st.integers(1, 5),
    longer=st.integers(0, 5),
    starts=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_every_complete_window_has_its_slot(tokens, stride, longer, starts, seed) -> None:
    torch.manual_seed(seed)
    length, position = stride + longer, positions_of(2, tokens, starts)
    windows, token = document_windows(position, length, stride), torch.arange(tokens).double()
    document = torch.arange(tokens) - position
    for b in range(2):
        expected = [
            s
            for s in range(tokens - length + 1)
            if position[b, s] % stride == 0 and document[b, s] == document[b, s + length - 1]
        ]
        assert windows.start[b][windows.is_filled[b]].tolist() == expected
        assert windows.is_filled[b].nonzero().flatten().tolist() == [s // stride for s in expected]
        gathered = windows.gather(token.expand(2, -1))[b][windows.is_filled[b]]
        assert gathered.tolist() == [list(range(s, s + length)) for s in expected]
        for t in range(tokens):
            seen = [s // stride for s in expected if s >= document[b, t] and s + length - 1 <= t]
            assert windows.is_seen(position)[b, t].nonzero().flatten().tolist() == seen
            if longer == 0:
                own = t - position[b, t] % length
                past = [s // stride for s in expected if document[b, t] <= s < own]
                assert windows.is_past(position)[b, t].nonzero().flatten().tolist() == past


def test_equal_scores_are_taken_in_order_of_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 1.0, float("-inf")], [float("-inf")] * 6])
    assert top_slots(scores, 4).tolist() == [[1, 2, 0, 3], [-1] * 4]
    assert top_slots(scores, 9).tolist() == [[1, 2, 0, 3, 4, -1], [-1] * 6]


def test_first_and_last_blocks_go_first() -> None:
    position = torch.cat([torch.arange(3), torch.arange(13)])[None]
    windows = document_windows(position, 2, 2)
    # The second document has blocks at tokens 3, 5, ..., 13; its last token has six of them before its own.
    scores = torch.arange(8.0).expand(1, 16, 1, -1)
    chosen = windows.choose(scores, position, count=4, initial=1, local=2)
    assert sorted(windows.start[0, chosen[0, 15, 0]].tolist()) == [3, 9, 11, 13]
    assert chosen[0, 2].tolist() == [[0, -1, -1, -1]]
