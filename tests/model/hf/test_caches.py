"""What `cache_bytes` counts is what transformers' caches hold, or what a decoder token by token would."""

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
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
    *("gdn", "kda", "mamba", "mamba2", "lightning"),
}


def lengths_of(config: Architecture) -> list[int]:
    """Two, at which every compressor has all but one token of an entry."""
    mixers = [config.mixer[layer.mixer] for layer in count(config).layers if layer.mixer != NONE]
    whole = math.lcm(*(getattr(mixer, "compression", None) or 1 for mixer in mixers))
    return [whole * math.ceil(tokens / whole) - 1 for tokens in (40, 70)]


def held(cache: Any, layer: int) -> int:
    """Bytes of the tensors that a layer keeps for the next token."""
    linear = getattr(cache, "linear_cache", [])
    if layer < len(linear) and isinstance(linear[layer], Tensor):
        return bytes_of(linear[layer])
    values = dict(vars(cache.layers[layer]))
    if "values" in values and values["values"] is not None and values["values"].shape[-1] > 0:
        keys = values["keys"]
        # One vector is key and value at once: stored twice, which decoding does not need.
        if keys.shape == values["values"].shape and torch.equal(keys, values["values"]):
            del values["values"]
    # Of a convolution's inputs they keep the newest K, and K - 1 are read again.
    tails = values.pop("conv_states", {})
    kept = sum(bytes_of(tail[..., 1:]) for tail in tensors_of(tails))
    return kept + sum(bytes_of(x) for x in tensors_of(values) if x.ndim > 1)


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def tensors_of(x: Any) -> Iterator[Tensor]:
    """All tensors in lists and dictionaries."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_of(part)


def has_window(overrides: list[str]) -> bool:
    """A window of one token keeps nothing; transformers' slice of its last zero tokens is all of them."""
    return not any(text.endswith(("window=1", "chunk=1")) for text in overrides)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - WITHOUT))
def test_caches_are_those_of_transformers(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(
        max_examples=1, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(overrides=FAMILIES[name].overrides.filter(has_window))
    def check(overrides: list[str]) -> None:
        config = small_architecture(overrides)
        model = random_model(config, torch.float32)
        fit(model, name)
        directory = tmp_path_factory.mktemp(name) / "ours"
        save_pretrained(model, directory, model_type=name)
        theirs, _ = (FAMILIES[name].open or open_theirs)(directory)
        for tokens in lengths_of(config):
            with torch.no_grad():
                cache = theirs(torch.randint(64, (1, tokens)), use_cache=True).past_key_values
            layers = [layer.mixer for layer in count(config).layers]
            assert len(cache.layers) == len(layers)
            for index, mixer in enumerate(layers):
                if mixer == NONE:
                    continue
                assert mixer in SEEN
                expected = held(cache, index)
                assert config.mixer[mixer].cache_bytes(tokens, element_bytes=BYTES) == expected, mixer

    check()


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
            cache = theirs(torch.randint(64, (1, 20)), use_cache=True).past_key_values
            cache.layers[0].conv_states[0][..., column] = torch.nan
            logits = theirs(torch.tensor([[3]]), past_key_values=cache).logits
        assert bool(logits.isnan().any()) == is_read


class Stepped:
    """What a decoder of each other mixer keeps: items of each kind, counted one by one, and their numbers."""

    def __init__(self, mixer: MixerConfig) -> None:
        self.mixer: Any = mixer

    def numbers(self, tokens: int) -> int:
        """After so many tokens."""
        return getattr(self, self.mixer.kind)(tokens)

    def conv(self, tokens: int) -> int:
        inputs = deque(range(tokens), maxlen=self.mixer.conv_width - 1)
        return len(inputs) * self.mixer.num_channels

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
