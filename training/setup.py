"""Prepares a run from its configuration: tokenizer, training batches, validation set, model."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from configs.model import Vocabulary, as_left_decoder
from configs.train import Config, FilterConfig
from data.datasets import SampleDataset, SampleStream, by_source
from data.loader import Loader, Streams
from data.mixture import Mixture, Source
from data.packing import Budget, RowStream
from data.parquet import UnreadableBlock
from data.render import Renderer
from data.sources import open_sources, parse_sources
from data.tokenizer import CHAT_TOKENS, IMAGE_TOKENS, Tokenizer
from eval.validation import Validation
from models.vision_encoder import resolve_vision
from models.weights.language_models import (
    find_language_model,
    load_language_weights,
    resolve_decoders,
    table_rows,
)
from models.weights.lora import add_adapters
from models.weights.model_folder import left_tower_of, load_left_tower
from models.weights.tensors import allocate, module_fingerprint
from models.weights.vision import load_vision_weights
from training.checkpoint import load_weights_of, read_state
from training.feature_cache import FeatureCache
from training.logging import RunLog
from utils.device import pick_device
from utils.errors import UsageError, UserError
from utils.ranks import DistributedContext

TOKENIZER_RECORDS = 5_000  # a vocabulary is trained on so many records


@dataclass
class Data:
    """The data of a run."""

    tokenizer: Tokenizer
    training: SampleDataset
    validation: SampleDataset
    budget: Budget
    batches: Streams

    @property
    def padding_id(self) -> int:
        """The left stream's padding: a marker, never the image token."""
        return self.tokenizer.global_image


@dataclass
class Prepared:
    """Everything a training loop needs, loaded and checked."""

    model: Any
    data: Data
    validation: Validation
    cache: FeatureCache
    log: RunLog


