"""Rotary positions: angles by position, stretched for long contexts."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from conf.compose import Config


class RotaryScaling(Config):
    """How wavelengths are stretched beyond the context that they were trained at.

    yarn: arXiv 2309.00071; long wavelengths are stretched, those that turn often are not. llama3: the same
    with other bounds. A kind reads its own fields.
    """

    kind: Literal["none", "yarn", "llama3"]
    factor: float = Field(ge=1)
    original_context: int = Field(ge=1)
    beta_fast: float = Field(gt=0)
    beta_slow: float = Field(gt=0)
    truncates: bool
    attention_factor: float | None = Field(gt=0)
    mscale: float | None = Field(ge=0)
    mscale_all_dim: float | None = Field(ge=0)
    low_frequency: float = Field(gt=0)
    high_frequency: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "RotaryScaling":
        # Kimi K2 has one bound for both: what turns less often is stretched, the rest is not.
        if self.beta_slow > self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} must be at most beta_fast {self.beta_fast}")
        if self.low_frequency >= self.high_frequency:
            low, high = self.low_frequency, self.high_frequency
            raise ValueError(f"low_frequency {low} must be below high_frequency {high}")
        return self

    @property
    def amplitude(self) -> float:
        """Factor on cosines and sines: queries and keys grow with the logarithm of the stretch."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale where only a part of each head is rotated (DeepSeek-V3)."""
        if self.kind != "yarn" or not self.mscale_all_dim:
            return 1.0
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def stretch(self, frequencies: Float[Tensor, "R"], theta: float) -> Float[Tensor, "R"]:
        """The angular frequencies of the dims, in radians per token, after the stretch."""
        if self.kind == "yarn":
            return self._yarn(frequencies, theta)
        if self.kind == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def _yarn(self, frequencies: Tensor, theta: float) -> Tensor:
        pairs = frequencies.shape[0]

        def pair_that_turns(times: float) -> float:
            # Which pair of dims turns this many times over the original context.
            return pairs * math.log(self.original_context / (times * 2 * math.pi)) / math.log(theta)

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncates:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        if low == high:
            high += 0.001
        index = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
        ramp = ((index - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)

    def _llama3(self, frequencies: Tensor) -> Tensor:
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
        kept = kept.clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept


def rotary_table(
    position: Int[Tensor, "B T"], dim: int, theta: float, scaling: RotaryScaling | None
) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
    """Cosines and sines of the rotary angles in float32, R = dim / 2, amplitude included."""
    exponents = torch.arange(0, dim, 2, device=position.device, dtype=torch.float64) / dim
    frequencies, amplitude = theta**-exponents, 1.0
    if scaling is not None:
        frequencies, amplitude = scaling.stretch(frequencies, theta), scaling.amplitude
    angles = (position[..., None].double() * frequencies).float()
    return angles.cos() * amplitude, angles.sin() * amplitude
