"""Prepares a run from its configuration: tokenizer, training batches, validation set, model."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from configs.model import Vocabulary, as_left_decoder, source_layers
from configs.train import Config, FilterConfig
from data.conversations import ConversationError, checked_parts, conversations_of, text_of
from data.datasets import SampleDataset, SampleStream, drop_report
from data.loader import Loader, Streams
from data.mixture import Mixture, Source
from data.packing import Budget, RowStream
from data.parquet import UnreadableBlock
from data.render import Renderer
from data.sources import open_sources, parse_sources
from data.tokenizer import CHAT_TOKENS, IMAGE_TOKENS, Tokenizer
from eval.validation import Validation
from models.vision_encoder import resolve_vision
from models.weights.folder import find_model
from models.weights.language_models import (
    find_language_model,
    load_language_weights,
    resolve_decoders,
    table_rows,
)
from models.weights.lora import add_adapters
from models.weights.model_folder import left_tower_of, load_left_tower, read_model
from models.weights.tensors import allocate, load_tensors, module_fingerprint
from models.weights.vision import load_vision_weights
from training.checkpoint import load_weights_of, read_state
from training.feature_cache import FeatureCache, cache_seconds
from training.logging import RunLog
from training.memory import full_batch
from utils.device import autocast, pick_device
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


def build_data(
    config: Config,
    tokenizer_folder: Path,
    language_model: tuple[Path, int] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Data:
    """Open the sources, load or make the tokenizer, and build the training batches and the validation set.

    The tokenizer is stored in `tokenizer_folder`. If it is not there yet, it comes from the model that the
    run starts from, from `language_model` (its folder, rows of its embedding table), or is trained on the
    training text.
    Batches are those of rank `rank` of `ranks`. With fewer ranks than streams a rank reads several streams;
    with more, ranks share a stream.
    """
    d, model = config.data, config.model
    training, validation = open_sources(d)
    if (tokenizer_folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        if config.init_from:
            tokenizer = Tokenizer.load(find_model(config.init_from))
        elif language_model is not None:
            tokenizer = Tokenizer.of_language_model(*language_model, d.chat_template, d.system)
        else:
            tokenizer = Tokenizer.train(training_text(training), d.vocab_size, d.chat_template, d.system)
        tokenizer.save(tokenizer_folder)
    renderer = Renderer(tokenizer, model.tokens_per_tile, model.left_context)
    max_positions = min(getattr(model, tower).max_positions for tower in model.towers)
    unfiltered = replace(d, filters=FilterConfig(), curation="")  # so that validation compares across filters
    validation_set = SampleDataset(validation, renderer, model.vision, unfiltered, max_positions)
    left = d.left_length if "left" in model.towers else 0
    budget = Budget(left, d.right_length, renderer.left_unit, d.max_tiles)
    streams = d.streams or 1
    part, parts = (0, 1) if ranks <= streams else (rank // streams, ranks // streams)
    keep, padding = d.workers == 0, tokenizer.global_image  # a marker, never the image token
    loaders = {}
    for number in range(rank % streams, streams, min(ranks, streams)):
        train_set = SampleDataset(training, renderer, model.vision, d, max_positions, keep=keep)
        mixture = Mixture(training, config.seed, d.temperature, number, streams)
        rows = RowStream(SampleStream(train_set, mixture), budget, d.window)
        loaders[number] = Loader(rows, config.train.local_batch_size, padding, d.workers, part, parts)
    batches = Streams(loaders)
    return Data(tokenizer, batches.rows.stream.dataset, validation_set, budget, batches)


def training_text(sources: list[Source]) -> Iterator[str]:
    """Yield the text that trains the tokenizer: messages, each after its role as in chat templates."""
    for source in sources:
        for index in islice(range(source.start, source.stop), TOKENIZER_RECORDS // len(sources)):
            try:
                record = source.records[index]
                parts = checked_parts(record.get("interleaved", []), "the page")
                conversations = [] if "interleaved" in record else conversations_of(record, "branch")
            except (UnreadableBlock, ConversationError):
                continue  # counted when training reads it
            yield from (part["text"] for part in parts if part["type"] == "text")
            for message in chain.from_iterable(conversations):
                yield from (f"{message['role']}\n", text_of(message))


def resolve_config(config: Config, flags: dict[str, Any]) -> Config:
    """Fill in what follows from pretrained parts: feature grid and decoder sizes.

    Settings that do not fit raise `UsageError` before any weight is loaded.
    """
    model, left_layers = config.model, flags.get("model.left.layers", 0)
    parse_sources(config.data.sources)
    if config.init_from:
        return _resolve_init(config, flags)
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
        source_layers(model, pretrained.left)
    for tower in model.towers:
        is_pretrained = getattr(model, tower).weights != "random"
        if not is_pretrained and not (tower == "left" and config.init_left_from):
            continue
        allowed = (f"model.{tower}.weights", "model.left.layers")  # the left tower may take fewer layers
        for name in flags:
            if name.startswith(f"model.{tower}.") and name not in allowed:
                raise UsageError(
                    f"--{name} follows from the pretrained weights of the {tower} tower: leave it out, "
                    f"or say --model.{tower}.weights random"
                )
    model = resolve_decoders(model, Path(config.cache_dir), left_layers)
    config = replace(config, model=replace(model, vision=resolve_vision(model.vision)))
    if (source := language_model(config)) is not None:  # an unfit tokenizer raises here, not later
        Tokenizer.of_language_model(*source, config.data.chat_template, config.data.system)
    return config


def _resolve_init(config: Config, flags: dict[str, Any]) -> Config:
    """The configuration of a run that starts from a whole model."""
    own = ("data.vocab_size", "data.chat_template", "data.system", "init_left_from")
    for name in flags:
        if name.startswith("model.") or name in own:
            raise UsageError(f"--{name} follows from --init_from: leave one of them out")
    kind, model, vocabulary, _ = read_model(config.init_from)
    if (kind == "vanilla") != (config.model.left_context == "none"):
        script = {"vanilla": "train_vanilla.py", "dual_tower": "train_dual_tower.py"}[kind]
        raise UsageError(f"--init_from {config.init_from}: it is a model of {script}")
    if Tokenizer.load(find_model(config.init_from)).vocabulary != vocabulary:
        raise UserError(f"--init_from {config.init_from}: its tokenizer does not belong to its weights")
    towers = {name: replace(getattr(model, name), weights="random") for name in ("left", "right")}
    return replace(config, model=replace(model, vision=replace(model.vision, weights="random"), **towers))


def language_model(config: Config) -> tuple[Path, int] | None:
    """Folder of the right tower's pretrained model and rows of its embedding table; None if random."""
    if config.model.right.weights == "random":
        return None
    folder = find_language_model(config.model.right.weights, Path(config.cache_dir), weights=False)
    return folder, table_rows(folder)


