"""What `cache_bytes` counts is what transformers' caches hold, or what a decoder token by token would."""

import math
import re
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import find, settings
from torch import Tensor

from conf.compose import group_options
from model.config import Architecture
from model.count import NONE, count
from model.hf.pretrained import save_pretrained
from model.mixer import MixerConfig
from tests.architectures import random_model, small_architecture
from tests.model.hf.draws import drawn_families, fit
from tests.model.hf.test_families import open_theirs

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = drawn_families()
# All of its small layers are linear, and transformers asks their cache for a length, which it has not.
WITHOUT = {"glm5_next"}
BYTES = 4  # float32, as the states
SEEN = {
    *("attn", "swa", "swa_shared", "chunked", "nope", "mla", "dsa", "msa", "csa", "hca"),
    *("gdn", "kda", "mamba", "mamba2", "lightning", "conv"),
}


def lengths_of(config: Architecture) -> list[int]:
    """Two, at which every compressor has all but one token of an entry."""
    mixers = [config.mixer[name] for name in mixers_of(config) if name != NONE]
    whole = math.lcm(*(getattr(mixer, "compression", None) or 1 for mixer in mixers))
    return [whole * math.ceil(tokens / whole) - 1 for tokens in (40, 70)]


def held(kept: Any, layer: int) -> int:
    """Bytes of the tensors that a layer keeps for the next token."""
    linear = getattr(kept, "linear_cache", [])
    if layer < len(linear) and isinstance(linear[layer], Tensor):
        return bytes_of(linear[layer])
    values = dict(vars(kept.layers[layer]))
    if "values" in values and values["values"] is not None and values["values"].shape[-1] > 0:
        keys = values["keys"]
        # One vector is key and value at once: stored twice, which decoding does not need.
        if keys.shape == values["values"].shape and torch.equal(keys, values["values"]):
            del values["values"]
    # Of a convolution's inputs they keep the newest K, and K - 1 are read again.
    tails = values.pop("conv_states", {})
    read = sum(bytes_of(tail[..., 1:]) for tail in tensors_of(tails))
    return read + sum(bytes_of(x) for x in tensors_of(values) if x.ndim > 1)


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def tensors_of(x: Any) -> Iterator[Tensor]:
    """All tensors in lists and dictionaries."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_of(part)


@cache
def example(name: str) -> list[str]:
    """The simplest overrides of a family, windows of one token made nine.

    Of one token nothing would be kept, and transformers slices the last zero tokens, which are all.
    """
    found = find(FAMILIES[name].overrides, lambda _: True, settings=settings(database=None))
    return [re.sub(r"(window|chunk)=1$", r"\1=9", text) for text in found]


def mixers_of(config: Architecture) -> list[str]:
    return [layer.mixer for layer in count(config).layers]


# Drawing and shrinking one example of every family takes most of a minute, and a family is added seldom.
@pytest.mark.prove
def test_every_mixer_of_transformers_is_compared() -> None:
    names = set(FAMILIES) - WITHOUT
    assert {mixer for name in names for mixer in mixers_of(small_architecture(example(name)))} - {
        NONE
    } == SEEN


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - WITHOUT))
def test_caches_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = small_architecture(example(name))
    model = random_model(config, torch.float32)
    fit(model, name)
    save_pretrained(model, tmp_path / "ours", model_type=name)
    theirs, _ = (FAMILIES[name].open or open_theirs)(tmp_path / "ours")
    for tokens in lengths_of(config):
        with torch.no_grad():
            found = theirs(torch.randint(64, (1, tokens)), use_cache=True).past_key_values
        assert len(found.layers) == len(mixers_of(config))
        for index, mixer in enumerate(mixers_of(config)):
            if mixer != NONE:
                expected = held(found, index)
                assert config.mixer[mixer].cache_bytes(tokens, element_bytes=BYTES) == expected, mixer


def test_the_oldest_input_of_a_convolution_is_not_read_again(tmp_path: Path) -> None:
    config = small_architecture(
        ["moe=softmax", "residual=pre_norm", "layout.pattern=gdn attn", "layout.ffn.pattern=moe"]
    )
    model = random_model(config, torch.float32)
    fit(model, "qwen3_next")
    save_pretrained(model, tmp_path / "ours", model_type="qwen3_next")
    theirs, _ = open_theirs(tmp_path / "ours")
    for column, is_read in ((0, False), (1, True)):
        with torch.no_grad():
            found = theirs(torch.randint(64, (1, 20)), use_cache=True).past_key_values
            found.layers[0].conv_states[0][..., column] = torch.nan
            logits = theirs(torch.tensor([[3]]), past_key_values=found).logits
        assert bool(logits.isnan().any()) == is_read


class Stepped:
    """What a decoder of each other mixer keeps: items of each kind, counted one by one, and their numbers."""

    def __init__(self, mixer: MixerConfig) -> None:
        self.mixer: Any = mixer

    def numbers(self, tokens: int) -> int:
        """After so many tokens."""
        return getattr(self, self.mixer.kind)(tokens)

    def moba(self, tokens: int) -> int:
        """Keys and values, and the mean key of each whole block."""
        blocks = [start for start in range(0, tokens, self.mixer.block) if start + self.mixer.block <= tokens]
        return (2 * tokens + len(blocks)) * self.mixer.num_key_heads * self.mixer.head_dim

    ssa = moba

    def zigzag(self, tokens: int) -> int:
        """Tokens of blocks that the next query still sees."""
        own = tokens // self.mixer.block
        first, last = range(self.mixer.first_blocks), range(own - self.mixer.recent_blocks + 1, own + 1)
        kept = [token for token in range(tokens) if token // self.mixer.block in {*first, *last}]
        return len(kept) * (self.mixer.latent_dim + self.mixer.shared_key_dim)

    def dsa(self, tokens: int) -> int:
        """Latents, and index keys of whole pools; of the open pool keys and gates."""
        latents = tokens * (self.mixer.latent_dim + self.mixer.shared_key_dim)
        if self.mixer.index == "shared":
            return latents
        pools, open_ = divmod(tokens, self.mixer.index_pool)
        return latents + (pools + 2 * open_) * self.mixer.index_dim

    def nsa(self, tokens: int) -> int:
        """Selection's keys, entries, and of branches of their own those of the window and of open entries."""
        own = deque[int](maxlen=self.mixer.window - 1)
        pending, entries = list[int](), 0
        for token in range(tokens):
            own.append(token)
            pending.append(token)
            if len(pending) == self.mixer.entry_length:
                entries += 1
                pending = pending[self.mixer.entry_stride :]
        more = 0 if self.mixer.has_shared_keys else len(own) + len(pending)
        size = self.mixer.num_key_heads * (self.mixer.key_dim + self.mixer.value_dim)
        return (tokens + entries + more) * size


@pytest.mark.parametrize("name", sorted(set(group_options("mixer")) - SEEN))
def test_other_caches_are_what_a_decoder_keeps(name: str) -> None:
    for keys in ([], ["mixer.nsa.has_shared_keys=true"] * (name == "nsa")):
        mixer = small_architecture(keys).mixer[name]
        # The most at any length up to this one: entries and pools are all but complete.
        for tokens in (47, 95):
            most = max(Stepped(mixer).numbers(length) for length in range(tokens + 1))
            assert mixer.cache_bytes(tokens, element_bytes=BYTES) == BYTES * most
