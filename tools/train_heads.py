"""Train multi-token heads for a model, by self-distillation. All other weights stay the same, bit for bit.

  python -m tools.train_heads --checkpoint runs/dual_tower_easyvqa/model --output runs/with_heads \\
      --sources easy_vqa --tokens 20000

The model answers prompts greedily. The hidden states of the answers are computed once and held in memory; the
heads learn to predict the answers' tokens from them. Prompts are the questions of --sources, the lines of
--prompts, or else what the model itself generates in the user's turn (arXiv 2406.08464).
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from configs.cli import FlagParser, add_flags, add_model_flags, override
from configs.model import GenerationConfig, MultiTokenConfig
from configs.settings import (
    Bounds,
    Count,
    PositiveFraction,
    PositiveInt,
    check_bounds,
    setting,
)
from configs.train import DataConfig
from data.collators import collate_prompts
from data.conversations import Conversation
from data.datasets import questions_of as record_questions
from data.images import ImageError
from data.parquet import UnreadableBlock
from data.render import Document
from data.sources import open_sources
from eval.predictor import Predictor
from eval.validation import images_of_record
from hf.export import add_hf_code
from models.generation import generate, prefill
from models.kernels import use_kernels
from models.multi_token import MultiTokenHeads, chains
from models.sampling import DraftGuard
from utils.device import computes_bf16
from utils.errors import UsageError, UserError, run_script
from utils.files import replacing_folder

Question = tuple[list[Any], str | Conversation]  # images, and a question or a conversation that ends with one
HELD_OUT = 20  # one answer in so many is held out


@dataclass(frozen=True)
class HeadsConfig:
    """Flags of the program."""

    heads: PositiveInt = setting(4, "K, multi-token heads")
    mlp_size: PositiveInt = setting(1536, "inner size of the heads' gated MLP")
    vocabulary: Count = setting(8192, "tokens that can be drafted, the most frequent of the answers (0: all)")
    sources: str = setting(
        "",
        "sources of images and questions, as --data.sources; none: --prompts, or the model itself",
    )
    validation_images: int = setting(200, "images of each source that are held out, as in training")
    prompts: str = setting("", "file with one prompt per line")
    tokens: PositiveInt = setting(250_000, "answer tokens to train on")
    answer_tokens: PositiveInt = setting(128, "maximum tokens of an answer")
    rows: PositiveInt = setting(64, "prompts answered together")
    dtype: Literal["auto", "bf16", "fp32"] = setting(
        "fp32",
        "dtype of the weights while the model answers; auto: bf16 where the machine multiplies in it. "
        "Heads are trained, and the model is written, in fp32",
    )
    epochs: PositiveInt = setting(4, "epochs over the answers")
    batch_tokens: PositiveInt = setting(2048, "tokens per step")
    lr: Annotated[float, Bounds(gt=0, lt=10)] = setting(1e-3, "peak learning rate")
    head_decay: PositiveFraction = setting(0.8, "each further head's weight ÷ that of the one before")
    seed: int = setting(0, "seed of prompts, order and weights")

    def __post_init__(self) -> None:
        check_bounds(self, "--")
        if self.sources and self.prompts:
            raise UsageError("--sources and --prompts: give one of them")


@dataclass(frozen=True)
class AnswerStates:
    """One answer of the model: its tokens, and the hidden states they were chosen from."""

    hidden: Tensor  # (T, D)
    tokens: Tensor  # (T,)


def question_batches(
    predictor: Predictor, config: HeadsConfig, held_out: bool = False
) -> Iterator[list[Question]]:
    """Yield batches of questions without end.

    `held_out`: questions on the sources' validation images, unseen by the model and by its heads.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if not config.prompts and not config.sources:
        while True:
            yield [([], text) for text in generated_prompts(predictor, config.rows, generator)]
    readers: list[Callable[[], list[Question]]]  # a record is read when it is drawn
    if config.prompts:
        lines = map(str.strip, Path(config.prompts).read_text(encoding="utf-8").splitlines())
        readers = [lambda line=line: [([], line)] for line in lines if line]
    else:
        sources = open_sources(
            DataConfig(sources=config.sources, validation_images=config.validation_images)
        )[held_out]
        readers = [
            lambda s=s, i=i: questions_of(s.records, i) for s in sources for i in range(s.start, s.stop)
        ]
    if not readers:
        raise UserError(f"{config.prompts or config.sources} holds no prompt")
    waiting: list[Question] = []
    while True:  # one epoch
        before = len(waiting)
        for index in torch.randperm(len(readers), generator=generator).tolist():
            waiting += readers[index]()
            while len(waiting) >= config.rows:
                yield waiting[: config.rows]
                waiting, before = waiting[config.rows :], -1
        if len(waiting) == before:
            raise UserError(f"{config.sources}: no record can be used")


def questions_of(records: Any, index: int) -> list[Question]:
    """Return a record's questions, or [] if it cannot be used."""
    try:
        record = records[index]
    except UnreadableBlock:
        return []
    if record["images"] is None:
        return []
    return [(images_of_record(record, messages), messages) for messages, _ in record_questions(record)]


