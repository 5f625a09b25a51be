"""Train a dual-tower vision-language model.

python train_dual_tower.py                                    the embedded default, easy-VQA, minutes on two CPU cores
python train_dual_tower.py --max_steps 20 --output_dir /tmp/try
python train_dual_tower.py --resume auto                      go on where the last run stopped
python train_dual_tower.py --train.lr_right 1e-3              any field of configs/schema.py
"""

import shlex
import sys
from pathlib import Path

from configs.errors import run_script
from configs.schema import resolve


def main(argv: list[str]) -> None:
    config, flags = resolve(argv, str(__doc__))
    import torch

    from data.build import build_data
    from eval.in_training import Validation, save_samples
    from models.dual_tower.dual_tower import DualTowerVLM
    from models.pretrained import load_vision_weights
    from training.feature_cache import FeatureCache, fingerprint
    from training.logging import RunLog
    from training.loop import Task, autocast, pick_device, train
    from training.run import open_run

    config, folder, checkpoint = open_run(config, flags)
    log = RunLog(folder)
    torch.manual_seed(config.seed)
    data = build_data(config, folder / "tokenizer")
    model = DualTowerVLM(config.model, data.tokenizer.vocabulary)
    load_vision_weights(model.left.vision_encoder)
    cache = FeatureCache(Path(config.cache_dir) / "features" / fingerprint(model.left.vision_encoder), int(config.train.feature_cache_gb * 2**30))
    model.left.vision_encoder.cache = cache
    validation = Validation(data.validation, config.data.left_length, config.data.right_length, config.train.rows, data.padding_id)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in model.parts().items())
    log.say(f"run {folder}: {len(data.training)} training and {len(data.validation)} validation images of {config.data.source}; parameters: {sizes}")

    def evaluate(step: int) -> dict[str, float]:
        with autocast(config.train, pick_device(config.train)):
            scores = validation.score(model)
        predictions = validation.predictions(model, data.validation, 8)
        save_samples(folder / "samples", step, predictions)
        log.say(f"step {step}: validation loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.2%}")
        for p in predictions[:4]:
            log.say(f"    {p['question']}  →  {p['prediction']}" + ("" if p["prediction"] == p["answer"] else f"   (truth: {p['answer']})"))
        return scores

    task = Task(data.batches, data.state, data.load_state, evaluate, cache.save)
    train(config, model, task, folder, log, checkpoint)
    model.save_pretrained(folder / "model")
    data.tokenizer.save(folder / "model")
    if data.dropped():
        log.say(f"training records dropped, by reason: {data.dropped()}")
    path, question = validation.questions[0]
    here = Path.cwd()
    python, image = (p.relative_to(here) if p.is_relative_to(here) else p for p in (Path(sys.executable), Path(path)))
    log.say(f"model: {folder / 'model'}\ntry it:\n  {python} generate.py --checkpoint {folder / 'model'} --image {image} --prompt {shlex.quote(question['user'])}")


if __name__ == "__main__":
    run_script(main)
