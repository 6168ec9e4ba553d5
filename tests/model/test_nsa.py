"""Equal to the paper's equations in float64, one query at a time, and to fla-core's naive functions."""

import sys
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from model.mixer import Sequence
from model.mixers.nsa import Nsa, NsaConfig
from tests.architectures import randomise
from tests.closeness import SAME, assert_close, in_float64, relative

WIDTH = 20
FIELDS = {
    "kind": "nsa",
    "num_heads": 4,
    "num_key_heads": 2,
    "key_dim": 6,
    "value_dim": 5,
    "rotary_dim": 0,
    "rotary_theta": 100.0,
    "has_shared_keys": False,
    "compressor": "mlp",
    "compressor_hidden": 7,
    "entry_length": 4,
    "entry_stride": 2,
    "block": 8,
    "num_blocks": 4,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
    "window": 5,
}


def build(**fields) -> tuple[NsaConfig, Nsa]:
    config = NsaConfig.model_validate({**FIELDS, **fields})
    mixer = config.build(WIDTH, 0, 2, 0.02).double()
    randomise(mixer)
    return config, mixer


def importance(config: NsaConfig, p: Tensor) -> Tensor:
    """Equation 9, with its indices from 1: p_slc[j] = sum over m, n of p_cmp[(l'/d) j - m - n]."""
    per_block, per_entry = config.block // config.entry_stride, config.entry_length // config.entry_stride
    blocks = (len(p) + per_entry - 2) // per_block + 1
    scores = torch.zeros(blocks, dtype=p.dtype)
    for j in range(1, blocks + 1):
        for m in range(per_block):
            for n in range(per_entry):
                i = per_block * j - m - n
                if 1 <= i <= len(p):
                    scores[j - 1] += p[i - 1]
    return scores


