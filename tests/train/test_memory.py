"""Bytes that a step keeps for backward, as counted from the config and as they are."""

from collections.abc import Collection, Sequence

import pytest
import torch

from model.layout import Layer
from model.mixer import Sequence as Tokens
from model.recurrence import DeltaRule
from parallel.block.recompute import recompute
from parallel.context.sharding import HeadTailSharding
from parallel.mesh.axes import Axis
from tests.architectures import random_model, small_architecture
from tests.live_bytes import LiveBytes
from train.config.load import load_config
from train.estimate.memory import kept_bytes, memory_per_rank

ROWS, LENGTH = 4, 32
FLOAT = 4


def bytes_of(mixer: str, ffn: str, depth: int, regions: Collection[str]) -> tuple[float, float]:
    """Bytes per token after forward, and at most in backward."""
    layout = (f"layout.pattern={mixer}", f"layout.ffn.pattern={ffn}", f"model.depth={depth}")
    model = random_model(small_architecture(layout), torch.float32)
    for block in model.blocks:
        recompute(block, regions, uses_rng=False)
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 64
    sequence = Tokens.whole(tokens)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*grads, *model.parameters(), *model.buffers(), tokens, sequence.position]) as live:
        losses = model.loss(tokens, tokens, sequence)
        after, live.peak = live.now, 0
        losses.cross_entropy.backward()
    return after / tokens.numel(), live.peak / tokens.numel()


def of_two_layers(mixer: str, ffn: str, regions: Collection[str]) -> tuple[float, float]:
    """Bytes per token of two layers more, after forward and at most in backward."""
    shallow, deep = (bytes_of(mixer, ffn, depth, regions) for depth in (2, 4))
    return deep[0] - shallow[0], deep[1] - shallow[1]


def planned(mixer: str, ffn: str, regions: Collection[str]) -> int:
    return kept_bytes(small_architecture(), Layer(mixer, ffn), regions, element_bytes=FLOAT).kept


@pytest.mark.parametrize(
    ("mixer", "ffn", "regions"),
    [
        ("attn", "moe", ["full"]),
        ("attn", "moe", ["attn", "moe"]),
        ("gdn", "dense", ["full"]),
    ],
)
def test_what_is_computed_again_leaves_its_input_and_its_choices(
    mixer: str, ffn: str, regions: Sequence[str]
) -> None:
    after, most = of_two_layers(mixer, ffn, regions)
    # Loads of experts and the like do not grow with the tokens: less than a byte for each of them.
    assert 0 <= after - 2 * planned(mixer, ffn, regions) < 1
    # One region at a time is whole in memory, however many there are.
    if ffn == "dense":
        assert most == pytest.approx(after, abs=1)


def test_a_selection_leaves_the_rest_as_it_was() -> None:
    none, feed = (of_two_layers("attn", "dense", regions)[0] for regions in ([], ["dense"]))
    whole, rest = (planned("attn", "dense", regions) for regions in ([], ["dense"]))
    # Plain torch also keeps the activated gates, which the kernels compute again, and one plus the weights of
    # norms, whatever the tokens.
    gates = 48 * FLOAT
    head_weights, weights = (width * FLOAT / (ROWS * LENGTH) for width in (2 * 8, 32))
    assert none == 2 * (whole + gates + head_weights + 2 * weights)
    assert feed == 2 * (rest + head_weights + weights)


def test_a_cut_row_keeps_what_tokens_read_of_the_state_before() -> None:
    def kept(length: int, *, is_cut: bool) -> int:
        torch.manual_seed(0)
        keys, values = torch.rand(2, length, 2, 8), torch.rand(2, length, 4, 12)
        rates = torch.rand(2, length, 4)
        inputs = (keys, keys.flip(1), values, -rates, rates.clone())
        inputs = tuple(x.requires_grad_() for x in inputs)
        position = torch.arange(length).expand(2, -1)
        cut = HeadTailSharding(Axis("cp", 0, (0,), None), position, None)
        with LiveBytes([*inputs, position]) as live:
            if is_cut:
                out = cut.recur(DeltaRule(), inputs, position, None)
            else:
                chunks = tuple(cut.chunks(x) for x in inputs)
                out = DeltaRule().run(chunks, None, torch.zeros(4, 4, 8, 12))[0]
            assert out.requires_grad
            return live.now

    more = [kept(256, is_cut=is_cut) - kept(128, is_cut=is_cut) for is_cut in (False, True)]
    config = small_architecture().mixer["gdn"]
    assert more[1] - more[0] == 2 * 128 * config.cut_activation_bytes(element_bytes=FLOAT)


def test_the_plan_takes_recomputing_and_offloading_into_account() -> None:
    keys = ["model=qwen3_next_80b_a3b", "precision=bf16", "cluster=h100_8n", "train.global_batch=64"]
    none, full, some, away, both = (
        memory_per_rank(load_config([*keys, *more], 64), 64)
        for more in (
            [],
            ["parallel.recompute=full"],
            ["parallel.recompute=moe"],
            ["parallel.offload=activations"],
            ["parallel.recompute=full", "parallel.offload=activations"],
        )
    )
    tokens = load_config(keys, 64).data.sequence_length
    assert full.activations == tokens * 48 * (2048 * 2 + 10 * 8)
    assert full.activations < some.activations < none.activations
    assert none.recomputed == 0 < some.recomputed < full.recomputed
    assert full.total < some.total < none.total
    assert (away.activations, away.host) == (0, none.activations)
    assert away.total == none.total - none.activations + away.recomputed
    assert both.host == full.activations
    assert both.total == full.total - full.activations
