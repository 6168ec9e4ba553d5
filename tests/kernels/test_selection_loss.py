import torch
from torch.nn.functional import kl_div

from kernels.selection_loss import selection_loss
from tests.closeness import assert_close


def test_equals_torch_one_query_at_a_time() -> None:
    scores = (torch.randn(5, 4, dtype=torch.float64) * 5).requires_grad_()
    mass = torch.rand(5, 4, dtype=torch.float64)
    mass[1, 2] = 0.0
    is_seen = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    total = torch.zeros((), dtype=torch.float64)
    for row in (0, 1, 2, 4):
        target = mass[row, is_seen[row]] / mass[row, is_seen[row]].sum()
        total = total + kl_div(scores[row, is_seen[row]].log_softmax(-1), target, reduction="sum")
    loss = selection_loss(scores, mass, is_seen)
    grads = [torch.autograd.grad(part, scores)[0] for part in (loss, total)]
    assert_close([loss.detach(), grads[0]], [total.detach(), grads[1]], 1e-12)


def test_attention_that_fell_elsewhere_teaches_nothing() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    loss = selection_loss(scores, torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert not scores.grad.any()