def by_the_equations(config: NsaConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One document without rotary: arXiv 2502.11089, equations 5 to 12."""
    tokens, heads, groups = x.shape[0], config.num_heads, config.num_key_heads
    branches = 1 if config.has_shared_keys else 3
    sizes = [heads * config.key_dim]
    sizes += [groups * config.key_dim] * branches + [groups * config.value_dim] * branches + [heads] * 3
    q, *rest = (x @ w["in_proj.weight"].T).split(sizes, dim=-1)
    q = q.view(tokens, heads, -1)
    k = [rest[i if branches == 3 else 0].view(tokens, groups, -1) for i in range(3)]
    v = [rest[branches + (i if branches == 3 else 0)].view(tokens, groups, -1) for i in range(3)]
    gates = [gate.sigmoid() for gate in rest[2 * branches :]]
    l, d, scale = config.entry_length, config.entry_stride, config.key_dim**-0.5  # noqa: E741
    repeat = heads // groups

    def phi(name: str, part: Tensor, g: int) -> Tensor:
        if config.compressor == "mean":
            return part.mean(0)
        flat = (part + w[f"phi_{name}.position_encoding"][g]).flatten()
        return w[f"phi_{name}.second"][g] @ silu(w[f"phi_{name}.first"][g] @ flat)

    out = torch.zeros(tokens, heads, config.value_dim, dtype=x.dtype)
    for t in range(tokens):
        own = t // config.block
        for g in range(groups):
            starts = range(0, t + 1 - l + 1, d)
            keys = [phi("k", k[0][s : s + l, g], g) for s in starts]
            values = [phi("v", v[0][s : s + l, g], g) for s in starts]
            shared = torch.zeros(len(keys), dtype=x.dtype)
            for h in range(g * repeat, (g + 1) * repeat):
                if keys:
                    p = (torch.stack(keys) @ q[t, h] * scale).softmax(0)
                    out[t, h] = out[t, h] + gates[0][t, h] * (p @ torch.stack(values))
                    shared += p.detach()
            scores = torch.zeros(own + 1, dtype=x.dtype)
            found = importance(config, shared)[: own + 1] if keys else scores[:0]
            scores[: len(found)] = found
            scores[: config.num_initial_blocks] = torch.inf
            scores[max(0, own + 1 - config.num_local_blocks) :] = torch.inf
            chosen = scores.topk(min(own + 1, config.num_blocks)).indices.tolist()
            seen = [s for j in chosen for s in range(j * config.block, (j + 1) * config.block) if s <= t]
            near = list(range(max(0, t - config.window + 1), t + 1))
            for h in range(g * repeat, (g + 1) * repeat):
                for branch, rows in ((1, seen), (2, near)):
                    p = (k[branch][rows, g] @ q[t, h] * scale).softmax(0)
                    out[t, h] = out[t, h] + gates[branch][t, h] * (p @ v[branch][rows, g])
    return out.flatten(1) @ w["out_proj.weight"].T


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"compressor": "mean", "entry_length": 4, "entry_stride": 4, "block": 4, "has_shared_keys": True},
        {"entry_length": 6, "entry_stride": 2, "block": 4, "num_key_heads": 1},
        {"entry_length": 3, "entry_stride": 3, "block": 3, "num_blocks": 3, "num_key_heads": 4},
        {"num_blocks": 2, "num_initial_blocks": 0, "num_local_blocks": 1, "window": 1},
    ],
)
def test_equals_the_equations(fields: dict) -> None:
    config, mixer = build(**fields)
    x = torch.randn(1, 26, WIDTH, dtype=torch.float64, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    weights = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    out = mixer(x, Sequence.whole(x[..., 0].long()))
    expected = by_the_equations(config, weights, their_x[0])[None]
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [x, *mixer.parameters()])
    theirs = torch.autograd.grad((expected * weight).sum(), [their_x, *weights.values()])
    assert_close([out.detach(), *ours], [expected.detach(), *theirs], 1e-10)
    assert all(grad.abs().sum() > 0 for grad in ours)


def naive_functions_of_fla(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Their file alone: the package around it loads Triton, which the naive functions do not call."""
    package = Path(str(distribution("fla-core").locate_file("fla")))
    for name, parts in (("utils", ["prepare_chunk_offsets"]), ("utils.pooling", ["mean_pooling"])):
        module = ModuleType(f"fla.ops.{name}")
        for part in parts:
            setattr(module, part, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = spec_from_file_location("nsa_naive", package / "ops" / "nsa" / "naive.py")
    assert spec is not None
    assert spec.loader is not None, f"{spec=}"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_mean_form_equals_naive_functions_of_fla(monkeypatch) -> None:
    naive = naive_functions_of_fla(monkeypatch)
    # Theirs needs 16 query heads per key head and takes the first and the last two blocks.
    fields = {"num_heads": 32, "has_shared_keys": True, "compressor": "mean", "window": 3}
    config, mixer = build(**fields, entry_length=4, entry_stride=4, block=4, num_blocks=5)
    x = torch.randn(2, 64, WIDTH, dtype=torch.float64)
    q, k, v, *gates = mixer.in_proj(x).split(config._parts(), dim=-1)
    q, k = q.unflatten(-1, (-1, config.key_dim)), k.unflatten(-1, (-1, config.key_dim))
    v, gates = v.unflatten(-1, (-1, config.value_dim)), [gate.sigmoid()[..., None] for gate in gates]
    scale = config.key_dim**-0.5
    k_means, v_means = (part.unflatten(1, (-1, 4)).mean(2) for part in (k, v))
    # Padded, since theirs writes into something of the keys' shape.
    padded = torch.nn.functional.pad(v, (0, config.key_dim - config.value_dim))
    with in_float64():
        compressed, _ = naive.naive_nsa_compression(q, k_means, v_means, 4, scale)
        slots = naive.naive_nsa_topk(q, k_means, 5, 4, scale)
        selected = naive.naive_nsa_selection(q, k, padded, slots, 4, scale)[..., : config.value_dim]
    ids = torch.arange(64)
    is_near = (ids[:, None] >= ids) & (ids[:, None] - ids < 3)
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(16, dim=2)) * scale
    weights = scores.masked_fill(~is_near, float("-inf")).softmax(-1)
    near = torch.einsum("bhts,bshv->bthv", weights, v.repeat_interleave(16, dim=2))
    out = sum(gate * part for gate, part in zip(gates, (compressed, selected, near), strict=True))
    expected = mixer.out_proj(out.flatten(-2))
    assert relative(mixer(x, Sequence.whole(x[..., 0].long())).detach(), expected.detach()) < SAME
