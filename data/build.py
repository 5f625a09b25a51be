"""A configuration → the data of a run: tokenizer, packed training batches with state, validation set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from data.collators import Batch, collate
from data.datasets import SampleDataset, SampleStream
from data.packing import RowStream
from data.render import Renderer
from data.sources import Record, training_records
from data.tokens import Tokenizer


@dataclass
class Data:
    tokenizer: Tokenizer
    training: SampleDataset
    validation: SampleDataset
    rows: RowStream
    batches: Iterator[Batch]

    @property
    def padding_id(self) -> int:
        """What stands in the left stream where it holds nothing: a marker, never the image token."""
        return self.tokenizer.global_image

    def state(self) -> dict[str, Any]:
        return self.rows.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.rows.load_state(state)

    def dropped(self) -> dict[str, int]:
        return self.training.counts()


def build_data(config: Config, tokenizer_folder: Path, language_model: tuple[Path, int] | None = None) -> Data:
    """The tokenizer is kept in `tokenizer_folder`; at first it comes from `language_model` (folder, rows of its table) or is trained."""
    d = config.data
    training, validation = training_records(d.sources, d.limit, d.validation_images, d.cauldron)
    if (tokenizer_folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        if language_model is not None:
            tokenizer = Tokenizer.of_language_model(*language_model, impose_chatml=d.chat_template == "chatml")
        else:
            tokenizer = Tokenizer.train(training_text(training), d.vocab_size)
        tokenizer.save(tokenizer_folder)
    renderer = Renderer(tokenizer, config.model.tokens_per_tile, config.model.left_context)

    def dataset(records: Sequence[Record]) -> SampleDataset:
        towers = [config.model.right] if config.model.left_context == "none" else [config.model.left, config.model.right]
        positions = min(tower.max_positions for tower in towers)
        return SampleDataset(records, renderer, config.model.vision.image_size, d.turns, d.left_length, d.right_length, positions)

    train_set, validation_set = dataset(training), dataset(validation)
    rows = RowStream(SampleStream(train_set, config.seed), d.left_length, d.right_length, d.window)
    data = Data(tokenizer, train_set, validation_set, rows, iter(()))
    data.batches = _batches(rows, config.train.rows, data.padding_id)
    return data


def training_text(records: Sequence[Record]) -> Iterator[str]:
    """What the tokenizer learns from: every turn, with the role names that the chat template writes before them."""
    for record in records:
        for turn in record["texts"]:
            yield from ("user\n", turn["user"], "assistant\n", turn["assistant"])


def _batches(rows: RowStream, size: int, padding_id: int) -> Iterator[Batch]:
    stream = iter(rows)
    while True:
        yield collate([next(stream) for _ in range(size)], padding_id)
