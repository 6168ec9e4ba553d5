"""DeltaNet, Gated DeltaNet without decay and output gate, equals its equations written out."""

import pytest
import torch
from torch.nn.functional import silu

from model.mixer import Sequence
from model.mixers.gdn import GdnConfig
from tests.architectures import randomise, small_architecture
from tests.closeness import assert_close


@pytest.mark.parametrize("has_decay", [False, True])
@pytest.mark.parametrize("has_output_gate", [False, True])
def test_every_form_equals_its_equations(has_decay: bool, has_output_gate: bool) -> None:
    fields = {"has_decay": has_decay, "has_output_gate": has_output_gate}
    config = small_architecture([f"mixer.gdn.{name}={str(on).lower()}" for name, on in fields.items()])
    gdn, width, tokens = config.mixer["gdn"], config.model.width, 50
    assert isinstance(gdn, GdnConfig)
    mixer = gdn.build(width, 0, 4, 0.02).double()
    randomise(mixer)
    weights = dict(mixer.named_parameters())
    assert sum(p.numel() for p in weights.values()) == gdn.count_params(width)
    assert set(gdn.tp_plan(width)) == set(weights)
    x = torch.randn(1, tokens, width, dtype=torch.float64, requires_grad=True)

    key_heads, heads, keys, values = gdn.num_key_heads, gdn.num_value_heads, gdn.key_dim, gdn.value_dim
    sizes = [key_heads * keys, key_heads * keys, heads * values]
    sizes += [heads * values * has_output_gate, heads, heads * has_decay]
    q, k, v, gate, beta, rate = (x @ weights["in_proj.weight"].T).split(sizes, dim=-1)
    mixed, taps = torch.cat([q, k, v], dim=-1), weights["conv.weight"]
    past = torch.nn.functional.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    mixed = silu(sum(past[:, i : i + tokens] * taps[:, i] for i in range(taps.shape[1])))
    q, k, v = mixed.split(sizes[:3], dim=-1)
    q, k = (part.unflatten(-1, (key_heads, keys)).repeat_interleave(heads // key_heads, 2) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    v, beta = v.unflatten(-1, (heads, values)), beta.sigmoid()
    state, outputs = torch.zeros(heads, keys, values, dtype=torch.float64), []
    for t in range(tokens):
        if has_decay:
            steps = torch.nn.functional.softplus(rate[0, t] + weights["decay.dt_bias"])
            state = state * (-weights["decay.A_log"].exp() * steps).exp()[:, None, None]
        for_key = torch.eye(keys) - beta[0, t, :, None, None] * k[0, t, :, :, None] * k[0, t, :, None]
        state = for_key @ state + (beta[0, t, :, None] * k[0, t])[:, :, None] * v[0, t, :, None]
        outputs.append((state * q[0, t, :, :, None]).sum(1) / keys**0.5)
    out = torch.stack(outputs)[None]
    out = out / (out.square().mean(-1, keepdim=True) + gdn.norm_eps).sqrt() * weights["out_norm.weight"]
    out = out.flatten(-2)
    if has_output_gate:
        out = out * silu(gate)
    reference = out @ weights["out_proj.weight"].T

    ours = mixer(x, Sequence.whole(torch.zeros(1, tokens, dtype=torch.long)))
    weight, leaves = torch.randn_like(ours), [x, *weights.values()]
    grads = torch.autograd.grad((ours * weight).sum(), leaves)
    expected = torch.autograd.grad((reference * weight).sum(), leaves)
    assert_close([ours, *grads], [reference, *expected], 1e-10)
