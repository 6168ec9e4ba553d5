"""Fields of routed experts."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from conf.compose import Config
from model.shape import ActivationConfig


class MoeConfig(Config):
    """Router, routed experts, shared expert and what keeps their load even."""

    num_experts: int = Field(ge=1)
    num_zero_experts: int = Field(ge=0)
    top_k: int = Field(ge=1)
    hidden: int = Field(ge=1)
    activation: ActivationConfig
    has_bias: bool
    score: Literal["softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen"]
    num_groups: int = Field(ge=1)
    kept_groups: int = Field(ge=1)
    group_score: Literal["max", "top2"]
    has_router_bias: bool
    has_normalized_weights: bool
    weight_eps: float = Field(ge=0, lt=1)
    weight_scale: float = Field(gt=0)
    scales_input: bool
    shared_hidden: int = Field(ge=0)
    shared_activation: ActivationConfig
    has_shared_gate: bool
    balance_loss: float = Field(ge=0)
    balance_scope: Literal["sequence", "batch", "global"]
    z_loss: float = Field(ge=0)
    bias_rate: float = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "MoeConfig":
        experts, groups = self.num_choices, self.num_groups
        if self.has_shared_gate and not self.shared_hidden:
            raise ValueError("has_shared_gate needs a shared expert: set shared_hidden above 0")
        if experts % groups:
            raise ValueError(f"num_groups {groups} must divide num_experts + num_zero_experts {experts}")
        if self.kept_groups > groups:
            raise ValueError(f"kept_groups {self.kept_groups} must be at most num_groups {groups}")
        choosable = self.kept_groups * (experts // groups)
        if self.top_k > choosable:
            which = f"num_experts {experts}"
            if choosable != self.num_experts:
                which = f"the {choosable} experts of kept_groups {self.kept_groups}, zero experts included"
            raise ValueError(f"top_k {self.top_k} must be at most {which}")
        if groups > 1 and self.group_score == "top2" and experts // groups < 2:
            raise ValueError("group_score=top2 needs at least 2 experts in a group; lower num_groups")
        if self.score == "softmax_of_chosen" and not self.has_normalized_weights:
            raise ValueError("score=softmax_of_chosen sums to one; set has_normalized_weights=true")
        return self

    @property
    def num_choices(self) -> int:
        """Experts that a router scores: those with weights, and those that return their input."""
        return self.num_experts + self.num_zero_experts

    def count_params(self, width: int) -> "MoeParams":
        """Parameters by what they are for."""
        factors = self.activation.factors + 1
        expert = factors * width * self.hidden
        if self.has_bias:
            expert += self.activation.factors * self.hidden + width
        # Zero experts are chosen as often as others when the load is even.
        active = expert * self.top_k * self.num_experts / self.num_choices
        shared = (self.shared_activation.factors + 1) * width * self.shared_hidden
        return MoeParams(
            router=(width + self.has_router_bias) * self.num_choices,
            routed=expert * self.num_experts,
            active=round(active),
            shared=shared + width * self.has_shared_gate,
        )

    def activation_bytes(self, width: int, *, element_bytes: int = 2, is_dispatched: bool = False) -> int:
        """Bytes per token that a training step keeps for backward when the load is even.

        is_dispatched: whether experts are on several ranks, which keeps the rows that came and went.
        """
        shared = (self.shared_activation.factors + 1) * self.shared_hidden
        shared += (width + 1) * self.has_shared_gate
        rows = self.activation.factors * self.hidden
        sorting = 8
        if is_dispatched:
            # One row for each choice; the order of the choices, and the expert of each row that came.
            rows, sorting = rows + 2 * width + 2, sorting + 16
        zero = (self.top_k + element_bytes) * (self.num_zero_experts > 0)
        routed = self.top_k * (element_bytes * rows + sorting)
        return element_bytes * shared + routed + zero + self._router_bytes(max(4, element_bytes))

    def _router_bytes(self, wide: int) -> int:
        """Scores and what they were made of, the choice, its weights, and the sums that divide them."""
        scores = {"softmax_of_chosen": 2, "sqrt_softplus": 3}.get(self.score, 1)
        scores += self.z_loss > 0 and self.score in ("softmax", "sigmoid")
        weights = 1 if self.score == "softmax_of_chosen" or not self.has_normalized_weights else 2
        weights += self.score == "softmax_of_chosen"
        sums = 2 + (self.z_loss > 0)
        sums += self.has_normalized_weights and self.score != "softmax_of_chosen"
        return wide * (scores * self.num_choices + weights * self.top_k + sums) + 8 * self.top_k


class MoeParams(NamedTuple):
    """Parameter counts of one mixture of experts; `active` is the part of `routed` that a token uses."""

    router: int
    routed: int
    active: int
    shared: int
