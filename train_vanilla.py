"""Train a vanilla vision-language model: one decoder for image and text tokens, the baseline of the dual tower.

python train_vanilla.py                                       easy-VQA, as the dual tower's default
python train_vanilla.py --max_steps 20 --output_dir /tmp/try
"""

from configs.cli import resolve
from utils.errors import run_script


def main(argv: list[str]) -> None:
    config, flags = resolve(argv, str(__doc__), "vanilla_easyvqa")
    from models.vision_language_model import VisionLanguageModel
    from training.script import run_training

    run_training(config, flags, VisionLanguageModel)


if __name__ == "__main__":
    run_script(main)
