"""Give a trained model multi-token heads, without changing what it says.

  python -m tools.train_heads --checkpoint runs/dual_tower_easyvqa/model --output runs/with_heads --sources easy_vqa --tokens 20000

The model answers prompts greedily; its hidden states along the answers are computed once and kept; the heads learn from
them to say what the model itself will say next (self-distillation). The rest of the model stays as it is, bit for bit.
Prompts are the questions of --sources, the lines of --prompts, or else what the model itself says in the user's turn
(arXiv 2406.08464).
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from configs.cli import FlagParser, add_flags, override
from configs.model import GenerationConfig, MultiTokenConfig, opt
from configs.train import DataConfig
from data.collators import collate_prompts
from data.images import ImageError
from data.parquet import UnreadableBlock
from data.render import Document
from data.sources import open_sources
from eval.predictor import Predictor
from hf.export import add_hf_code
from models.generation import generate, prefill
from models.layers import computes_bf16
from models.multi_token import MultiTokenHeads, chains
from utils.errors import UsageError, UserError, run_script
from utils.files import replacing_folder

Question = tuple[list[Any], str]  # images, text
HELD_OUT = 20  # every so many documents one is not trained on


@dataclass(frozen=True)
class HeadsConfig:
    heads: int = opt(4, "K, multi-token heads")
    mlp_size: int = opt(1536, "inner size of the heads' gated MLP")
    vocabulary: int = opt(8192, "tokens that can be drafted, the commonest in the answers (0: all)")
    sources: str = opt(
        "",
        "where images and questions come from, as --data.sources in training; none: --prompts, or the model itself",
    )
    validation_images: int = opt(200, "images of each source that are left out, as in training")
    prompts: str = opt("", "file with a prompt a line")
    tokens: int = opt(250_000, "answer tokens to learn from")
    answer_tokens: int = opt(128, "longest answer")
    rows: int = opt(64, "prompts answered together")
    dtype: Literal["auto", "bf16", "fp32"] = opt(
        "fp32",
        "of the weights while the model answers; auto: bf16 where the machine multiplies in it. Heads are trained, and the model is written, in fp32",
    )
    epochs: int = opt(4, "times that every token is learnt from")
    batch_tokens: int = opt(2048, "tokens of a step")
    lr: float = opt(1e-3, "peak learning rate")
    head_decay: float = opt(0.8, "each further head's weight ÷ that of the one before")
    seed: int = opt(0, "of prompts, order and weights")

    def __post_init__(self) -> None:
        for name in ("heads", "mlp_size", "tokens", "answer_tokens", "rows", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.lr < 10 or not 0 < self.head_decay <= 1 or self.vocabulary < 0:
            raise UsageError("--lr must be above 0, --head_decay in (0, 1], --vocabulary 0 or more")
        if self.sources and self.prompts:
            raise UsageError("--sources and --prompts: give one of them")


@dataclass(frozen=True)
class AnswerStates:
    """An answer of the model: the hidden states that its tokens were chosen from, and the tokens."""

    hidden: Tensor  # (T, D)
    tokens: Tensor  # (T,)


def asked(predictor: Predictor, config: HeadsConfig, held_out: bool = False) -> Iterator[list[Question]]:
    """Batches of (images, question) without end. `held_out`: of the sources' validation images, that neither the model nor its heads learnt from."""
    generator = torch.Generator().manual_seed(config.seed)
    if not config.prompts and not config.sources:
        while True:
            yield [([], text) for text in invented(predictor, config.rows, generator)]
    if config.prompts:
        lines = [
            line.strip()
            for line in Path(config.prompts).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        found: list[Callable[[], list[Question]]] = [lambda line=line: [([], line)] for line in lines]
    else:
        sources = open_sources(
            DataConfig(sources=config.sources, validation_images=config.validation_images)
        )[held_out]
        found = [lambda s=s, i=i: questions_of(s.records, i) for s in sources for i in range(s.start, s.stop)]
    if not found:
        raise UserError(f"{config.prompts or config.sources} holds no prompt")
    waiting: list[Question] = []
    while True:  # a lap; records are read when their turn comes
        before = len(waiting)
        for place in torch.randperm(len(found), generator=generator).tolist():
            waiting += found[place]()
            while len(waiting) >= config.rows:
                yield waiting[: config.rows]
                waiting, before = waiting[config.rows :], -1
        if len(waiting) == before:
            raise UserError(f"{config.sources}: no record can be used")


def questions_of(records: Any, index: int) -> list[Question]:
    """What a record asks; nothing where it cannot be used."""
    try:
        record = records[index]
    except UnreadableBlock:
        return []
    if record.get("problem") or record["images"] is None:
        return []
    return [
        (record["images"], turn["user"])
        for turn in record["texts"] or ()
        if isinstance(turn.get("user"), str) and turn["user"].strip()
    ]


def invented(predictor: Predictor, rows: int, generator: torch.Generator) -> list[str]:
    """What the model says where a user would speak: sampled, up to its first sentence's end."""
    renderer = predictor.renderer
    start = renderer.user
    settings = GenerationConfig(
        sampling=True,
        min_p=0.01,
        max_new_tokens=40,
        seed=int(torch.randint(1 << 30, (), generator=generator)),
        speculative="off",
    )
    prompt = Document([], [], [], start, list(range(len(start))), [-100] * len(start))
    batch = {name: t.to(predictor.model.device) for name, t in collate_prompts([prompt] * rows).items()}
    made = generate(
        predictor.model, images=[[]] * rows, stop=renderer.tokenizer.turn_end, settings=settings, **batch
    )
    texts = []
    for tokens in made.tokens:
        text = renderer.tokenizer.decode(tokens).strip()
        ends = [i + 1 for i, c in enumerate(text) if c in ".?!\n" and i >= 20]
        texts.append(text[: ends[0]].strip() if ends else text)
    return [text for text in texts if text]


@torch.inference_mode()
def answers(
    predictor: Predictor, questions: list[tuple[list[Any], str]], config: HeadsConfig
) -> list[AnswerStates]:
    """The model's greedy answers with the hidden states along them."""
    model, renderer = predictor.model, predictor.renderer
    tiles, prompts = [], []
    for images, text in questions:
        try:
            tiles.append([predictor.tiles(image) for image in images])
        except ImageError:
            continue  # collect() counts the answers that are missing
        prompts.append(renderer.prompt([t.grid for t in tiles[-1]], [{"user": text}]))
    if not prompts:
        return []
    rows, extra = predictor.images_of(prompts, tiles)[0], predictor.tiles_of(tiles)
    batch = {name: t.to(model.device) for name, t in collate_prompts(prompts).items()}
    settings = GenerationConfig(max_new_tokens=config.answer_tokens, speculative="off")
    made = generate(
        model, images=rows, stop=renderer.tokenizer.turn_end, settings=settings, tiles=extra, **batch
    )
    whole, starts = [], []
    for prompt, tokens in zip(prompts, made.tokens, strict=True):
        last = prompt.right_positions[-1]
        starts.append(len(prompt.right_ids) - 1)
        whole.append(
            replace(
                prompt,
                right_ids=[*prompt.right_ids, *tokens],
                right_positions=[*prompt.right_positions, *range(last + 1, last + 1 + len(tokens))],
            )
        )
    batch = {name: t.to(model.device) for name, t in collate_prompts(whole).items()}
    _, hidden = prefill(model, batch["ids"], batch["positions"], rows, 0, extra)
    told = []
    for b, (start, tokens) in enumerate(zip(starts, made.tokens, strict=True)):
        ended = len(tokens) < config.answer_tokens
        told.append(
            AnswerStates(
                hidden[b, start : start + len(tokens) + ended].to(torch.bfloat16).cpu(),
                torch.tensor([*tokens, *[renderer.tokenizer.turn_end] * ended]),
            )
        )
    return [t for t in told if len(t.tokens)]


def collect(predictor: Predictor, config: HeadsConfig, console: Console) -> list[AnswerStates]:
    told: list[AnswerStates] = []
    missing = 0
    with Progress(console=console, transient=True) as bar:
        task, done = bar.add_task("the model answers", total=config.tokens), 0
        for questions in asked(predictor, config):
            new = answers(predictor, questions, config)
            if not new:
                raise UserError("the model's answers are empty: nothing to learn from")
            told += new
            missing += len(questions) - len(new)
            done += sum(len(t.tokens) for t in new)
            bar.update(task, completed=done)
            if done >= config.tokens:
                if missing:
                    console.print(
                        f"{missing:,} questions left out: their images cannot be used, or the answer was empty"
                    )
                return told
    raise AssertionError("asked() does not end")


def fit(
    model: Any, heads: MultiTokenHeads, told: list[AnswerStates], config: HeadsConfig, console: Console
) -> None:
    """Train the heads on kept hidden states."""
    embedding, unembedding = model.right.embed_tokens, model.right.unembedding.detach()
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    steps = config.epochs * max(1, sum(len(t.tokens) for t in told) // config.batch_tokens)
    weights = torch.tensor([config.head_decay**k for k in range(config.heads)], device=model.device)
    generator, step = torch.Generator().manual_seed(config.seed), 0
    bf16 = computes_bf16(model.device)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("the heads learn", total=steps)
        while step < steps:
            waiting = [told[i] for i in torch.randperm(len(told), generator=generator).tolist()]
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
    """Answers → one packed row: hidden (1, R, D), labels and documents (1, R)."""
    hidden = torch.cat([t.hidden for t in batch])[None].float().to(device)
    labels = torch.cat([t.tokens for t in batch])[None].to(device)
    documents = torch.cat([torch.full((len(t.tokens),), i) for i, t in enumerate(batch)])[None].to(device)
    return hidden, labels, documents


@torch.inference_mode()
def acceptance(model: Any, heads: MultiTokenHeads, told: list[AnswerStates]) -> tuple[list[float], float]:
    """On answers: how often each head is right where those before it are, and the tokens that a greedy pass would give."""
    right, reached, decode_steps = [0] * heads.count, [0] * heads.count, 0
    unembed = heads.unembedder(model.right.unembedding)
    for t in told:
        hidden, labels, documents = as_row([t], model.device)
        targets = chains(labels, documents, heads.count)
        drafts = heads.draft(
            model.right.embed_tokens,
            unembed,
            hidden[0],
            targets[:, 0],
            heads.count,
            lambda logits: (logits.max(-1).indices, None),
        )
        good = (drafts.tokens == targets[:, 1:]).long().cumprod(1)  # (S, K)
        decode_steps += len(targets)
        for k in range(heads.count):
            known = targets[:, k + 1] >= 0
            reached[k] += int((known & (good[:, k - 1] > 0 if k else True)).sum())
            right[k] += int(good[:, k].sum())
    return [r / max(1, n) for r, n in zip(right, reached, strict=True)], 1 + sum(right) / max(1, decode_steps)


def main(argv: list[str]) -> None:
    parser = FlagParser(
        prog="python -m tools.train_heads",
        description=str(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model folder")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="model folder to write: the same model, with heads"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser, HeadsConfig, HeadsConfig(), group="heads")
    flags = vars(parser.parse(argv))
    config = override(HeadsConfig(), flags)
    output = Path(flags["output"])
    if (
        output.exists()
        and not (output / "config.json").is_file()
        and any(output.iterdir() if output.is_dir() else [output])
    ):
        raise UsageError(f"--output {output} exists and is not a model folder")
    console = Console()
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    told = collect(Predictor.from_pretrained(flags["checkpoint"], config.dtype), config, console)
    tokens = sum(len(t.tokens) for t in told)
    console.print(f"{len(told):,} answers of {tokens:,} tokens in {time.perf_counter() - started:.0f} s")
    predictor = Predictor.from_pretrained(flags["checkpoint"])
    model = predictor.model
    counts, V = Counter(int(i) for t in told for i in t.tokens), len(model.right.unembedding)
    settings = MultiTokenConfig(
        config.heads, config.mlp_size, config.vocabulary if config.vocabulary < V else 0
    )
    heads = MultiTokenHeads(settings, model.right.config, V).to(model.device)
    if settings.vocabulary:  # the commonest; where there are fewer, the first ids beside them
        ranked = [i for i, _ in counts.most_common(settings.vocabulary)]
        ranked += [i for i in range(V) if i not in counts][: settings.vocabulary - len(ranked)]
        heads.draft_ids.copy_(torch.tensor(sorted(ranked)))
    held_out, learnt = told[::HELD_OUT], [t for i, t in enumerate(told) if i % HELD_OUT]
    started = time.perf_counter()
    fit(model, heads, learnt or told, config, console)
    console.print(f"{config.epochs} epochs in {time.perf_counter() - started:.0f} s")
    shares, per_pass = acceptance(model, heads, held_out)
    console.print(
        "on answers held out, head by head right where those before it are: "
        + ", ".join(f"{s:.1%}" for s in shares)
        + f"; {per_pass:.2f} tokens a pass"
    )
    heads.acceptance_rates.copy_(torch.tensor(shares))
    model.heads = heads
    model.config = replace(model.config, multi_token=settings)
    with replacing_folder(output) as beside:
        model.save_pretrained(beside)
        predictor.renderer.tokenizer.save(beside)
        add_hf_code(beside, predictor.renderer.tokenizer)
    console.print(f"model: {output}", soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