def generated_prompts(predictor: Predictor, rows: int, generator: torch.Generator) -> list[str]:
    """Sample prompts from the model itself: its text in the user's turn, up to the first sentence's end."""
    renderer = predictor.renderer
    start = renderer.user_start()
    settings = GenerationConfig(
        sampling=True,
        min_p=0.01,
        max_new_tokens=40,
        seed=int(torch.randint(1 << 30, (), generator=generator)),
        speculative="off",
    )
    prompt = Document([], [], [], start, list(range(len(start))), [-100] * len(start))
    batch = {name: t.to(predictor.model.device) for name, t in collate_prompts([prompt] * rows).items()}
    output = generate(
        predictor.model, images=[[]] * rows, turn_end=renderer.tokenizer.turn_end, settings=settings, **batch
    )
    texts = []
    for tokens in output.tokens:
        text = renderer.tokenizer.decode(tokens).strip()
        ends = [i + 1 for i, c in enumerate(text) if c in ".?!\n" and i >= 20]
        texts.append(text[: ends[0]].strip() if ends else text)
    return [text for text in texts if text]


@torch.inference_mode()
def answers(
    predictor: Predictor, questions: list[tuple[list[Any], str]], config: HeadsConfig
) -> list[AnswerStates]:
    """Return the model's greedy answers with their hidden states, without questions on damaged images."""
    model, renderer = predictor.model, predictor.renderer
    tiles, prompts = [], []
    for images, question in questions:
        try:
            tiles.append([predictor.tiles(image) for image in images])
        except ImageError:
            continue  # collect() counts the answers that are missing
        prompts.append(predictor.prompt(tiles[-1], question))
    if not prompts:
        return []
    rows, extra = predictor.images_of(prompts, tiles)[0], predictor.tiles_of(tiles)
    batch = {name: t.to(model.device) for name, t in collate_prompts(prompts).items()}
    settings = GenerationConfig(max_new_tokens=config.answer_tokens, speculative="off")
    output = generate(
        model, images=rows, turn_end=renderer.tokenizer.turn_end, settings=settings, tiles=extra, **batch
    )
    whole, starts = [], []
    for prompt, tokens in zip(prompts, output.tokens, strict=True):
        end = prompt.right_positions[-1] + 1
        positions = [*prompt.right_positions, *range(end, end + len(tokens))]
        starts.append(len(prompt.right_ids) - 1)
        whole.append(replace(prompt, right_ids=[*prompt.right_ids, *tokens], right_positions=positions))
    batch = {name: t.to(model.device) for name, t in collate_prompts(whole).items()}
    _, hidden = prefill(model, batch["ids"], batch["positions"], rows, 0, extra)
    result = []
    for b, (start, tokens) in enumerate(zip(starts, output.tokens, strict=True)):
        ended = len(tokens) < config.answer_tokens
        states = hidden[b, start : start + len(tokens) + ended].to(torch.bfloat16).cpu()
        labels = torch.tensor([*tokens, *[renderer.tokenizer.turn_end] * ended])
        result.append(AnswerStates(states, labels))
    return [answer for answer in result if len(answer.tokens)]


def collect(predictor: Predictor, config: HeadsConfig, console: Console) -> list[AnswerStates]:
    """Collect answers of at least `config.tokens` tokens."""
    collected: list[AnswerStates] = []
    missing = 0
    with Progress(console=console, transient=True) as bar:
        task, done = bar.add_task("generating answers", total=config.tokens), 0
        for questions in question_batches(predictor, config):
            new = answers(predictor, questions, config)
            if not new:
                raise UserError("the model's answers are empty: nothing to train on")
            collected += new
            missing += len(questions) - len(new)
            done += sum(len(t.tokens) for t in new)
            bar.update(task, completed=done)
            if done >= config.tokens:
                if missing:
                    reason = "their images cannot be used, or the answer was empty"
                    console.print(f"{missing:,} questions left out: {reason}")
                return collected
    raise AssertionError("question_batches() does not end")


