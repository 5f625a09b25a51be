"""The full-size dual tower: SigLIP 2 B/16 at 512 pixels and SmolLM2-360M-Instruct in both towers, on The Cauldron. For a GPU; weights and data from the Hub.

The 222M-class variant, SigLIP B/16 at 224 pixels with SmolLM2-135M, is `--config dual_tower_cauldron_222m`. Rates are
nanoVLM's where it has them (its TrainConfig: projector 5.12e-3, backbones 5e-5, 40,000 steps); no run of this size has been made here yet.
"""

from configs.model import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from configs.train import Config, DataConfig, TrainConfig

SMOLLM2 = DecoderConfig(
    weights="HuggingFaceTB/SmolLM2-360M-Instruct",  # the largest whose pair stays below a billion parameters
)

CONFIG = Config(
    max_steps=40000,
    model=ModelConfig(
        vision=VisionConfig(
            name="vit_base_patch16_siglip_512.v2_webli",  # fine detail: 32 × 32 features of 16 pixels
            weights="hub",
            max_side=2048,  # up to 4 × 4 tiles, as nanoVLM cuts them: documents and charts need the detail
        ),
        projector=ProjectorConfig(
            pixel_shuffle=4
        ),  # 1024 features → 64 image tokens: text, not pixels, fills the rows
        left=SMOLLM2,  # its layers already make keys and values that the right tower's queries understand
        right=SMOLLM2,
        left_attention="causal",  # as the pretrained decoder has seen its tokens
    ),
    # On lengths like The Cauldron's a mean sample has some 340 image and 193 text tokens: the budgets have their proportion, and a row fills up from a window of 2,000. Workers: an image takes some 3 ms.
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
        global_batch_size=32,  # a step of 131,072 tokens, some 240 samples: large enough that the gradient of many tasks is not one task's
        lr_vision=5e-5,  # pretrained for just this; a little, for text in images
        lr_projector=5e-3,  # starts at random, and a linear map stands a high rate
        lr_left=5e-5,  # pretrained: a hundredth of the projector's
        lr_right=5e-5,
        warmup_steps=1200,  # 3 %: the projector settles before the towers follow it far
        final_lr=0.1,  # the last tenth still learns
        weight_decay=0.01,  # pretrained weights are not to be pulled to 0
        feature_cache_gb=0.0,  # the encoder trains: its features change
        log_every=10,
        eval_every=1000,
        checkpoint_every=1000,
        keep_checkpoints=2,
    ),
)
