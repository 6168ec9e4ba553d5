"""Independent models by transformers, for the architectures that ours must equal."""

import sys
from typing import Any

from model.config import Architecture
from model.mixers.attn import AttnConfig
from model.mixers.gdn import GdnConfig


def build_qwen3_next(config: Architecture) -> Any:
    """transformers' Qwen3NextForCausalLM of the same dimensions, float32, first values of its own."""
    # With fla installed and no GPU transformers would pick kernels that cannot run here.
    sys.modules.setdefault("fla", None)  # pyright: ignore[reportArgumentType]
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    attn, gdn = config.mixer["attn"], config.mixer["gdn"]
    assert isinstance(attn, AttnConfig), f"{attn=}"
    assert isinstance(gdn, GdnConfig), f"{gdn=}"
    kinds = {"gdn": "linear_attention", "attn": "full_attention"}
    theirs = Qwen3NextConfig(
        vocab_size=config.model.vocab_size,
        hidden_size=config.model.width,
        num_hidden_layers=config.model.depth,
        layer_types=[kinds[layer.mixer] for layer in config.layers],
        num_attention_heads=attn.num_heads,
        num_key_value_heads=attn.num_key_heads,
        head_dim=attn.head_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": attn.rotary_theta,
            "partial_rotary_factor": attn.rotary_dim / attn.head_dim,
        },
        rms_norm_eps=config.residual.norm_eps,
        linear_conv_kernel_dim=gdn.conv_width,
        linear_key_head_dim=gdn.key_dim,
        linear_value_head_dim=gdn.value_dim,
        linear_num_key_heads=gdn.num_key_heads,
        linear_num_value_heads=gdn.num_value_heads,
        num_experts=config.moe.num_experts,
        num_experts_per_tok=config.moe.top_k,
        moe_intermediate_size=config.moe.hidden,
        shared_expert_intermediate_size=config.moe.shared_hidden,
        norm_topk_prob=config.moe.has_normalized_weights,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    theirs._attn_implementation = "eager"
    return Qwen3NextForCausalLM(theirs).float()