def fit(
    model: Any, heads: MultiTokenHeads, samples: list[AnswerStates], config: HeadsConfig, console: Console
) -> None:
    """Train the heads on hidden states."""
    embedding, unembedding = model.right.embed_tokens, model.right.unembedding.detach()
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    steps = config.epochs * max(1, sum(len(t.tokens) for t in samples) // config.batch_tokens)
    weights = torch.tensor([config.head_decay**k for k in range(config.heads)], device=model.device)
    generator, step = torch.Generator().manual_seed(config.seed), 0
    bf16 = computes_bf16(model.device)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("training heads", total=steps)
        while step < steps:
            waiting = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
            while waiting and step < steps:
                batch = [waiting.pop()]
                while waiting and sum(len(t.tokens) for t in batch) < config.batch_tokens:
                    batch.append(waiting.pop())
                hidden, labels, documents = as_row(batch, model.device)
                factor = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * factor
                with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                    sums = heads.losses(hidden, labels, documents, embedding, unembedding)
                counts = (chains(labels, documents, config.heads)[:, 1:] >= 0).sum(0).clamp(min=1)
                (weights * sums / counts).sum().backward()
                torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update(task, completed=step)


def as_row(batch: list[AnswerStates], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pack answers into one row: hidden (1, R, D), labels and documents (1, R)."""
    hidden = torch.cat([t.hidden for t in batch])[None].float().to(device)
    labels = torch.cat([t.tokens for t in batch])[None].to(device)
    documents = torch.cat([torch.full((len(t.tokens),), i) for i, t in enumerate(batch)])[None].to(device)
    return hidden, labels, documents


@torch.inference_mode()
def acceptance(model: Any, heads: MultiTokenHeads, samples: list[AnswerStates]) -> tuple[list[float], float]:
    """Measure the heads on answers: acceptance rate of each head, and tokens per greedy decode step.

    A head's rate counts the drafts whose predecessors were all accepted.
    """
    right, reached, decode_steps = [0] * heads.count, [0] * heads.count, 0
    draftable = heads.draftable(model.right.unembedding)
    for t in samples:
        hidden, labels, documents = as_row([t], model.device)
        targets = chains(labels, documents, heads.count)
        drafts = heads.draft(
            model.right.embed_tokens,
            draftable,
            hidden[0],
            targets[:, 0],
            heads.count,
            GenerationConfig(),
        )
        good = (drafts.tokens == targets[:, 1:]).long().cumprod(1)  # (S, K)
        decode_steps += len(targets)
        for k in range(heads.count):
            known = targets[:, k + 1] >= 0
            reached[k] += int((known & (good[:, k - 1] > 0 if k else True)).sum())
            right[k] += int(good[:, k].sum())
    return [r / max(1, n) for r, n in zip(right, reached, strict=True)], 1 + sum(right) / max(1, decode_steps)


def frequent_ids(samples: list[AnswerStates], count: int, vocabulary: int) -> list[int]:
    """Return the sorted ids of the `count` most frequent tokens; the lowest unused ids fill up a shortage."""
    counts = Counter(int(i) for t in samples for i in t.tokens)
    ranked = [i for i, _ in counts.most_common(count)]
    ranked += [i for i in range(vocabulary) if i not in counts][: count - len(ranked)]
    return sorted(ranked)


def main(argv: list[str]) -> None:
    parser = FlagParser(
        prog="python -m tools.train_heads",
        description=str(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="model folder to write: the same model, with heads"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser, HeadsConfig, HeadsConfig(), group="heads")
    flags = vars(parser.parse(argv))
    config = override(HeadsConfig(), flags)
    output = Path(flags["output"])
    contents = output.iterdir() if output.is_dir() else [output]
    if output.exists() and not (output / "config.json").is_file() and any(contents):
        raise UsageError(f"--output {output} exists and is not a model folder")
    console = Console()
    use_kernels(flags["kernels"])
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    config_file = Path(flags["config"]) if flags["config"] else None
    samples = collect(
        Predictor.from_pretrained(flags["checkpoint"], config.dtype, config=config_file), config, console
    )
    tokens = sum(len(t.tokens) for t in samples)
    console.print(f"{len(samples):,} answers of {tokens:,} tokens in {time.perf_counter() - started:.0f} s")
    predictor = Predictor.from_pretrained(flags["checkpoint"], config=config_file)
    model = predictor.model
    V = len(model.right.unembedding)
    settings = MultiTokenConfig(
        config.heads, config.mlp_size, config.vocabulary if config.vocabulary < V else 0
    )
    heads = MultiTokenHeads(settings, model.right.config, V).to(model.device)
    if settings.vocabulary:
        heads.draft_ids.copy_(torch.tensor(frequent_ids(samples, settings.vocabulary, V)))
    held_out, trained = samples[::HELD_OUT], [t for i, t in enumerate(samples) if i % HELD_OUT]
    started = time.perf_counter()
    fit(model, heads, trained or samples, config, console)
    console.print(f"{config.epochs} epochs in {time.perf_counter() - started:.0f} s")
    rates, tokens_per_step = acceptance(model, heads, held_out)
    console.print(
        f"acceptance rate by head, on held-out answers: {', '.join(f'{rate:.1%}' for rate in rates)}; "
        f"{tokens_per_step:.2f} tokens per decode step",
        soft_wrap=True,
    )
    heads.acceptance_rates.copy_(torch.tensor(rates))  # they set the number of drafts
    console.print(
        f"drafts per decode step: {DraftGuard.of(heads, GenerationConfig(), 1, model.device).draft_length}"
    )
    model.heads = heads
    model.config = replace(model.config, multi_token=settings)
    with replacing_folder(output) as temp_path:
        model.save_pretrained(temp_path)
        predictor.renderer.tokenizer.save(temp_path)
        add_hf_code(temp_path, predictor.renderer.tokenizer)
    console.print(f"model: {output}", soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
