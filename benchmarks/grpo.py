"""GRPO on easy-VQA: a half-trained model, rewarded for exact answers by TRL inside transformers.

  python -m benchmarks.grpo --json benchmarks/results/grpo.json --picture docs/grpo.png

Trains the default preset for `--pretraining` steps, then samples eight answers to each question and rewards
those that are right. Accuracy is that of answers to test questions, whose images training never sees: of
sampled answers, which GRPO rewards, and of greedy ones.
Needs the optional group `finetune`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import easy_vqa
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.about import about
from utils.errors import run_script
from utils.plotting import curves

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = 8  # sampled to each question
QUESTIONS = 16  # of each step


def questions(part: str, count: int) -> list[dict[str, Any]]:
    """Questions, evenly spread, each with the path of its image and its answer."""
    load, load_paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[part]
    (texts, answers, images), paths = load(), load_paths()
    chosen = range(0, len(texts), max(1, len(texts) // count))
    return [
        {"question": texts[i], "answer": answers[i], "image": paths[images[i]]} for i in list(chosen)[:count]
    ]


@torch.no_grad()
def accuracy(model: Any, processor: Any, asked: list[dict[str, Any]], sampled: bool) -> float:
    """The share of right answers."""
    was_training, right = model.training, 0
    model.eval()
    for start in range(0, len(asked), 64):
        part = asked[start : start + 64]
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "path": row["image"]},
                        {"type": "text", "text": row["question"]},
                    ],
                }
            ]
            for row in part
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        new = model.generate(**inputs, max_new_tokens=8, do_sample=sampled)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        right += sum(text.strip() == row["answer"] for text, row in zip(texts, part, strict=True))
    model.train(was_training)
    return right / len(asked)


def exact_match(completions: list, answer: list[str], **_: Any) -> list[float]:
    """1 for the right answer, else 0."""
    texts = [completion[0]["content"].strip() for completion in completions]
    return [float(text == right) for text, right in zip(texts, answer, strict=True)]


class Measure(TrainerCallback):
    """Measures accuracy every `every` steps."""

    def __init__(self, every: int, processor: Any, asked: list[dict[str, Any]]) -> None:
        self.every, self.processor, self.asked = every, processor, asked
        self.points: list[tuple[int, float, float]] = []  # step, accuracy of sampled and of greedy answers

    def measure(self, step: int, model: Any) -> None:
        sampled, greedy = (accuracy(model, self.processor, self.asked, mode) for mode in (True, False))
        self.points.append((step, sampled, greedy))
        print(f"step {step}: sampled {sampled:.1%}, greedy {greedy:.1%}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(state.global_step, model)


def make_trainer(folder: str, work: str, args: argparse.Namespace) -> tuple[GRPOTrainer, Measure]:
    """TRL's trainer of the model in `folder`, and what measures it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model.model.left.vision_encoder.requires_grad_(False)  # as in the preset
    rows = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": row["question"]}],
            "answer": row["answer"],
        }
        for row in questions("train", 4 * QUESTIONS * args.steps)
    ]
    role = {"role": Value("string"), "content": Value("string")}
    features = Features(images=[ImageFeature()], prompt=[role], answer=Value("string"))
    measure = Measure(args.every, processor, questions("test", args.test))
    config = GRPOConfig(
        output_dir=f"{work}/grpo",
        max_steps=args.steps,
        per_device_train_batch_size=ANSWERS * QUESTIONS,
        num_generations=ANSWERS,
        max_completion_length=8,
        learning_rate=args.learning_rate,
        seed=args.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=exact_match,
        args=config,
        train_dataset=Dataset.from_list(rows, features=features),
        processing_class=processor,
        callbacks=[measure],
    )
    return trainer, measure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretraining", type=int, default=60, help="steps of supervised training [60]")
    parser.add_argument("--checkpoint", help="a model folder, instead of training one")
    parser.add_argument("--steps", type=int, default=120, help="steps of GRPO [120]")
    parser.add_argument("--every", type=int, default=30, help="steps between measurements [30]")
    parser.add_argument("--test", type=int, default=1000, help="test questions of a measurement [1000]")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--picture", help="draw the curve there")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        folder = args.checkpoint or f"{work}/run/model"
        if not args.checkpoint:
            command = [sys.executable, str(ROOT / "train_dual_tower.py"), "--output_dir", f"{work}/run"]
            command += ["--max_steps", str(args.pretraining), "--seed", str(args.seed)]
            subprocess.run(command, check=True)
        trainer, measure = make_trainer(folder, work, args)
        measure.measure(0, trainer.model)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    rewards = [(line["step"], line["reward"]) for line in trainer.state.log_history if "reward" in line]
    table = Table("step", "sampled answers", "greedy answers")
    for step, sampled, greedy in measure.points:
        table.add_row(str(step), f"{sampled:.1%}", f"{greedy:.1%}")
    Console().print(table)
    if args.picture:
        steps, sampled_line, greedy_line = zip(*measure.points, strict=True)
        lines = {"test, sampled": (steps, sampled_line), "test, greedy": (steps, greedy_line)}
        curves(
            "GRPO on easy-VQA: share of right answers",
            lines,
        ).save(args.picture)
    if args.json:
        result = about() | {
            "settings": vars(args),
            "seconds": round(seconds, 1),
            "accuracy": measure.points,
            "reward": rewards,
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
