"""The norm on drawn inputs."""

from kernels.norm import CASES, Case
from kernels.norm.reference import rms_norm_direct
from kernels.norm.triton import Tiles, rms_norm_triton
from kernels.trial import Setting, Subject, Trial, Work


def draw(case: Case, setting: Setting) -> Trial:
    """Rows of very different lengths; a weight in float32, as masters are kept."""
    x = setting.normal(case.rows, case.width, scale=3.0)
    weight = setting.uniform(case.width, low=-2.0, high=2.0)
    tiles = Tiles(2, 1) if setting.is_small else None
    return Trial(
        {"x": x, "weight": weight},
        lambda x, weight: (rms_norm_triton(x, weight, 1e-6, tiles=tiles),),
        lambda x, weight: (rms_norm_direct(x, weight, 1e-6),),
    )


def work(case: Case) -> Work:
    """Bytes in bfloat16: x and y; x, dy and dx."""
    numbers = 2.0 * case.rows * case.width
    return Work(0.0, 2 * numbers, 0.0, 3 * numbers)


SUBJECTS = (Subject("norm", CASES, lambda tokens: Case(tokens, 4096), draw, work),)
