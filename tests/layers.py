"""One layer of ours against one of transformers, with random weights."""

import importlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from model.mixer import Mixed, Mixer, MixerConfig, Sequence
from tests.architectures import randomise, small_architecture
from tests.closeness import (
    CANCELS,
    SAME,
    assert_close,
    assert_rounded,
    function_of,
    in_float64,
    outputs_and_grads,
    weighed,
)

FULL, SLIDING = "create_causal_mask", "create_sliding_window_causal_mask"
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
Weights = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@cache
def _entries() -> dict[str, MixerConfig]:
    return small_architecture().mixer


def entry(name: str, **fields: Any) -> Any:
    """An entry of conf/mixer/ with other fields; of rotary_scaling only those that differ."""
    config = _entries()[name]
    values = config.model_dump()
    fields["rotary_scaling"] = values["rotary_scaling"] | fields.get("rotary_scaling", {})
    return type(config).model_validate(values | fields)


def assert_same_layer(
    ours: Mixer,
    theirs: nn.Module,
    run: Callable[[Tensor], Tensor],
    weights: Weights,
    *,
    width: int,
    tokens: int,
    selection: Tensor | None = None,
) -> Tensor:
    """In float64 both have the same output and gradients, and ours in float32 are those up to rounding.

    theirs is of float64, made in `in_float64`; ours of float32. `run` calls theirs on x, `weights` gives our
    state dict from their names. A parameter of theirs that gets no gradient is compared in nothing but the
    output. Returns our output, float32.
    """
    randomise(theirs, with_buffers=False)  # theirs keep the rotary frequencies
    with torch.no_grad():
        for parameter in theirs.parameters():
            assert parameter.dtype == torch.float64, f"{parameter.dtype=}"
            parameter.copy_(parameter.float())  # which ours can hold
    ours.load_state_dict(weights(theirs.state_dict()))
    exact = deepcopy(ours).double()
    inputs = [torch.randn(2, tokens, width), *ours.parameters()]
    names = ["out", "x", *(name for name, _ in ours.named_parameters())]

    def results(mixer: Mixer, *inputs: Tensor) -> list[Tensor]:
        sequence = Sequence.whole(torch.zeros(2, tokens, dtype=torch.long))
        function = function_of(mixer, sequence, *([] if selection is None else [selection]))
        return outputs_and_grads(lambda *leaves: out_of(function(*leaves)), inputs)

    found = results(ours, *inputs)
    assert_rounded(found, partial(results, exact), inputs, names=names)
    with in_float64():
        same = dict(zip(names, results(exact, *(x.double() for x in inputs)), strict=True))
        their_x = inputs[0].double().requires_grad_()
        reference = run(their_x)
        weighed(reference).backward()
    assert their_x.grad is not None
    nothing = torch.tensor(float("nan"), dtype=torch.float64)
    grads = {
        name: nothing.expand_as(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()
    }
    expected = {"out": reference.detach(), "x": their_x.grad, **weights(grads)}
    compared = [name for name in names if not expected[name].isnan().any()]
    pairs = ([own[name] for name in compared] for own in (same, expected))
    assert_close(*pairs, SAME, names=compared, cancels=CANCELS)
    return found[0]


def out_of(mixed: Mixed | Tensor) -> Tensor:
    """The output of a mixer, with or without more to say."""
    return mixed.out if isinstance(mixed, Mixed) else mixed


class Theirs:
    """One attention layer of transformers, with its own masks and its own rotary angles."""

    def __init__(self, folder: str, prefix: str, text: str = "", /, **fields: object) -> None:
        package = f"transformers.models.{folder}"
        configuration = importlib.import_module(f"{package}.configuration_{folder}")
        self.modeling = importlib.import_module(f"{package}.modeling_{folder}")
        self.config = getattr(configuration, f"{prefix}{text}Config")(**(SIZES | fields))
        self.config._attn_implementation = "eager"
        self.prefix, self.text = prefix, text

    def layer(self, index: int, name: str = "Attention") -> Any:
        """One attention layer, float64."""
        with in_float64():
            return getattr(self.modeling, f"{self.prefix}{self.text}{name}")(self.config, index).double()

    def run(self, layer: nn.Module, mask: str, *rope: object, **extra: object) -> Callable[[Tensor], Tensor]:
        """What calls the layer on x within `in_float64`.

        `rope` goes to their rotary angles, `extra` to the layer.
        """
        from transformers import masking_utils

        names = [name for name in dir(self.modeling) if name.endswith("RotaryEmbedding")]
        names = [name for name in names if "Vision" not in name]
        with in_float64():
            embedding = getattr(self.modeling, names[0])(self.config) if names else None

        def call(x: Tensor) -> Tensor:
            position = torch.arange(x.shape[1])[None]
            options = {"inputs_embeds": x, "attention_mask": None, "past_key_values": None}
            visible = getattr(masking_utils, mask)(config=self.config, position_ids=position, **options)
            more = {} if embedding is None else {"position_embeddings": embedding(x, position, *rope)}
            return layer(hidden_states=x, attention_mask=visible, **more, **extra)[0]

        return call
