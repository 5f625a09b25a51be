"""Train a dual-tower vision-language model.

python train_dual_tower.py                                    the default, easy-VQA: minutes on two CPU cores
python train_dual_tower.py --max_steps 20 --output_dir /tmp/try
python train_dual_tower.py --resume auto                      continue the last run
python train_dual_tower.py --train.lr_right 1e-3              any field of configs/train.py
"""

from configs.cli import resolve
from utils.errors import run_script


def main(argv: list[str]) -> None:
    config, flags = resolve(argv, str(__doc__))
    from models.dual_tower.dual_tower import DualTowerVLM
    from training.script import run_training

    run_training(config, flags, DualTowerVLM)


if __name__ == "__main__":
    run_script(main)
