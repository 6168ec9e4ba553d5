"""Equal to transformers' sparse latent attention; the indexer's loss is what the report defines."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from model.mixer import Mixed, Sequence
from model.mixers.dsa import DsaConfig
from model.mixers.mla import MlaConfig
from tests.architectures import randomise
from tests.closeness import SAME, in_float64, relative
from tests.layers import FULL, Theirs, assert_same_layer, entry
from tests.model.test_mla import FIELDS, SIZES, WIDTH, import_mla, mla

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = 40
# Many index heads: with few, many scores are exactly zero, and theirs breaks ties at random.
INDEX = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 12}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def dsa(**fields: Any) -> DsaConfig:
    """Sparse attention of the sizes of test_mla, and what is set."""
    sizes = {"index_heads": 16, "index_dim": 8, "top_k": 12, "index_eps": 1e-6}
    return entry("dsa", **(FIELDS | sizes | fields))


def import_dsa(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their indexer makes keys, head weights and gates by separate projections."""
    if "indexer.wk.weight" not in theirs:
        return import_mla(theirs)
    names = ("wk.weight", "weights_proj.weight", "index_kpool_compress_gate")
    ours = {
        "index_q_proj.weight": theirs["indexer.wq_b.weight"],
        "index_proj.weight": torch.cat([theirs[f"indexer.{n}"] for n in names if f"indexer.{n}" in theirs]),
        "index_norm.weight": theirs["indexer.k_norm.weight"],
        "index_norm.bias": theirs["indexer.k_norm.bias"],
    }
    if "indexer.index_kpool_compress_ape" in theirs:
        ours["index_places"] = theirs["indexer.index_kpool_compress_ape"]
    return import_mla(theirs) | ours


def deepseek_v32() -> Theirs:
    return Theirs("deepseek_v32", "DeepseekV32", **SIZES, **INDEX, rope_parameters=ROPE)


def glm_moe_dsa() -> Theirs:
    kinds = {"indexer_types": ["full", "shared"]}
    return Theirs("glm_moe_dsa", "GlmMoeDsa", **SIZES, **INDEX, **kinds, rope_parameters=ROPE)


def glm5_next() -> Theirs:
    sizes = SIZES | {"qk_rope_head_dim": 0, "head_dim": 0}
    kinds = {"indexer_types": ["full", "full"], "index_kpool": 4, "layer_types": ["indexed_attention"] * 2}
    return Theirs("glm5_next", "Glm5Next", "Text", **sizes, **INDEX, **kinds)


POOLED = {"shared_key_dim": 0, "rotary_dim": 0, "index_pool": 4, "latent_eps": 1e-5}


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_own_selection(layout: str) -> None:
    # DeepSeek-V3.2 and GLM-5 differ in how the indexer turns its queries and keys.
    theirs = deepseek_v32() if layout == "half_split" else glm_moe_dsa()
    layer = theirs.layer(0)
    ours = dsa(index_rotary_layout=layout).build(WIDTH, 0, 2, 0.02)
    assert_same_layer(ours, layer, theirs.run(layer, FULL), import_dsa, width=WIDTH, tokens=TOKENS)


def test_shared_selection() -> None:
    theirs = glm_moe_dsa()
    layer = theirs.layer(1)
    query = torch.arange(TOKENS)[:, None]
    scores = torch.rand(2, TOKENS, TOKENS).masked_fill(query < query.T, -1.0)
    chosen = scores.topk(7, dim=-1).indices
    # Theirs masks what is chosen of later tokens, ours takes the list as it is.
    selection = torch.where(chosen <= query, chosen, -1)
    run = theirs.run(layer, FULL, prev_topk_indices=chosen)
    ours = dsa(index="shared").build(WIDTH, 1, 2, 0.02)
    assert_same_layer(ours, layer, run, import_dsa, width=WIDTH, tokens=TOKENS, selection=selection)


@pytest.mark.parametrize("tokens", [3, 40, 43])
def test_pooled_selection(tokens: int) -> None:
    theirs = glm5_next()
    layer = theirs.layer(0)
    ours = dsa(**POOLED).build(WIDTH, 0, 2, 0.02)
    whole = torch.ones(2, tokens, dtype=torch.bool)

    def run(x: Tensor) -> Tensor:
        return layer(hidden_states=x, attention_mask=whole)[0]

    if tokens > 3:
        assert_same_layer(ours, layer, run, import_dsa, width=WIDTH, tokens=tokens)
        return
    # Theirs cannot choose where no pool is whole; there the open pool is all that a query sees.
    randomise(layer, with_buffers=False)
    ours = ours.double()
    ours.load_state_dict(import_dsa(layer.state_dict()))
    full = {name: x for name, x in import_dsa(layer.state_dict()).items() if not name.startswith("index")}
    dense = mla(shared_key_dim=0, rotary_dim=0, latent_eps=1e-5).build(WIDTH, 0, 2, 0.02).double()
    dense.load_state_dict(full)
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64)
    sequence = Sequence.whole(x[..., 0].long())
    mixed = ours(x, sequence)
    assert isinstance(mixed, Mixed)
    assert relative(mixed.out, dense(x, sequence)) < SAME


