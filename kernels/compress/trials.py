"""Compressors on drawn inputs; slots without a window are left out of the comparison."""

from kernels.compress import CASES, Case
from kernels.compress.reference import (
    gated_compress_direct,
    mean_compress_direct,
    mlp_compress_direct,
)
from kernels.compress.triton import Tiles, gated_compress_triton, mean_compress_triton, mlp_compress_triton
from kernels.document_windows import document_windows
from kernels.trial import Setting, Subject, Trial, Work


def _tiles(setting: Setting) -> Tiles | None:
    return Tiles(4, 4, 3, 1) if setting.is_small else None


def draw_mean(case: Case, setting: Setting) -> Trial:
    """Means of windows that may share tokens."""
    position = setting.documents(case.rows, case.tokens, 3.0 * case.length)[1]
    windows = document_windows(position, case.length, case.stride)
    x = setting.normal(case.rows, case.tokens, case.heads, case.dim)
    return Trial(
        {"x": x},
        lambda x: (mean_compress_triton(x, windows, tiles=_tiles(setting)),),
        lambda x: (mean_compress_direct(x, windows),),
    )


def draw_mlp(case: Case, setting: Setting) -> Trial:
    """Perceptrons that are half as wide as what they read."""
    position = setting.documents(case.rows, case.tokens, 3.0 * case.length)[1]
    windows = document_windows(position, case.length, case.stride)
    size = case.length * case.dim
    inner = max(1, size // 2)
    inputs = {
        "x": setting.normal(case.rows, case.tokens, case.heads, case.dim),
        "position_encoding": setting.normal(case.heads, case.length, case.dim),
        "first": setting.normal(case.heads, inner, size, scale=size**-0.5),
        "second": setting.normal(case.heads, case.dim, inner, scale=inner**-0.5),
    }
    return Trial(
        inputs,
        lambda x, position_encoding, first, second: (
            mlp_compress_triton(x, position_encoding, first, second, windows, tiles=_tiles(setting)),
        ),
        lambda x, position_encoding, first, second: (
            mlp_compress_direct(x, position_encoding, first, second, windows),
        ),
    )


def draw_gated(case: Case, setting: Setting, *, is_overlapping: bool = True) -> Trial:
    """Gated means of a part of wider channels."""
    position = setting.documents(case.rows, case.tokens, 3.0 * case.length)[1]
    windows = document_windows(position, case.length, case.length)
    width = case.dim * (1 + is_overlapping)
    inputs = {
        "values": setting.normal(case.rows, case.tokens, width + 1),
        "gates": setting.normal(case.rows, case.tokens, width, scale=2.0),
        "bias": setting.normal(case.length, width),
    }
    options = {"position": position, "is_overlapping": is_overlapping}
    return Trial(
        inputs,
        lambda values, gates, bias: (
            gated_compress_triton(values[..., 1:], gates, bias, windows, **options, tiles=_tiles(setting)),
        ),
        lambda values, gates, bias: (
            gated_compress_direct(values[..., 1:], gates, bias, windows, **options),
        ),
    )


def draw_separate(case: Case, setting: Setting) -> Trial:
    """Gated means of windows without overlap."""
    return draw_gated(case, setting, is_overlapping=False)


def work(case: Case) -> Work:
    """Bytes in bfloat16 of the tokens, and of their gradients; entries are few."""
    size = 2.0 * case.rows * case.tokens * case.heads * case.dim
    return Work(0.0, size, 0.0, size)


def mlp_work(case: Case) -> Work:
    """The two products over all windows."""
    size, windows = case.length * case.dim, case.rows * case.tokens // case.stride
    flops = 2.0 * windows * case.heads * (size // 2) * (size + case.dim)
    weights = 2.0 * case.heads * (size // 2) * (size + case.dim)
    moved = work(case).forward_bytes
    return Work(flops, moved + weights, 2 * flops, moved + 2 * weights)


def gated_work(case: Case) -> Work:
    """Bytes in bfloat16 of values and gates, both parts; of these and their gradients."""
    size = 8.0 * case.rows * case.tokens * case.dim
    return Work(0.0, size, 0.0, 2 * size)


SUBJECTS = (
    Subject("compress.mean", CASES, lambda tokens: Case(1, tokens, 4, 192, 32, 16), draw_mean, work),
    Subject("compress.mlp", CASES, lambda tokens: Case(1, tokens, 4, 192, 32, 16), draw_mlp, mlp_work),
    Subject("compress.csa", CASES, lambda tokens: Case(1, tokens, 1, 512, 4, 4), draw_gated, gated_work),
    Subject(
        "compress.hca", CASES, lambda tokens: Case(1, tokens, 1, 512, 128, 128), draw_separate, gated_work
    ),
)
