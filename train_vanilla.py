"""Train a vanilla vision-language model, the baseline of the dual tower: one decoder for all tokens.

python train_vanilla.py                                       easy-VQA, the dual tower's default data
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
