"""Text from a model: one token after the other."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def generate(
    next_logits: Callable[[Int[Tensor, "C"]], Float[Tensor, "V"]],
    prompt: Int[Tensor, "T"],
    *,
    tokens: int,
    temperature: float,
    end: int,
    vocabulary: int,
    context: int,
    generator: torch.Generator,
    agreed: Callable[[Int[Tensor, "1"]], Int[Tensor, "1"]] = lambda chosen: chosen,
) -> Int[Tensor, "U"]:
    """Up to `tokens` ids that continue `prompt`, ended early by `end`.

    next_logits gives the logits of what follows some ids. temperature 0 takes the likeliest token. Only ids
    below `vocabulary` are taken: a model may have more rows than the tokenizer has pieces. Each token sees
    the last `context` tokens, run anew. `agreed` gives the token that all ranks take: rounding may differ.
    """
    ids = prompt
    for _ in range(tokens):
        logits = next_logits(ids[-context:])[:vocabulary].float()
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(keepdim=True)
        chosen = agreed(chosen)
        if int(chosen) == end:
            break
        ids = torch.cat([ids, chosen])
    return ids[prompt.shape[0] :]
