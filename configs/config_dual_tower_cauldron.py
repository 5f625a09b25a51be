"""The full-size dual tower on The Cauldron: SigLIP 2 B/16 at 512 pixels, SmolLM2-360M-Instruct twice.

For a GPU; weights and data come from the Hub.

The 222M-class variant, SigLIP B/16 at 224 pixels with SmolLM2-135M, is `--config dual_tower_cauldron_222m`.
Learning rates and steps follow nanoVLM's TrainConfig (projector 5.12e-3, backbones 5e-5, 40,000 steps). No
run of this size has been made yet.
"""

from configs.model import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from configs.train import Config, DataConfig, TrainConfig

SMOLLM2 = DecoderConfig(
    weights="HuggingFaceTB/SmolLM2-360M-Instruct",  # the largest pair below a billion parameters
)

CONFIG = Config(
    max_steps=40000,
    model=ModelConfig(
        vision=VisionConfig(
            name="vit_base_patch16_siglip_512.v2_webli",  # fine detail: 32 × 32 features of 16 pixels
            weights="hub",
            max_side=2048,  # up to 4 × 4 tiles, as in nanoVLM: documents and charts need the detail
        ),
        projector=ProjectorConfig(pixel_shuffle=4),  # 1024 features → 64 image tokens
        left=SMOLLM2,  # the same weights: its keys and values fit the right tower's queries
        right=SMOLLM2,
        left_attention="causal",  # as in pretraining
    ),
    # A mean sample of The Cauldron has some 340 image and 193 text tokens, the ratio of the stream lengths. A
    # window of 2,000 samples fills the rows. Workers: an image takes some 3 ms.
    data=DataConfig(
        sources="the_cauldron",
        validation_images=500,
        turns="chain",
        left_length=2600,
        right_length=1496,
        window=2000,
        workers=8,
    ),
    train=TrainConfig(
        local_batch_size=4,  # 16,384 tokens
        global_batch_size=32,  # 131,072 tokens, some 240 samples: a step mixes many tasks
        lr_vision=5e-5,  # pretrained on images; low, to adapt to text in images
        lr_projector=5e-3,  # random at the start; a linear map tolerates a high rate
        lr_left=5e-5,  # pretrained: a hundredth of the projector's
        lr_right=5e-5,
        warmup_steps=1200,  # 3 %: the projector adapts before the towers change much
        final_lr=0.1,  # the last steps still train
        weight_decay=0.01,  # low, to keep pretrained weights
        log_every=10,
        eval_every=1000,
        checkpoint_every=1000,
        keep_checkpoints=2,
    ),
)
