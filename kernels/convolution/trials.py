"""The short convolution on drawn inputs."""

from kernels.convolution import CASES, Case
from kernels.convolution.reference import convolution_direct
from kernels.convolution.triton import Tiles, short_convolution_triton
from kernels.trial import Setting, Subject, Trial, Work


def draw(case: Case, setting: Setting) -> Trial:
    """A part of wider channels, with documents of a few tokens."""
    taps = case.taps
    inputs = {
        "x": setting.normal(case.rows, case.tokens, case.channels + 2),
        "weight": setting.normal(case.channels, taps),
    }
    if case.has_bias:
        inputs["bias"] = setting.normal(case.channels)
    if case.has_state:
        inputs["state"] = setting.normal(case.rows, taps - 1, case.channels)
    document = setting.documents(case.rows, case.tokens, 4.0)[0] if case.has_documents else None
    tiles = Tiles(4, 4, 1) if setting.is_small else None
    options = {"document": document, "has_silu": case.has_silu}

    def ours(x, weight, bias=None, state=None):
        return (short_convolution_triton(x[..., 1:-1], weight, bias, state=state, tiles=tiles, **options),)

    def truth(x, weight, bias=None, state=None):
        return (convolution_direct(x[..., 1:-1], weight, bias, state=state, **options),)

    return Trial(inputs, ours, truth)


def work(case: Case) -> Work:
    """Bytes in bfloat16: x and y; x, dy and dx."""
    size = 2.0 * case.rows * case.tokens * case.channels
    return Work(0.0, 2 * size, 0.0, 3 * size)


SUBJECTS = (Subject("convolution", CASES, lambda tokens: Case(1, tokens, 8192, 4), draw, work),)
