"""A model of every mixer runs on tensors that are shapes alone, and gives what it gives for numbers."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kernels.delta_rule import gated_delta_rule
from kernels.indexer import index_select
from model.language_model import LanguageModel
from model.mixer import Sequence
from tests.parallel.layouts import architecture_of


def results(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, and gradients by name, of a model with a layer of each mixer."""
    config = architecture_of()
    torch.manual_seed(0)
    model = LanguageModel(config, dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    ids = torch.randint(config.model.vocab_size, (2, 40))
    position = torch.arange(40).expand(2, -1).contiguous()
    losses = model.loss(ids, ids.roll(-1, 1), Sequence(position, torch.zeros_like(ids), ids, 0.3))
    (losses.cross_entropy + losses.mtp.sum() + sum(losses.auxiliary.values())).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.parts(), grads


def form(x: Tensor) -> tuple[object, ...]:
    return tuple(x.shape), x.dtype, x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_have_the_same_form(dtype: torch.dtype) -> None:
    losses, grads = results(dtype)
    with FakeTensorMode():
        fake_losses, fake_grads = results(dtype)
    assert all(isinstance(x, FakeTensor) for x in fake_losses)
    assert [form(x) for x in fake_losses] == [form(x) for x in losses]
    assert {name: form(x) for name, x in fake_grads.items()} == {name: form(x) for name, x in grads.items()}


def test_a_kernel_tells_what_has_a_gradient() -> None:
    with FakeTensorMode():
        q, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(2))
        decay = torch.zeros(1, 9, 2)
        out, state = gated_delta_rule(q, q, v, decay, decay)
        assert (out.shape, state.shape) == ((1, 9, 2, 8), (1, 2, 8, 8))
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.shape == q.shape
        with torch.no_grad():
            assert not gated_delta_rule(q, q, v, decay, decay)[0].requires_grad
        # Chosen keys are whole numbers, whatever they were chosen by.
        scores = torch.randn(1, 9, 2)
        chosen = index_select(q, v[:, :, 0], scores, top_k=3)
        assert not chosen.is_floating_point()
        assert not chosen.requires_grad
