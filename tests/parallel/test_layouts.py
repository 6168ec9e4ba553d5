"""Any layout gives the losses and gradients of one process, for every mixer at once, in float64."""

import pytest

from parallel.degrees import Degrees
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

LIMIT = 1e-11
LAYOUTS = {
    "cp2": Degrees(cp=2),
    "cp2-tp2-ep2": Degrees(cp=2, tp=2, ep=2),
    "dp2-tp2-ep4": Degrees(dp_shard=2, tp=2, ep=4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(layout: str) -> None:
    config, degrees = architecture_of(), LAYOUTS[layout]
    reference = alone(config)
    found = assembled(reference, run_world(degrees.size, on_rank, config, degrees))
    assert not wrong_parts(found, reference)


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
    try:
        found = assembled(reference, ranks)
    except CopiesDifferError:
        return
    assert wrong_parts(found, reference)