def vocabulary_of(config: Config) -> Vocabulary:
    """The vocabulary that the run will have; one that is trained on the data may become smaller."""
    if config.init_from:
        return read_model(config.init_from)[2]
    source = language_model(config)
    if source is None:
        return Vocabulary(config.data.vocab_size + len(CHAT_TOKENS), len(IMAGE_TOKENS) - 1)
    return Tokenizer.of_language_model(*source, config.data.chat_template).vocabulary


def check_compiler(config: Config) -> None:
    """Raise `UsageError` if torch.compile lacks a C++ compiler, which it needs on a CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    on_cpu = config.train.compile and pick_device(config.train.device).type == "cpu"
    if on_cpu and shutil.which(compiler) is None:
        raise UsageError(
            f"--train.compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, "
            "name another in CXX, or leave the flag out"
        )


def load_pretrained(model: Any, config: Config, log: RunLog) -> None:
    """Load the pretrained weights that the configuration names into a new model; other parts stay random."""
    if config.init_from:
        load_tensors(model, read_model(config.init_from)[3], config.init_from)
        log.say(f"all weights from {config.init_from}")
        return
    load_language_weights(model, Path(config.cache_dir))
    if not (source := config.init_left_from):
        load_vision_weights(model.parts()["vision"])
        return
    dropped = load_left_tower(model.left, *left_tower_of(source), context=source)
    log.say(
        f"left tower from {source}; {len(dropped)} tensors that it has no use for: "
        f"{', '.join(dropped[:8])}{' …' * (len(dropped) > 8)}"
    )


def prepare(
    config: Config,
    log: RunLog,
    tokenizer: Path,
    checkpoint: Path | None,
    model_class: Any,
    world: DistributedContext,
) -> tuple[Any, Data, Validation]:
    """Load and check a run's model, data and validation; `tokenizer`: its folder."""
    torch.manual_seed(config.seed)
    source = language_model(config) if checkpoint is None else None
    data = build_data(config, tokenizer, source, world.rank, world.size)
    if checkpoint is not None:
        check_data(checkpoint, data, tokenizer)
    model = model_class(config.model, data.tokenizer.vocabulary)
    if checkpoint is None:
        load_pretrained(model, config, log)
    else:
        allocate(model)
    add_adapters(model, config.lora)
    if checkpoint is not None:
        load_weights_of(checkpoint, model)  # before the cache, which depends on the weights
    train, cache_bytes = config.train, int(config.train.feature_cache_gb * 2**30 / world.size)
    if train.feature_cache != "off" and train.lr_vision == 0 and cache_bytes:
        encoder = model.parts()["vision"]
        encoder_id = module_fingerprint(encoder, repr(config.model.vision))
        encoder.cache = FeatureCache(Path(config.cache_dir) / "features" / encoder_id, cache_bytes)
    rows, padding = config.train.local_batch_size, data.tokenizer.global_image
    validation = Validation(data.validation, data.budget, rows, padding)
    sizes = (f"{name} {sum(p.numel() for p in m.parameters()):,}" for name, m in model.parts().items())
    log.say(
        f"run {log.folder}: {sum(map(len, data.training.sources))} training and "
        f"{sum(map(len, data.validation.sources))} validation records of {config.data.sources}; "
        f"parameters: {', '.join(sizes)}"
    )
    for note in filter(None, (source.note for source in data.training.sources)):
        log.say(note)
    if config.model.has_shallower_left:
        log.say(f"left layers that the right layers read: {config.model.left_layer_of}")
    if data.validation.dropped:
        report = drop_report(data.validation.dropped, data.validation.examples)
        log.say(f"validation records dropped: {report}")
    if world.rank:  # ranks have equal weights, but each its own dropout
        torch.manual_seed((config.seed + world.rank * 0x9E3779B97F4A7C15) % 2**63)
    return model, data, validation


