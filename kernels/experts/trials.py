"""Routed experts on drawn inputs."""

from typing import NamedTuple

from torch import Tensor

from kernels.activation import is_gated
from kernels.experts import CASES, PLAIN, Case, ExpertBiases, ExpertForm
from kernels.experts.reference import experts_direct
from kernels.experts.triton import Tiles, routed_experts_triton
from kernels.trial import Setting, Subject, Trial, Work


class FormCase(NamedTuple):
    """A shape and what its experts compute; ids reach num_idle beyond the experts."""

    case: Case
    form: ExpertForm = PLAIN
    has_bias: bool = False
    num_idle: int = 0


# Small tiles: most experts fill several and the last one in part.
SMALL = Tiles(16, 32, 16, 1, 1, 32)
# A limit that bfloat16 has: products of many gates round to it.
BIASED = ExpertForm("shifted_swiglu", limit=0.5)
FORMS = (
    FormCase(Case(33, 24, 5, 2, 40), ExpertForm("swiglu", limit=0.3)),
    FormCase(Case(33, 24, 5, 2, 40), ExpertForm("swiglu", limit=0.3, clamps_product=True), True),
    FormCase(Case(33, 24, 5, 2, 40), BIASED, True),
    FormCase(Case(33, 24, 5, 3, 40), ExpertForm("shifted_swiglu", limit=0.7, clamps_product=True), True, 4),
    FormCase(Case(33, 24, 5, 2, 40), ExpertForm("geglu")),
    FormCase(Case(33, 24, 5, 2, 40), ExpertForm("geglu", limit=0.3, clamps_product=True), False, 3),
    FormCase(Case(33, 24, 5, 2, 40), ExpertForm("relu2"), True),
    FormCase(Case(33, 24, 5, 1, 40), ExpertForm("relu2"), False, 2),
    FormCase(Case(33, 24, 5, 1, 40), ExpertForm("swiglu", scales_input=True)),
    FormCase(Case(33, 24, 5, 2, 40), ExpertForm("shifted_swiglu", scales_input=True), True, 2),
)
PLAINS = (*(FormCase(case) for case in CASES), FormCase(Case(70, 48, 3, 2, 72)))


def draw(case: FormCase, setting: Setting) -> Trial:
    """Choices drawn without regard to balance; the last expert is never among them if there are enough."""
    tokens, width, experts, top_k, hidden = case.case
    columns = hidden * (2 if is_gated(case.form.kind) else 1)
    inputs = {
        "x": setting.normal(tokens, width),
        "gate_up": setting.normal(experts, columns, width, scale=width**-0.5),
        "down": setting.normal(experts, width, hidden, scale=hidden**-0.5),
        "weights": setting.uniform(tokens, top_k),
    }
    if case.has_bias:
        inputs |= {"up_bias": setting.normal(experts, columns), "down_bias": setting.normal(experts, width)}
    ids = experts + case.num_idle
    scores = setting.uniform(tokens, ids)
    if experts > top_k and setting.device.type != "meta":
        scores[:, experts - 1] = -1.0
    chosen = scores.topk(top_k, dim=-1).indices
    tiles = SMALL if setting.is_small else None

    def run(function, more: dict, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *biases: Tensor):
        packed = ExpertBiases(*biases) if biases else None
        return (function(x, gate_up, down, chosen.to(x.device), weights, case.form, packed, **more),)

    return Trial(
        inputs,
        lambda **given: run(routed_experts_triton, {"tiles": tiles}, *given.values()),
        lambda **given: run(experts_direct, {}, *given.values()),
    )


def work(case: FormCase) -> Work:
    """Three products of a choice forward and six back; bytes of bfloat16 numbers, of weights and of rows."""
    tokens, width, experts, top_k, hidden = case.case
    factors = 3 if is_gated(case.form.kind) else 2
    flops = 2.0 * factors * tokens * top_k * width * hidden
    matrices, rows = 2.0 * factors * experts * width * hidden, 2.0 * tokens * width
    return Work(flops, matrices + 2 * rows, 2 * flops, 2 * matrices + 3 * rows)


def at_large(tokens: int) -> FormCase:
    """DeepSeek-V3 on one of eight GPUs."""
    return FormCase(Case(tokens, 7168, 32, 8, 2048))


def at_fine(tokens: int) -> FormCase:
    """Qwen3-Next with all of its experts: few rows for each."""
    return FormCase(Case(tokens, 2048, 512, 10, 512))


SUBJECTS = (
    # Qwen3-Next on one of eight GPUs.
    Subject("experts", PLAINS, lambda tokens: FormCase(Case(tokens, 2048, 64, 8, 512)), draw, work),
    Subject("experts.wide", PLAINS[-1:], at_large, draw, work),
    Subject("experts.fine", PLAINS[:1], at_fine, draw, work),
    # gpt-oss.
    Subject(
        "experts.forms",
        FORMS,
        lambda tokens: FormCase(
            Case(tokens, 2880, 32, 4, 2880), ExpertForm("shifted_swiglu", limit=7.0), has_bias=True
        ),
        draw,
        work,
        {"experts_down_grad@3.9": "128 registers, so that two programs share a core"},
    ),
)
