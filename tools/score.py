"""Score how well images and texts of training records match, with a CLIP model of open_clip.

  python -m tools.score --data.sources openmoji --output scores.parquet
  bash train.sh --data.sources openmoji --data.curation scores.parquet --data.filters.min_clip_score 0.2

A record's score is the mean cosine similarity of its images and its texts: of captions, or of questions with
their answers. Records without a readable image get no score. Use the same --data.sources as for training.

Flags, besides those of a configuration:"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.conversations import CAPTION_PROMPT, ConversationError, conversations_of, exchanges_of, text_of
from data.curation import write_marks
from data.images import open_image
from data.mixture import Source
from data.parquet import UnreadableBlock
from data.sources import open_sources
from tools.inspection import arguments, track_progress
from utils.device import pick_device
from utils.errors import ImageError, UserError, run_script

OWN: dict[str, tuple[Any, str]] = {
    "output": ("scores.parquet", "file to write"),
    "clip": ("ViT-B-32", "open_clip's name of the model, or local-dir:FOLDER"),
    "clip_weights": ("laion2b_s34b_b79k", "open_clip's name of the weights, or a file; '' with local-dir"),
    "batch": (64, "images at a time"),
}


class Scorer:
    """Cosine similarities of images and texts. Errors: `UserError` for an unknown model."""

    def __init__(self, name: str, weights: str, device: torch.device) -> None:
        try:
            import open_clip
        except ImportError:
            raise UserError("open_clip is not installed: pip install 'dualtowervlm[curation]'") from None

        try:
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                name, weights or None, device=device
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # of the Hub, of the file, of the name
            raise UserError(f"--clip {name}: {error}") from error
        self.model.eval()
        self.device = device

    @torch.inference_mode()
    def features(self, images: list[Any], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return unit vectors of images and of texts: two arrays (N, D)."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        tokens = self.tokenizer(texts).to(self.device)
        of_images = self.model.encode_image(pixels, normalize=True)
        of_texts = self.model.encode_text(tokens, normalize=True)
        return of_images.float().cpu().numpy(), of_texts.float().cpu().numpy()


def texts_of(record: dict[str, Any]) -> list[str]:
    """Return what a record says about its images: captions, or questions with their answers."""
    if record.get("problem") or "interleaved" in record:
        return []
    try:
        conversations = conversations_of(record, "branch")
    except ConversationError:
        return []
    texts = []
    for messages in conversations:
        for start, end in exchanges_of(messages):
            question = "".join(map(text_of, messages[start : end - 1])).replace(CAPTION_PROMPT, "")
            texts.append(f"{question} {text_of(messages[end - 1])}".strip())
    return list(filter(None, texts))


def usable(sources: list[Source]) -> Iterator[tuple[str, int, list[Any], list[str]]]:
    """Yield source, number, images and texts of every record, without either where it cannot be used."""
    for source in sources:
        for number in range(len(source.records)):
            try:
                record = source.records[number]
                yield source.name, number, list(map(open_image, record["images"] or ())), texts_of(record)
            except (ImageError, UnreadableBlock):
                yield source.name, number, [], []


def main(argv: list[str]) -> None:
    args, config, _ = arguments(argv, str(__doc__), OWN)
    sources, _ = open_sources(config.data)
    scorer = Scorer(args.clip, args.clip_weights, pick_device("auto"))
    total = sum(len(source.records) for source in sources)
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[str, int, list[Any], list[str]]] = []

    def score_waiting() -> None:
        images = [image for _, _, own, _ in waiting for image in own]
        texts = [text for _, _, _, own in waiting for text in own]
        if not images:
            return
        of_images, of_texts = scorer.features(images, texts)
        i = t = 0
        for source, number, own_images, own_texts in waiting:
            similarities = of_images[i : i + len(own_images)] @ of_texts[t : t + len(own_texts)].T
            i, t = i + len(own_images), t + len(own_texts)
            rows.append({"source": source, "record": number, "clip_score": float(similarities.mean())})
        waiting.clear()

    for entry in track_progress(usable(sources), total, "records scored"):
        if entry[2] and entry[3]:
            waiting.append(entry)
        if sum(len(images) for _, _, images, _ in waiting) >= args.batch:
            score_waiting()
    score_waiting()
    if not rows:
        raise UserError(f"{config.data.sources}: no record has both a readable image and a text")
    write_marks(Path(args.output), rows, "clip_score", sources)
    scores = np.array([row["clip_score"] for row in rows])
    quantiles = ", ".join(
        f"{q:.0%} {v:.3f}" for q, v in zip(QUANTILES, np.quantile(scores, QUANTILES), strict=True)
    )
    print(f"{args.output}: {len(rows):,} of {total:,} records scored; {quantiles}")


QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

if __name__ == "__main__":
    run_script(main)
