"""Any layout gives the losses and gradients of one process, for every mixer at once, in float64."""

import pytest

from parallel.config.degrees import Degrees
from parallel.config.pipeline import ScheduleName
from tests.parallel.layouts import (
    CopiesDifferError,
    Result,
    alone,
    apart,
    architecture_of,
    assembled,
    on_rank,
)
from tests.worlds import run_world

LIMIT = 1e-12
LAYOUTS = {
    "cp2": Degrees(cp=2),
    "cp2-tp2-ep2": Degrees(cp=2, tp=2, ep=2),
    "dp2-tp2-ep4": Degrees(dp_shard=2, tp=2, ep=4),
    "pp2-tp2-ep2": Degrees(pp=2, tp=2, ep=2),
}
MORE_LAYOUTS: dict[str, tuple[Degrees, ScheduleName]] = {
    "pp2-cp2-1f1b": (Degrees(pp=2, cp=2), "1f1b"),
    "pp2-tp2-zero_bubble_v": (Degrees(pp=2, tp=2), "zero_bubble_v"),
    "pp2-cp2-ep2-zero_bubble": (Degrees(pp=2, cp=2, ep=2), "zero_bubble"),
    "pp2-dp2-ep2-interleaved": (Degrees(pp=2, dp_shard=2, ep=2), "interleaved"),
    "pp2-cp2-dualpipe_v": (Degrees(pp=2, cp=2), "dualpipe_v"),
    "pp2-cp2-tp2-ep4-zero_bubble_v": (Degrees(pp=2, cp=2, tp=2, ep=4), "zero_bubble_v"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(layout: str) -> None:
    check(LAYOUTS[layout], "1f1b")


@pytest.mark.prove
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_more_layouts_equal_one_process(layout: str) -> None:
    check(*MORE_LAYOUTS[layout])


def check(degrees: Degrees, schedule: ScheduleName) -> None:
    config = architecture_of(["model.mtp.depth=2", "model.mtp.coefficient=0.7", "model.z_loss=0.1"])
    reference = alone(config)
    ranks = run_world(degrees.size, on_rank, config, degrees, "", {"pp_schedule": schedule}, timeout=400)
    assert not wrong_parts(assembled(reference, ranks), reference)


def wrong_parts(found: Result, reference: Result) -> dict[str, float]:
    off = {name: apart(part, reference.losses[name]) for name, part in found.losses.items() if name != "load"}
    off |= {name: apart(found.grads[name], grad) for name, grad in reference.grads.items()}
    return {name: distance for name, distance in off.items() if not distance < LIMIT}


FAULTS = {
    "gradients of copies": Degrees(tp=2),
    "mean of gradients": Degrees(dp_shard=2),
    "load of a row": Degrees(cp=2),
    "share of a decay": Degrees(tp=2),
    "order of experts": Degrees(dp_shard=2, ep=2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_layout_is_seen(fault: str) -> None:
    config, degrees = architecture_of(mixers=("lightning", "attn")), FAULTS[fault]
    reference = alone(config)
    ranks = run_world(degrees.size, on_rank, config, degrees, fault)
    with pytest.raises((CopiesDifferError, AssertionError)):
        assert not wrong_parts(assembled(reference, ranks), reference)
