"""Fields of routed experts."""

from typing import Literal

from pydantic import Field, model_validator

from conf.compose import Config


class MoeConfig(Config):
    """Router, routed experts, shared expert and what keeps their load even."""

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    hidden: int = Field(ge=1)
    score: Literal["softmax", "sigmoid"]
    has_normalized_weights: bool
    weight_scale: float = Field(gt=0)
    shared_hidden: int = Field(ge=0)
    has_shared_gate: bool
    balance_loss: float = Field(ge=0)
    bias_rate: float = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "MoeConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must be at most num_experts {self.num_experts}")
        if self.has_shared_gate and not self.shared_hidden:
            raise ValueError("has_shared_gate needs a shared expert: set shared_hidden above 0")
        return self

    def count_params(self, width: int) -> "MoeParams":
        """Parameters by what they are for."""
        gate = width * self.has_shared_gate
        return MoeParams(
            router=width * self.num_experts,
            routed=3 * width * self.hidden * self.num_experts,
            active=3 * width * self.hidden * self.top_k,
            shared=3 * width * self.shared_hidden + gate,
        )

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Bytes per token that a training step keeps for backward when the load is even."""
        routed = self.top_k * (width + 3 * self.hidden)
        return element_bytes * (routed + 3 * self.shared_hidden) + 10 * self.num_experts


class MoeParams(Config):
    """Parameter counts of one mixture of experts; `active` is the part of `routed` that a token uses."""

    router: int
    routed: int
    active: int
    shared: int