def resolve_feature_cache(
    config: Config, model: Any, vocabulary: Vocabulary, log: RunLog, world: DistributedContext
) -> Config:
    """Decide a new run's `train.feature_cache = auto` on its device, with tiles of a full batch.

    The run keeps the decision: the last bits of a feature depend on the tiles that it is encoded with.
    """
    train, encoder = config.train, model.parts()["vision"]
    if train.feature_cache != "auto" or encoder.cache is None:
        return config

    def measure() -> tuple[float, float]:
        device = pick_device(train.device)
        with autocast(train.dtype, device):
            return cache_seconds(encoder.to(device).encode, tiles.to(device), encoder.cache.limit_bytes)

    shape = full_batch(config, vocabulary, train.local_batch_size)["tiles"].shape
    tiles = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoding, look_up = world.run_on_rank0(measure)
    faster = look_up < encoding
    if not faster:
        encoder.cache = None
    log.say(
        f"vision features are {'cached' if faster else 'not cached'}: encoding a batch of {len(tiles)} tiles "
        f"takes {encoding * 1000:.3g} ms, a look-up {look_up * 1000:.3g} ms"
    )
    return replace(config, train=replace(train, feature_cache="on" if faster else "off"))


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
        for now, before in zip(sources, saved.get("records", current["records"])[use], strict=False):
            if now != before:
                raise UserError(
                    f"checkpoint {checkpoint} was made with {before[1]:,} {use} records of {before[0]}, "
                    f"and there are {now[1]:,} of {now[0]} now: samples would come twice or never; "
                    "put the data back, or start a new run"
                )
