"""nanoVLM checkpoints: of nanoVLM (vanilla) and of the first published dual tower (`left_context="prefix"`).

Their folders hold a flat `config.json` (`vit_*`, `lm_*`, `mp_*`) and `model.safetensors`.
"""

import json
import re
from typing import Any

from torch import Tensor

from configs.model import MAX_GRID, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig, Vocabulary
from utils.errors import UserError

RENAMED = (
    (r"^left_tower\.MP\.", "left.modality_projector."),
    (r"^left_tower\.vision_encoder\.", "left.vision_encoder."),
    (r"^left_tower\.decoder\.(head|token_embedding)\.", "left.embed_tokens."),
    (r"^left_tower\.decoder\.", "left.decoder."),
    (r"^right_tower\.", "right."),
    (r"^MP\.", "modality_projector."),
    (r"^decoder\.", "right."),
    (r"^(.*)vision_encoder\.", r"\1vision_encoder.backbone."),
    # in the vision encoder: nanoVLM's names → timm's
    (r"backbone\.patch_embedding\.conv\.", "backbone.patch_embed.proj."),
    (r"backbone\.patch_embedding\.position_embedding$", "backbone.pos_embed"),
    (r"backbone\.layer_norm\.", "backbone.norm."),
    (r"(backbone\.blocks\.\d+)\.ln", r"\1.norm"),
    (r"(backbone\.blocks\.\d+\.attn)\.qkv_proj", r"\1.qkv"),
    (r"(backbone\.blocks\.\d+\.attn)\.out_proj", r"\1.proj"),
    # in a decoder: nanoVLM's names → Hugging Face's
    (r"^(right|left\.decoder)\.blocks\.(\d+)\.norm1\.", r"\1.layers.\2.input_layernorm."),
    (r"^(right|left\.decoder)\.blocks\.(\d+)\.norm2\.", r"\1.layers.\2.post_attention_layernorm."),
    (r"^(right|left\.decoder)\.blocks\.(\d+)\.attn\.out_proj\.", r"\1.layers.\2.self_attn.o_proj."),
    (r"^(right|left\.decoder)\.blocks\.(\d+)\.attn\.", r"\1.layers.\2.self_attn."),
    (r"^(right|left\.decoder)\.blocks\.(\d+)\.", r"\1.layers.\2."),
    (r"^right\.token_embedding\.", "right.embed_tokens."),
)


def read_nanovlm(
    config: dict[str, Any], tensors: dict[str, Tensor], context: str
) -> tuple[str, ModelConfig, Vocabulary, dict[str, Tensor]]:
    """→ model type, configuration, vocabulary, and all tensors, used or not, under this project's names."""
    dual = any(name.startswith("left_tower.") for name in tensors)
    try:
        model, vocabulary = _model_config(config, dual, context), _vocabulary(config, context)
    except KeyError as error:
        raise UserError(f"{context}: the key {error} is missing") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{context}: config.json does not describe a model: {error}") from None
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_embd.inv_freq"):
            continue  # computed from the configuration
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name == "right.head.weight":
            name = "right.embed_tokens.weight" if model.right.tied_embeddings else "right.lm_head.weight"
        renamed[name] = tensor
    return ("dual_tower" if dual else "vanilla"), model, vocabulary, renamed


def _model_config(c: dict[str, Any], dual: bool, context: str) -> ModelConfig:
    for key, only in (
        ("vit_cls_flag", False),
        ("vit_ln_eps", 1e-6),
        ("lm_attn_scaling", 1.0),
        ("lm_use_tokens", False),
    ):
        if c.get(key, only) != only:
            raise UserError(f"{context}: {key} = {c[key]!r} is not supported, only {only!r}")
    options = {
        "embed_dim": c["vit_hidden_dim"],
        "depth": c["vit_n_blocks"],
        "num_heads": c["vit_n_heads"],
        "patch_size": c["vit_patch_size"],
        "mlp_ratio": c["vit_inter_dim"] / c["vit_hidden_dim"],
        "act_layer": "gelu_tanh",
    }
    decoder = DecoderConfig(
        layers=c["lm_n_blocks"],
        hidden_size=c["lm_hidden_dim"],
        heads=c["lm_n_heads"],
        kv_heads=c["lm_n_kv_heads"],
        head_size=c["lm_hidden_dim"] // c["lm_n_heads"],
        mlp_size=c["lm_inter_dim"],
        tied_embeddings=c["lm_tie_weights"],
        rope_theta=float(c["lm_re_base"]),
        norm_eps=c["lm_rms_eps"],
        max_positions=c["lm_max_position_embeddings"],
    )
    size = c["vit_img_size"]
    # 0: a checkpoint of before images were split into tiles
    max_side = min(c.get("max_img_size") or 0, MAX_GRID * size) // size * size
    vision = VisionConfig(
        name="vit_base_patch16_siglip_224",
        weights="random",
        image_size=size,
        max_side=max_side,
        enlarge=bool(c.get("resize_to_max_side_len")),
        grid=size // c["vit_patch_size"],
        normalize="unit",
        options=json.dumps(options),
    )
    return ModelConfig(
        vision,
        ProjectorConfig("linear", c["mp_pixel_shuffle_factor"]),
        decoder,
        decoder,
        "prefix" if dual else "none",
        image_isolation=False,
    )


def _vocabulary(c: dict[str, Any], context: str) -> Vocabulary:
    extra = c.get("vlm_extra_tokens") or {}
    if next(iter(extra), None) != "image_token":
        raise UserError(
            f"{context}: vlm_extra_tokens must begin with image_token, the first id after the text's "
            f"(found {', '.join(list(extra)[:3]) or 'none'})"
        )
    markers = c["lm_vocab_size"] - c["lm_base_vocab_size"] - 1
    if markers != len(extra) - 1:
        raise UserError(
            f"{context}: lm_vocab_size leaves room for {markers} markers, "
            f"vlm_extra_tokens has {len(extra) - 1}"
        )
    return Vocabulary(c["lm_base_vocab_size"], markers)
