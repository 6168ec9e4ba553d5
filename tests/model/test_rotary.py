"""Rotary angles keep float32's precision at any position."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.rotary import rotary_table

EPS = torch.finfo(torch.float32).eps


@given(
    position=st.integers(0, 2**20),
    dim=st.sampled_from([2, 64, 128]),
    theta=st.floats(1e3, 1e7),
)
def test_angles_are_rounded_once(position: int, dim: int, theta: float) -> None:
    cos, sin = rotary_table(torch.tensor([[position]]), dim, theta, None)
    angles = position * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    # One rounding of the angle, and one of its cosine; a frequency in float32 would add as much as the first.
    limit = angles * EPS / 2 + EPS
    assert ((cos[0, 0] - angles.cos()).abs() <= limit).all()
    assert ((sin[0, 0] - angles.sin()).abs() <= limit).all()