def their_scores(theirs: Theirs, layer: Any, x: Tensor) -> Tensor:
    """The report's index scores, from their parameters, with gradients, which their indexer has not."""
    index = layer.indexer
    angles = theirs.modeling.DeepseekV32RotaryEmbedding(theirs.config)(x, torch.arange(x.shape[1])[None])
    q = index.wq_b(layer.q_a_layernorm(layer.q_a_proj(x)).detach()).unflatten(-1, (16, 8))
    k = index.k_norm(index.wk(x.detach()))[:, :, None]
    turned = theirs.modeling.apply_rotary_pos_emb(q[..., :4], k[..., :4], *angles, unsqueeze_dim=2)
    q, k = (torch.cat([part, rest[..., 4:]], dim=-1) for part, rest in zip(turned, (q, k), strict=True))
    products = (torch.einsum("bthd,bsd->bths", q, k[:, :, 0]) * 8**-0.5).relu()
    return torch.einsum("bth,bths->bts", index.weights_proj(x.detach()) * 16**-0.5, products)


@pytest.mark.parametrize("stage", ["dense", "selected"])
def test_index_loss_is_the_divergence_from_their_attention(stage: str) -> None:
    with in_float64():
        check_index_loss(stage)


def check_index_loss(stage: str) -> None:
    theirs = deepseek_v32()
    layer = theirs.layer(0)
    randomise(layer, with_buffers=False)
    ours = dsa(index_stage=stage, index_loss=0.5).build(WIDTH, 0, 2, 0.02)
    ours.load_state_dict(import_dsa(layer.state_dict()))
    x = torch.randn(2, TOKENS, WIDTH)
    mixed = ours(x, Sequence.whole(x[..., 0].long()))
    assert isinstance(mixed, Mixed)
    assert mixed.losses is not None
    mixed.losses["index"].backward()

    # Their probabilities over all keys or over the chosen ones, by choosing as many.
    layer.indexer.index_topk = TOKENS if stage == "dense" else 12
    weights: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1]))
    theirs.run(layer, FULL)(x)
    target = weights[0].detach().sum(1)
    target = target / target.sum(-1, keepdim=True)
    scores = their_scores(theirs, layer, x)
    visible = torch.ones(TOKENS, TOKENS).tril().bool().expand(2, -1, -1)
    if stage == "selected":
        order = scores.masked_fill(~visible, float("-inf")).topk(12, dim=-1).indices
        visible = visible & torch.zeros_like(visible).scatter(2, order, True)
    log_chosen = torch.where(visible, scores.masked_fill(~visible, float("-inf")).log_softmax(-1), 0.0)
    loss = 0.5 * (torch.special.xlogy(target, target) - target * log_chosen).sum()
    assert relative(mixed.losses["index"], loss) < SAME
    loss.backward()
    nothing = torch.tensor(float("nan"))
    grads = {n: nothing.expand_as(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
    expected = import_dsa(grads)
    compared = [name for name, _ in ours.named_parameters() if not expected[name].isnan().any()]
    names = ("norm.bias", "norm.weight", "proj.weight", "q_proj.weight")
    assert sorted(compared) == [f"index_{name}" for name in names]
    for name, parameter in ours.named_parameters():
        if name in compared:
            assert parameter.grad is not None, name
            assert relative(parameter.grad, expected[name]) < SAME, name


@pytest.mark.parametrize("stage", ["dense", "selected"])
@pytest.mark.parametrize("fields", [{}, POOLED], ids=["each", "pooled"])
def test_loss_and_output_train_different_parameters(stage: str, fields) -> None:
    ours = dsa(index_stage=stage, **fields).build(WIDTH, 0, 2, 0.02).double()
    randomise(ours)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    mixed = ours(x, Sequence.whole(x[..., 0].long()))
    assert isinstance(mixed, Mixed)
    assert mixed.losses is not None
    index = {name: p for name, p in ours.named_parameters() if name.startswith("index")}
    rest = {name: p for name, p in ours.named_parameters() if name not in index}
    loss = mixed.losses["index"]
    found = torch.autograd.grad(loss, [x, *rest.values()], allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in found)
    found = torch.autograd.grad(mixed.out.sum(), list(index.values()), allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in found)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, list(index.values())))


@pytest.mark.parametrize("stage", ["dense", "selected"])
def test_with_all_keys_chosen_it_is_latent_attention(stage: str) -> None:
    ours = dsa(index_stage=stage, top_k=TOKENS).build(WIDTH, 0, 2, 0.02).double()
    randomise(ours)
    config = mla()
    assert isinstance(config, MlaConfig)
    dense = config.build(WIDTH, 0, 2, 0.02).double()
    state = ours.state_dict()
    dense.load_state_dict({name: x for name, x in state.items() if not name.startswith("index")})
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    sequence = Sequence.whole(x[..., 0].long())
    mixed = ours(x, sequence)
    assert isinstance(mixed, Mixed)
    assert torch.allclose(mixed.out, dense(x, sequence), atol=1e-12)
