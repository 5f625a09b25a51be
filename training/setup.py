"""A configuration → the data of a run: tokenizer, packed training batches with state, validation set."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from configs.train import Config, FilterConfig
from data.datasets import SampleDataset, SampleStream
from data.loader import Loader, Streams
from data.mixture import Mixture, Source
from data.packing import Budget, RowStream
from data.parquet import UnreadableBlock
from data.render import Renderer
from data.sources import open_sources
from data.tokenizer import Tokenizer

TOKENIZER_RECORDS = 5_000  # that a vocabulary is trained on


@dataclass
class Data:
    tokenizer: Tokenizer
    training: SampleDataset
    validation: SampleDataset
    budget: Budget
    batches: Streams

    @property
    def padding_id(self) -> int:
        """What stands in the left stream where it holds nothing: a marker, never the image token."""
        return self.tokenizer.global_image


def build_data(
    config: Config,
    tokenizer_folder: Path,
    language_model: tuple[Path, int] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Data:
    """The tokenizer is kept in `tokenizer_folder`; at first it comes from `language_model` (folder, rows of its table) or is trained.

    Training batches are those of rank `rank` of `ranks`: where there are fewer ranks than streams, one has several; where there are more, they share them.
    """
    d = config.data
    training, validation = open_sources(d)
    if (tokenizer_folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        if language_model is not None:
            tokenizer = Tokenizer.of_language_model(
                *language_model, impose_chatml=d.chat_template == "chatml"
            )
        else:
            tokenizer = Tokenizer.train(training_text(training), d.vocab_size)
        tokenizer.save(tokenizer_folder)
    renderer = Renderer(tokenizer, config.model.tokens_per_tile, config.model.left_context)
    towers = (
        [config.model.right]
        if config.model.left_context == "none"
        else [config.model.left, config.model.right]
    )
    positions = min(tower.max_positions for tower in towers)
    unfiltered = replace(d, filters=FilterConfig())  # so that validation compares across filters
    validation_set = SampleDataset(validation, renderer, config.model.vision, unfiltered, positions)
    left = 0 if config.model.left_context == "none" else d.left_length
    budget = Budget(left, d.right_length, renderer.left_unit, d.max_tiles)
    streams = d.streams or 1
    part, parts = (0, 1) if ranks <= streams else (rank // streams, ranks // streams)
    loaders = {}
    for number in range(rank % streams, streams, min(ranks, streams)):
        train_set = SampleDataset(training, renderer, config.model.vision, d, positions, keep=d.workers == 0)
        rows = RowStream(
            SampleStream(train_set, Mixture(training, config.seed, d.temperature, number, streams)),
            budget,
            d.window,
        )
        loaders[number] = Loader(
            rows, config.train.local_batch_size, tokenizer.global_image, d.workers, part, parts
        )
    batches = Streams(loaders)
    return Data(tokenizer, batches.rows.stream.dataset, validation_set, budget, batches)


def training_text(sources: list[Source]) -> Iterator[str]:
    """What the tokenizer learns from: turns, with the role names that the chat template writes before them."""
    for source in sources:
        for index in islice(range(source.start, source.stop), TOKENIZER_RECORDS // len(sources)):
            try:
                texts = source.records[index]["texts"]
            except UnreadableBlock:
                continue  # counted when its turn comes
            for turn in texts:
                yield from (
                    "user\n",
                    str(turn.get("user", "")),
                    "assistant\n",
                    str(turn.get("assistant", "")),
                )