def build_data(
    config: Config,
    tokenizer_folder: Path,
    language_model: tuple[Path, int] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Data:
    """Open the sources, load or make the tokenizer, and build the training batches and the validation set.

    The tokenizer is stored in `tokenizer_folder`. If it is not there yet, it comes from `language_model`
    (its folder, rows of its embedding table), or is trained on the training text.
    Batches are those of rank `rank` of `ranks`. With fewer ranks than streams a rank reads several streams;
    with more, ranks share a stream.
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
    max_positions = min(tower.max_positions for tower in towers)
    unfiltered = replace(d, filters=FilterConfig())  # so that validation compares across filters
    validation_set = SampleDataset(validation, renderer, config.model.vision, unfiltered, max_positions)
    left = 0 if config.model.left_context == "none" else d.left_length
    budget = Budget(left, d.right_length, renderer.left_unit, d.max_tiles)
    streams = d.streams or 1
    part, parts = (0, 1) if ranks <= streams else (rank // streams, ranks // streams)
    loaders = {}
    for number in range(rank % streams, streams, min(ranks, streams)):
        train_set = SampleDataset(
            training, renderer, config.model.vision, d, max_positions, keep=d.workers == 0
        )
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
    """Yield the text that trains the tokenizer: turns, each after its role name as in chat templates."""
    for source in sources:
        for index in islice(range(source.start, source.stop), TOKENIZER_RECORDS // len(sources)):
            try:
                texts = source.records[index]["texts"]
            except UnreadableBlock:
                continue  # counted when training reads it
            for turn in texts:
                yield from (
                    "user\n",
                    str(turn.get("user", "")),
                    "assistant\n",
                    str(turn.get("assistant", "")),
                )


def resolve_config(config: Config, flags: dict[str, Any]) -> Config:
    """Fill in what follows from pretrained parts: feature grid and decoder sizes.

    Settings that do not fit raise `UsageError` before any weight is loaded.
    """
    model, left_layers = config.model, flags.get("model.left.layers", 0)
    parse_sources(config.data.sources)
    if config.init_left_from:
        if model.left_context == "none":
            raise UsageError("--init_left_from: a vanilla model has no left tower")
        for name in flags:
            if name.startswith(("model.vision.", "model.projector.")) or name == "model.left.weights":
                raise UsageError(f"--{name} follows from --init_left_from: leave one of them out")
        pretrained = left_tower_of(config.init_left_from)[0]
        layer_map = model.layer_map or pretrained.layer_map
        model = replace(
            model,
            vision=replace(pretrained.vision, weights="random"),
            projector=pretrained.projector,
            left=as_left_decoder(replace(pretrained.left, weights="random"), layer_map, left_layers),
            layer_map=layer_map,
        )
        model.source_layers(pretrained.left)
    for tower in model.towers:
        size_flags = [
            name
            for name in flags
            if name.startswith(f"model.{tower}.")
            and name not in (f"model.{tower}.weights", "model.left.layers")  # the left tower may take fewer
        ]
        is_pretrained = getattr(model, tower).weights != "random"
        if size_flags and (is_pretrained or (tower == "left" and config.init_left_from)):
            raise UsageError(
                f"--{size_flags[0]} follows from the pretrained weights of the {tower} tower: leave it out, "
                f"or say --model.{tower}.weights random"
            )
    model = resolve_decoders(model, Path(config.cache_dir), left_layers)
    config = replace(config, model=replace(model, vision=resolve_vision(model.vision)))
    if (source := language_model(config)) is not None:  # an unfit tokenizer raises here, not later
        Tokenizer.of_language_model(*source, impose_chatml=config.data.chat_template == "chatml")
    return config


def language_model(config: Config) -> tuple[Path, int] | None:
    """Folder of the right tower's pretrained model and rows of its embedding table; None if random."""
    if config.model.right.weights == "random":
        return None
    folder = find_language_model(config.model.right.weights, Path(config.cache_dir), weights=False)
    return folder, table_rows(folder)


def vocabulary_of(config: Config) -> Vocabulary:
    """The vocabulary that the run will have; one that is trained on the data may become smaller."""
    source = language_model(config)
    if source is None:
        return Vocabulary(config.data.vocab_size + len(CHAT_TOKENS), len(IMAGE_TOKENS) - 1)
    return Tokenizer.of_language_model(*source, impose_chatml=True).vocabulary


def check_compiler(config: Config) -> None:
    """Raise `UsageError` if torch.compile lacks a C++ compiler, which it needs on a CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if (
        config.train.compile
        and pick_device(config.train.device).type == "cpu"
        and shutil.which(compiler) is None
    ):
        raise UsageError(
            f"--train.compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, "
            "name another in CXX, or leave the flag out"
        )


def load_pretrained(model: Any, config: Config, log: RunLog) -> None:
    """Load the pretrained weights that the configuration names into a new model; other parts stay random."""
    load_language_weights(model, Path(config.cache_dir))
    if config.init_left_from:
        dropped = load_left_tower(
            model.left, *left_tower_of(config.init_left_from), context=config.init_left_from
        )
        log.say(
            f"left tower from {config.init_left_from}; {len(dropped)} tensors that it has no use for: "
            f"{', '.join(dropped[:8])}{' …' * (len(dropped) > 8)}"
        )
    else:
        load_vision_weights(model.parts()["vision"])


def prepare(
    config: Config,
    folder: Path,
    tokenizer: Path,
    checkpoint: Path | None,
    model_class: Any,
    world: DistributedContext,
) -> Prepared:
    """Load and check everything that training in run folder `folder` needs; `tokenizer`: its folder."""
    log = RunLog(folder, silent=not world.is_rank0)
    torch.manual_seed(config.seed)
    source = language_model(config) if checkpoint is None else None
    data = build_data(config, tokenizer, source, world.rank, world.size)
    if checkpoint is not None:
        check_data(checkpoint, data, tokenizer)
    model = model_class(config.model, data.tokenizer.vocabulary)
    encoder = model.parts()["vision"]
    if checkpoint is None:
        load_pretrained(model, config, log)
    else:
        allocate(model)
    add_adapters(model, config.lora)
    if checkpoint is not None:
        load_weights_of(checkpoint, model)  # before the cache, which depends on the weights
    cache = FeatureCache(
        Path(config.cache_dir) / "features" / module_fingerprint(encoder, repr(config.model.vision)),
        int(config.train.feature_cache_gb * 2**30 / world.size),
    )
    encoder.cache = cache if cache.limit_bytes else None
    validation = Validation(data.validation, data.budget, config.train.local_batch_size, data.padding_id)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in model.parts().items()
    )
    log.say(
        f"run {folder}: {sum(map(len, data.training.sources))} training and "
        f"{sum(map(len, data.validation.sources))} validation records of {config.data.sources}; "
        f"parameters: {sizes}"
    )
    if config.model.has_shallower_left:
        log.say(f"left layers that the right layers read: {config.model.left_layer_of}")
    if data.validation.dropped:
        log.say(f"validation records dropped: {by_source(data.validation.dropped)}")
    if world.rank:  # ranks have equal weights, but each its own dropout
        torch.manual_seed((config.seed + world.rank * 0x9E3779B97F4A7C15) % 2**63)
    return Prepared(model, data, validation, cache, log)


def data_identity(data: Data) -> dict[str, Any]:
    """What must not change when a run resumes: the tokenizer, and the number of records of each source.

    The order of the records is drawn from these numbers.
    """
    records = {
        use: [[source.name, len(source)] for source in part.sources]
        for use, part in (("training", data.training), ("validation", data.validation))
    }
    return {"tokenizer": data.tokenizer.fingerprint(), "records": records}


def check_data(checkpoint: Path, data: Data, tokenizer: Path) -> None:
    """Raise `UserError` if the data is not that of the checkpoint; `tokenizer`: its folder."""
    saved, current = read_state(checkpoint, verify=False), data_identity(data)
    if saved.get("tokenizer", current["tokenizer"]) != current["tokenizer"]:
        raise UserError(
            f"checkpoint {checkpoint} was made with another tokenizer than {tokenizer} holds now: "
            "put that one back, or start a new run"
        )
    for use, sources in current["records"].items():
        saved_sources = saved.get("records", current["records"])[use]
        for (name, count), (saved_name, saved_count) in zip(sources, saved_sources, strict=False):
            if (name, count) != (saved_name, saved_count):
                raise UserError(
                    f"checkpoint {checkpoint} was made with {saved_count:,} {use} records of {saved_name}, "
                    f"and there are {count:,} of {name} now: samples would come twice or never; "
                    "put the data back, or start a new run"
                )
