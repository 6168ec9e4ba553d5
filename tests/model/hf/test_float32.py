"""What stays float32 in a narrow model: the same for every cast, and as published checkpoints hold it."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from model.hf.__main__ import main
from model.hf.family import families
from model.hf.files import HubDirectory
from model.hf.pretrained import load_pretrained, save_pretrained, state_of
from model.initial import float32_names
from model.language_model import LanguageModel
from tests.architectures import random_model, small_architecture
from tests.model.hf.draws import drawn_families, fit

FAMILIES = drawn_families()
BIAS = r"e_score_correction_bias"
DERIVED = ("slope_rate", r"(query|key|diagonal)_decay")
RATES = ("A_log", "dt_bias")
# The ends of names on the hub of tensors that are float32 in the published bfloat16 checkpoints, that their
# families declare so in transformers, or whose rounding changes what the model does.
EXPECTED: dict[str, tuple[str, ...]] = {
    "deepseek_v3": (BIAS,),
    "deepseek_v32": (BIAS,),
    "deepseek_v4": (r"gate\.bias", "attn_sink", "ape", r"hc_\w+_(fn|base|scale)"),
    "dots1": (BIAS,),
    "ernie4_5_moe": (BIAS, r"mlp\.gate\.weight"),
    "exaone_moe": (BIAS,),
    "glm4_moe": (BIAS,),
    "glm4_moe_lite": (BIAS,),
    "glm4v_moe": (BIAS,),
    "glm5_next": (BIAS, *RATES, r"[qkv]_conv1d\.weight", "ape", r"hc_?\w*(fn|base|scale)"),
    "glm_moe_dsa": (BIAS,),
    "gpt_oss": ("sinks",),
    "hy_v3": ("expert_bias",),
    "jamba": ("A_log", r"dt_proj\.bias", "D"),
    "kimi_k2": (BIAS,),
    "kimi_k25": (BIAS,),
    "kimi_linear": (BIAS, *RATES),
    "lfm2_moe": ("expert_bias",),
    "longcat_flash": (BIAS, r"router\.classifier\.weight"),
    "mimo_v2_flash": (BIAS, "attention_sink_bias"),
    "minimax": DERIVED,
    "minimax_m1": DERIVED,
    "minimax_m2": (BIAS,),
    "minimax_m3_vl": (BIAS,),
    "minimax_m3_vl_text": (BIAS,),
    "minimax_text_01": DERIVED,
    "nemotron_h": (BIAS, *RATES, "D"),
    "qwen3_5": (*RATES, r"linear_attn\.norm\.weight"),
    "qwen3_5_text": (*RATES, r"linear_attn\.norm\.weight"),
    "qwen3_5_moe": (*RATES, r"linear_attn\.norm\.weight"),
    "qwen3_5_moe_text": (*RATES, r"linear_attn\.norm\.weight"),
    "qwen3_next": RATES,
    "solar_open": (BIAS,),
    "step3p5": (r"router_bias",),
    "step3p7": (r"router_bias",),
}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return dict(HubDirectory(directory).tensors())


def same(first: Path, second: Path) -> bool:
    a, b = tensors_of(first), tensors_of(second)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_way_to_bfloat16_keeps_the_same_tensors(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=1, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(overrides=FAMILIES[name].overrides)
    def check(overrides: list[str]) -> None:
        model = random_model(small_architecture(overrides), torch.float32)
        check_once(name, model, tmp_path_factory.mktemp(name))

    check()


def check_once(name: str, model: LanguageModel, path: Path) -> None:
    fit(model, name)
    save_pretrained(model, path / "wide", model_type=name)
    save_pretrained(model, path / "narrow", model_type=name, dtype=torch.bfloat16)

    wide, narrow = tensors_of(path / "wide"), tensors_of(path / "narrow")
    kept = {key for key, tensor in narrow.items() if tensor.dtype == torch.float32}
    pattern = rf".*\b({'|'.join(EXPECTED.get(name, ('nothing',)))})"
    assert kept == {key for key in narrow if re.fullmatch(pattern, key)}
    theirs = {key for key in narrow for part in strict_in_transformers(name) if part in key}
    assert theirs <= kept
    assert all(torch.equal(narrow[key], wide[key].to(narrow[key].dtype)) for key in wide)

    save_pretrained(load_pretrained(path / "wide", torch.bfloat16), path / "loaded", model_type=name)
    main(["import", str(path / "wide"), str(path / "ours"), "dtype=bfloat16"])
    main(["export", str(path / "ours"), str(path / "imported"), f"model_type={name}"])
    main(["import", str(path / "wide"), str(path / "wide_ours")])
    main(["export", str(path / "wide_ours"), str(path / "exported"), f"model_type={name}", "dtype=bfloat16"])
    for way in ("loaded", "imported", "exported"):
        assert same(path / way, path / "narrow"), way


def strict_in_transformers(name: str) -> set[str]:
    import transformers

    theirs = getattr(transformers, families()[name].class_name, None)
    strict = set(getattr(theirs, "_keep_in_fp32_modules_strict", None) or ())
    # The published norms of DeepSeek-V4 are bfloat16; transformers widens them when it loads.
    return {part for part in strict if name != "deepseek_v4" or "norm" not in part}


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to with a device": lambda model: model.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_keeps_rates_sinks_and_biases(cast: str) -> None:
    pattern = "layout.pattern=gdn mamba mamba2 kda swa_shared attn"
    overrides = [pattern, "model.depth=6", "mixer.attn.has_sinks=true", "residual=hyper", "moe=sigmoid"]
    model = random_model(small_architecture(overrides), torch.float32)
    before = {name: tensor.clone() for name, tensor in state_of(model).items()}
    kept = float32_names(model)
    assert len(kept) > 40
    for name, tensor in state_of(CASTS[cast](model)).items():
        assert (tensor.dtype == torch.float32) == (name in kept), name
        assert name not in kept or torch.equal(tensor, before[name]), name
    model.dtype = model.embed.weight.dtype
    tokens = torch.arange(24).view(2, 12)
    assert model.loss(tokens, tokens).cross_entropy.isfinite()


def test_a_bias_near_seven_moves_by_a_thousandth_in_a_bfloat16_model() -> None:
    model = random_model(small_architecture(["moe=sigmoid", "moe.bias_rate=0.001"]), torch.float32)
    model.to(torch.bfloat16)
    router = next(model.routers())
    router.bias.copy_(torch.linspace(6.82, 7.06, len(router.bias)))
    before = router.bias.double()
    router.update_bias(torch.arange(len(before)).float())
    moved = router.bias.double() - before
    assert moved.abs().max() > 9e-4
    assert len(set(router.bias.tolist())) == len(before)
