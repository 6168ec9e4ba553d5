"""Backward computes parts of blocks again instead of finding them in memory.

A region is a half of a block, mixer or feed-forward with its norm, or a whole block. Of a region only its
inputs are kept, and which experts its tokens chose. Everything else runs once more when backward arrives:
collectives in the same order on all ranks, since all take the same regions. What the region returned the
first time stays: losses, loads and selections are counted once.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.layout import NONE
from model.moe.router import Router
from parallel.config.regions import FULL, ffn_region


@dataclass(frozen=True)
class Recompute:
    """Runs a function now and once more in backward.

    router chooses experts in it, None where there are none. uses_rng: whether the function draws random
    numbers; then the second time it draws the same.
    """

    router: Router | None
    uses_rng: bool

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives for args, of which tensors are kept, and no other tensor."""
        if not torch.is_grad_enabled():
            return function(*args)
        contexts = partial(_contexts, self.router)
        return checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=self.uses_rng, context_fn=contexts
        )


def _contexts(router: Router | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first run and the second: equal logits may round apart, so choices are kept."""
    choices: list[Tensor] = []

    def keep(choice: Tensor) -> Tensor:
        choices.append(choice)
        return choice

    return _settled_by(router, keep), _settled_by(router, lambda _: choices[0])


@contextmanager
def _settled_by(router: Router | None, replay_routing: Callable[[Tensor], Tensor]) -> Iterator[None]:
    if router is None:
        yield
        return
    before, router.replay_routing = router.replay_routing, replay_routing
    try:
        yield
    finally:
        router.replay_routing = before


def recompute(block: Block, names: Collection[str], *, uses_rng: bool) -> None:
    """Makes regions of what `names` name of the block. Mutates the block, not its parameters or their names.

    names as `parallel.recompute` has them; uses_rng as in `Recompute`.
    """
    router = None if block.moe is None else block.moe.router
    if FULL in names:
        block.run = Recompute(router, uses_rng)
        return
    mixer, ffn = block.names
    if mixer != NONE and mixer in names:
        block.run_mixer = Recompute(None, uses_rng)
    if ffn != NONE and ffn_region(ffn) in names:
        block.run_ffn = Recompute(router, uses_rng)
