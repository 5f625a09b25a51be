"""The 222M-class pair on The Cauldron: SigLIP B/16 at 224 pixels and SmolLM2-135M-Instruct.

For one GPU of 12 GB or more.
"""

from dataclasses import replace

from configs.config_dual_tower_cauldron import CONFIG as FULL
from configs.model import DecoderConfig, ProjectorConfig, VisionConfig

SMOLLM2 = DecoderConfig(weights="HuggingFaceTB/SmolLM2-135M-Instruct")

CONFIG = replace(
    FULL,
    model=replace(
        FULL.model,
        vision=VisionConfig(name="vit_base_patch16_siglip_224.webli", weights="hub"),
        projector=ProjectorConfig(pixel_shuffle=2),  # 14 × 14 features → 49 image tokens
        left=SMOLLM2,
        right=SMOLLM2,
    ),
    # Rows of 1,024 tokens, for a small GPU.
    data=replace(FULL.data, left_length=600, right_length=424),
    # On a GPU, two rows per forward take some 11 GB, by the estimate of --fit-memory 12. --fit-memory chooses
    # more on a larger one.
    train=replace(FULL.train, local_batch_size=2, global_batch_size=128),
)
