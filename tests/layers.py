"""One layer of ours against one of transformers, with random weights."""

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from model.mixer import Mixed, Mixer, MixerConfig, Sequence
from tests.architectures import randomise, small_architecture
from tests.closeness import relative

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


def without_fla() -> None:
    """Call before importing transformers: it would pick kernels that cannot run on this machine."""
    sys.modules.setdefault("fla", None)  # pyright: ignore[reportArgumentType]


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
    """Outputs within 2e-5 of their standard deviation, gradients within 1e-4; returns our output.

    `run` calls their layer on x, `weights` gives our state dict from their names. A parameter of theirs that
    gets no gradient is compared in nothing but the output.
    """
    randomise(theirs, with_buffers=False)  # theirs keep the rotary frequencies
    ours.load_state_dict(weights(theirs.state_dict()))
    x = torch.randn(2, tokens, width)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    sequence = Sequence.whole(torch.zeros(2, tokens, dtype=torch.long))
    mixed = ours(ours_x, sequence) if selection is None else ours(ours_x, sequence, selection)
    out = mixed.out if isinstance(mixed, Mixed) else mixed
    reference = run(theirs_x)
    worst = (out - reference).abs().max() / reference.std()
    assert worst < 2e-5, f"output off by {worst:.3g} standard deviations"
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    assert ours_x.grad is not None
    assert theirs_x.grad is not None
    assert relative(ours_x.grad, theirs_x.grad) < 1e-4
    nothing = torch.tensor(float("nan"))
    grads = {
        name: nothing.expand_as(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()
    }
    expected = weights(grads)
    for name, parameter in ours.named_parameters():
        if not expected[name].isnan().any():
            assert parameter.grad is not None, name
            assert relative(parameter.grad, expected[name]) < 1e-4, name
    return out.detach()


class Theirs:
    """One attention layer of transformers, with its own masks and its own rotary angles."""

    def __init__(self, folder: str, prefix: str, text: str = "", /, **fields: object) -> None:
        without_fla()
        package = f"transformers.models.{folder}"
        configuration = importlib.import_module(f"{package}.configuration_{folder}")
        self.modeling = importlib.import_module(f"{package}.modeling_{folder}")
        self.config = getattr(configuration, f"{prefix}{text}Config")(**(SIZES | fields))
        self.config._attn_implementation = "eager"
        self.prefix, self.text = prefix, text

    def layer(self, index: int, name: str = "Attention") -> Any:
        """One attention layer, float32."""
        return getattr(self.modeling, f"{self.prefix}{self.text}{name}")(self.config, index).float()

    def run(self, layer: nn.Module, mask: str, *rope: object, **extra: object) -> Callable[[Tensor], Tensor]:
        """What calls the layer on x: `rope` goes to their rotary angles, `extra` to the layer."""
        from transformers import masking_utils

        names = [name for name in dir(self.modeling) if name.endswith("RotaryEmbedding")]
        names = [name for name in names if "Vision" not in name]
        embedding = getattr(self.modeling, names[0])(self.config) if names else None

        def call(x: Tensor) -> Tensor:
            position = torch.arange(x.shape[1])[None]
            options = {"inputs_embeds": x, "attention_mask": None, "past_key_values": None}
            visible = getattr(masking_utils, mask)(config=self.config, position_ids=position, **options)
            more = {} if embedding is None else {"position_embeddings": embedding(x, position, *rope)}
            return layer(hidden_states=x, attention_mask=visible, **more, **extra)[0]

        return call
