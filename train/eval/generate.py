"""Text from a model: one token after the other."""

import torch
from jaxtyping import Int
from torch import Tensor

from model.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "T"],
    *,
    tokens: int,
    temperature: float,
    end: int,
    vocabulary: int,
    context: int,
    generator: torch.Generator,
) -> Int[Tensor, "U"]:
    """Up to `tokens` ids that continue `prompt`, ended early by `end`.

    temperature 0 takes the likeliest token. Only ids below `vocabulary` are taken: a model may have more
    rows than the tokenizer has pieces. Each token sees the last `context` tokens, run anew.
    """
    was_training = model.training
    model.eval()
    ids = prompt[None]
    for _ in range(tokens):
        logits = model(ids[:, -context:])[0, -1, :vocabulary].float()
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(keepdim=True)
        if int(chosen) == end:
            break
        ids = torch.cat([ids, chosen[None]], dim=1)
    model.train(was_training)
    return ids[0, prompt.shape[0] :]
