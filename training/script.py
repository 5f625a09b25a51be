"""What the two training scripts share: configuration → data → model → loop → exported model."""

import copy
import os
import shlex
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from configs.model import Vocabulary
from configs.train import Config
from data.datasets import by_source
from data.sources import parse_sources
from data.tokenizer import CHAT_TOKENS, IMAGE_TOKENS, Tokenizer
from eval.validation import (
    BestCheckpoint,
    TrainingTasks,
    Validation,
    forget_samples,
    save_picture,
    save_samples,
)
from hf.export import add_hf_code
from models.layers import pick_device
from models.modality_projector import check_kind
from models.vision_encoder import resolve_vision
from models.weights.language_models import (
    find_language_model,
    load_language_weights,
    resolve_decoders,
    table_rows,
)
from models.weights.lora import add_adapters, check_lora, merge_adapters, save_adapters
from models.weights.pretrained import left_tower_of, load_left_tower, load_vision_weights, module_fingerprint
from training.checkpoint import load_weights_of, move_to_abandoned, read_state
from training.distributed import check_world, gathered, opened
from training.ema import load_ema
from training.estimate import dry_run
from training.feature_cache import FeatureCache
from training.fit_memory import fit_batch_size
from training.hub_push import Pusher
from training.logging import RunLog
from training.precision import autocast
from training.run_card import write_card
from training.run_dir import locked, open_run, write_config
from training.setup import Data, build_data
from training.trackers import Trackers
from training.trainer import Stopped, TrainingCallbacks, train
from utils.errors import UsageError, UserError
from utils.files import replacing_folder
from utils.ranks import DistributedContext, torchrun_context

NEW_TOKENIZER = ".tokenizer"
TORCHRUN = (
    ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "600")
    if torch.__version__ >= (2, 13)
    else ()
)  # signals go on to the ranks, which have minutes to end a step and save it


def resolve_config(config: Config, flags: dict[str, Any]) -> Config:
    """Fill in what follows from pretrained parts: feature grid and sizes of the decoders. What does not fit raises before any weight is loaded."""
    model = config.model
    parse_sources(config.data.sources)
    if config.init_left_from:
        if model.left_context == "none":
            raise UsageError("--init_left_from: a vanilla model has no left tower")
        for name in flags:
            if name.startswith(("model.vision.", "model.projector.")) or name == "model.left.weights":
                raise UsageError(f"--{name} follows from --init_left_from: leave one of them out")
        found = left_tower_of(config.init_left_from)[0]
        model = replace(
            model,
            vision=replace(found.vision, weights="random"),
            projector=found.projector,
            left=replace(found.left, weights="random"),
        )
    for tower in model.towers:
        settled = [
            name for name in flags if name.startswith(f"model.{tower}.") and name != f"model.{tower}.weights"
        ]
        if settled and (
            getattr(model, tower).weights != "random" or (tower == "left" and config.init_left_from)
        ):
            raise UsageError(
                f"--{settled[0]} follows from the pretrained weights of the {tower} tower: leave it out, or say --model.{tower}.weights random"
            )
    model = resolve_decoders(model, Path(config.cache_dir))
    config = replace(config, model=replace(model, vision=resolve_vision(model.vision)))
    if (source := language_model(config)) is not None:
        Tokenizer.of_language_model(
            *source, impose_chatml=config.data.chat_template == "chatml"
        )  # raises now what it would raise later
    return config


def language_model(config: Config) -> tuple[Path, int] | None:
    """Where the tokenizer comes from: the right tower's pretrained model, and the length of its embedding table."""
    if config.model.right.weights == "random":
        return None
    folder = find_language_model(config.model.right.weights, Path(config.cache_dir), weights=False)
    return folder, table_rows(folder)


def vocabulary_of(config: Config) -> Vocabulary:
    """As it will be; one that is trained on the data may turn out smaller."""
    source = language_model(config)
    if source is None:
        return Vocabulary(config.data.vocab_size + len(CHAT_TOKENS), len(IMAGE_TOKENS) - 1)
    return Tokenizer.of_language_model(*source, impose_chatml=True).vocabulary


def check_compiler(config: Config) -> None:
    """torch.compile makes C++ for a CPU: without a compiler the first step would fail."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if (
        config.train.compile
        and pick_device(config.train.device).type == "cpu"
        and shutil.which(compiler) is None
    ):
        raise UsageError(
            f"--train.compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, name another in CXX, or leave the flag out"
        )


def load_pretrained(model: Any, config: Config, log: RunLog) -> None:
    """Fill a new model's parts from where their configurations say; parts that start at random stay as they are."""
    load_language_weights(model, Path(config.cache_dir))
    if config.init_left_from:
        _, vocabulary, tensors = left_tower_of(config.init_left_from)
        dropped = load_left_tower(model.left, vocabulary, tensors, config.init_left_from)
        log.say(
            f"left tower from {config.init_left_from}; {len(dropped)} tensors that it has no use for: {', '.join(dropped)}"
        )
    else:
        load_vision_weights(model.parts()["vision"])


def run_training(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """Train `model_class` and export it. `flags` are those that the command line gave."""
    check_script(config, model_class)
    if not config.resume and not config.fit_memory:  # else by the run's own configuration, below
        check_world(config, torchrun_context())
    Trackers.check(config.log)
    check_compiler(config)
    check_kind(config.model.projector)
    check_lora(config.lora, config.model.towers)
    for tower in config.model.towers:
        if getattr(config.lora, tower).r and getattr(config.train, f"lr_{tower}") == 0:
            raise UsageError(f"--lora.{tower}.r: adapters learn with train.lr_{tower}, which is 0")
    if config.dry_run:
        config = resolve_config(config, flags)
        if config.fit_memory:
            config, why = fit_batch_size(config, model_class, vocabulary_of(config))
            print(why)
        dry_run(config, model_class, vocabulary_of(config))
        return
    if any(name.startswith("eval.") for name in flags):
        TrainingTasks(config.eval)  # raises now, before anything is written
    with ending_in_order(), ExitStack() as until_the_end, opened(pick_device(config.train.device)) as world:
        chosen: list[str] = []

        def settled(new: Config) -> Config:
            new = resolve_config(new, flags)
            new = replace(
                new, data=replace(new.data, streams=new.data.streams or world.size)
            )  # of data, as many as there are ranks where nothing else is said
            if new.fit_memory:
                new, why = fit_batch_size(new, model_class, vocabulary_of(new), world)
                chosen.append(why)
            check_world(new, world)
            return new

        def open_and_lock() -> tuple[Config, Path, Path | None, bool]:
            config_now, folder, checkpoint = open_run(
                config, flags, settled, lambda folder: until_the_end.enter_context(locked(folder))
            )
            new = not (folder / "config.json").exists()
            check_script(config_now, model_class)
            check_world(config_now, world, resumed=not new)
            return config_now, folder, checkpoint, new

        config, folder, checkpoint, new = world.run_on_rank0(open_and_lock)
        Trackers.check(config.log)
        if new and world.is_rank0:
            until_the_end.enter_context(removing_new_tokenizer(folder))
        with world.rank0_first():
            tasks = TrainingTasks(config.eval)
            model, data, validation, cache, log = prepare(
                config,
                folder,
                folder / (NEW_TOKENIZER if new else "tokenizer"),
                checkpoint,
                model_class,
                world,
            )
            for line in chosen:
                log.say(line)
            pusher = None
            if config.hub.repo and world.is_rank0:
                to_folder = partial(
                    export_checkpoint,
                    model_class=model_class,
                    tokenizer=data.tokenizer,
                    config=config,
                    run=folder,
                )
                pusher = Pusher(config.hub, model_class.model_type, folder, to_folder, log.say)
        _train_and_export(
            config, folder, checkpoint, model, data, validation, tasks, cache, log, world, pusher
        )


def check_script(config: Config, model_class: Any) -> None:
    vanilla = config.model.left_context == "none"
    if vanilla != (model_class.model_type == "vanilla"):
        raise UsageError(
            f"model.left_context = {config.model.left_context} is trained by train_{'vanilla' if vanilla else 'dual_tower'}.py"
        )


@contextmanager
def ending_in_order() -> Iterator[None]:
    """What ends the process at once, before training takes signals and after it, ends the block first: what is half made is taken away."""

    def end(number: int, frame: Any) -> None:
        print(
            f"{signal.Signals(number).name} before or after training: start again with --resume auto",
            file=sys.stderr,
        )  # which begins where there is nothing yet
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            if (
                signal.getsignal(number) is end
            ):  # else training was told to stop, and this process is about to
                signal.signal(number, handler)


@contextmanager
def removing_new_tokenizer(folder: Path) -> Iterator[None]:
    """A new run's, under the name that it has until the run begins; also that of a start that was killed."""
    shutil.rmtree(folder / NEW_TOKENIZER, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder / NEW_TOKENIZER, ignore_errors=True)


def prepare(
    config: Config,
    folder: Path,
    tokenizer: Path,
    checkpoint: Path | None,
    model_class: Any,
    world: DistributedContext,
) -> tuple[Any, Data, Validation, FeatureCache, RunLog]:
    """Everything that training needs, loaded and checked; `tokenizer`: its folder."""
    log = RunLog(folder, silent=not world.is_rank0)
    torch.manual_seed(config.seed)
    data = build_data(
        config, tokenizer, language_model(config) if checkpoint is None else None, world.rank, world.size
    )
    if checkpoint is not None:
        check_data(checkpoint, data, tokenizer)
    model = model_class(config.model, data.tokenizer.vocabulary)
    encoder = model.parts()["vision"]
    if checkpoint is None:
        load_pretrained(model, config, log)
    add_adapters(model, config.lora)
    if checkpoint is not None:
        load_weights_of(checkpoint, model)  # now, for the feature cache goes by the encoder's weights
    cache = FeatureCache(
        Path(config.cache_dir) / "features" / module_fingerprint(encoder, repr(config.model.vision)),
        int(config.train.feature_cache_gb * 2**30 / world.size),
    )
    encoder.cache = cache
    validation = Validation(data.validation, data.budget, config.train.local_batch_size, data.padding_id)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in model.parts().items()
    )
    log.say(
        f"run {folder}: {sum(map(len, data.training.sources))} training and {sum(map(len, data.validation.sources))} validation records of {config.data.sources}; parameters: {sizes}"
    )
    if data.validation.dropped:
        log.say(f"validation records dropped: {by_source(data.validation.dropped)}")

    if world.rank:
        torch.manual_seed(
            (config.seed + world.rank * 0x9E3779B97F4A7C15) % 2**63
        )  # dropout of its own; the weights are all ranks'
    return model, data, validation, cache, log


def data_identity(data: Data) -> dict[str, Any]:
    """What must be the same when a run goes on: the tokenizer, and how many records each source has, by which their order is drawn."""
    records = {
        use: [[source.name, len(source)] for source in part.sources]
        for use, part in (("training", data.training), ("validation", data.validation))
    }
    return {"tokenizer": data.tokenizer.fingerprint(), "records": records}


def check_data(checkpoint: Path, data: Data, tokenizer: Path) -> None:
    """Is the data what it was at a checkpoint? Else `UserError`; `tokenizer`: its folder."""
    then, now = read_state(checkpoint, verify=False), data_identity(data)
    if then.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        raise UserError(
            f"checkpoint {checkpoint} was made with another tokenizer than {tokenizer} holds now: put that one back, or start a new run"
        )
    for use, sources in now["records"].items():
        for (name, count), (before, had) in zip(
            sources, then.get("records", now["records"])[use], strict=False
        ):
            if (name, count) != (before, had):
                raise UserError(
                    f"checkpoint {checkpoint} was made with {had:,} {use} records of {before}, and there are {count:,} of {name} now: samples would come twice or never; put the data back, or start a new run"
                )


def export(
    model: Any,
    folder: Path,
    tokenizer: Tokenizer,
    config: Config,
    run: Path,
    evaluated: dict[str, Any] | None = None,
) -> None:
    """Write a complete model folder, with a card of what `run` tells; adapters are merged into a copy, the model stays as it is."""
    if any(hasattr(module, "peft_config") for module in model.modules()):
        encoder = model.parts()["vision"]
        cache, encoder.cache = encoder.cache, None  # gigabytes that no export needs
        try:
            model = copy.deepcopy(model)
        finally:
            encoder.cache = cache
        merge_adapters(model)
    with replacing_folder(folder) as beside:
        write_card(model, config, run, beside, evaluated)
        model.save_pretrained(beside)
        tokenizer.save(beside)
        add_hf_code(beside, tokenizer)


def export_checkpoint(
    checkpoint: Path, folder: Path, model_class: Any, tokenizer: Tokenizer, config: Config, run: Path
) -> None:
    """A checkpoint's weights, or their averages, as a model folder, without a look at the model that is being trained."""
    with torch.device("meta"):  # nothing is drawn at random, which training would notice
        model = model_class(config.model, tokenizer.vocabulary)
        add_adapters(model, config.lora)
    model.load_state_dict(
        {name: torch.empty_like(tensor, device="cpu") for name, tensor in model.state_dict().items()},
        assign=True,
    )
    load_weights_of(checkpoint, model)
    if config.train.ema:
        load_ema(checkpoint, model)
    merge_adapters(model)
    export(model, folder, tokenizer, config, run)


def plain(model: Any, config: Config, model_class: Any) -> Any:
    """The model as one process has it: itself, or, where FSDP shares it among ranks, a whole copy on each. Every rank calls it."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        whole = model_class(config.model, model.vocabulary)
        add_adapters(whole, config.lora)
    whole.load_state_dict(
        {name: gathered(tensor) for name, tensor in model.state_dict().items()}, assign=True
    )
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(module), leaf, buffer)
    shared, own = (m.parts()["vision"] for m in (model, whole))
    own.cache = shared.cache if shared.frozen else None
    return whole.requires_grad_(False).eval()


def _train_and_export(
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    model: Any,
    data: Data,
    validation: Validation,
    tasks: TrainingTasks,
    cache: FeatureCache,
    log: RunLog,
    world: DistributedContext,
    pusher: Pusher | None,
) -> None:
    model_class, trained = type(model), model  # FSDP changes the class
    shown: list[dict[str, Any]] = []  # the last predictions
    warned: list[str] = []
    e = config.eval
    best = BestCheckpoint(folder, e.best, validation.metrics(e.captions) | tasks.metrics)

    def evaluate(step: int) -> dict[str, Any]:
        model = plain(trained, config, model_class)
        with autocast(config.train, pick_device(config.train.device)):
            scores = validation.score(model, world)
        shown[:] = validation.predictions(model, 8, world)
        if world.is_rank0:
            save_samples(folder / "samples", step, shown)
            log.predictions(step, shown, folder / "samples" / f"step_{step:06d}.png")
            log.picture(
                step,
                "tokens",
                save_picture(
                    validation.agreement.picture(), folder / "samples" / f"step_{step:06d}_tokens.png"
                ),
            )
        more = "".join(
            f", {name.removeprefix('accuracy_')} {value:.2%}"
            for name, value in scores.items()
            if name.startswith("accuracy_")
        )
        captions = validation.cider(model, e.captions, e.caption_tokens, world)
        if captions is not None:
            scores["cider"] = captions.score
            more += f", CIDEr {captions.score:.3f}"
            if captions.warning and captions.warning not in warned:
                warned.append(captions.warning)
                log.say(f"warning: {captions.warning}")
        log.say(f"step {step}: validation loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.2%}{more}")
        for p in shown[:4]:
            said = " ".join(p["prediction"].split())  # on one line
            log.say(
                f"    {p['question']}  →  {said}"
                + ("" if p["prediction"] == p["answer"] else f"   (truth: {p['answer']})")
            )
        dropped = {
            f"{source}: {reason}": n for (source, reason), n in sorted(data.validation.dropped.items())
        }
        logged = {
            f"validation_{k}": v for k, v in (scores | ({"dropped": dropped} if dropped else {})).items()
        }
        if step == config.max_steps or (e.tasks_every and step % e.tasks_every == 0):
            found = tasks.score(model, data.validation.renderer, world)
            for name, value in found.items():
                log.say(f"    {name} {value:.4f}")
            logged |= found
        if world.is_rank0 and best.is_beaten(step, logged):
            export(model, folder / "best", data.tokenizer, config, folder, logged)
            best.note(step, logged)
        return logged

    def saved(checkpoint: Path) -> None:
        if (
            pusher is not None and checkpoint.name != f"step_{config.max_steps:06d}"
        ):  # the last one's model is pushed when it is exported
            pusher.saved(checkpoint)

    begin = partial(_begin, config, folder, best)
    task = TrainingCallbacks(
        data.batches,
        evaluate,
        cache.save,
        data_identity(data),
        saved,
        lambda: best.step if world.is_rank0 else -1,
        begin,
    )
    try:
        train(config, model, task, folder, log, checkpoint, world)
        if best.warning:
            log.say(f"warning: {best.warning}")
    except Stopped as stopped:
        log.say(f"{stopped}\n{_how_to_go_on(folder, world)}")
        return
    dropped = sum(world.gather(data.batches.dropped()), Counter())
    model = plain(trained, config, model_class)
    if not world.is_rank0:
        return
    if not shown:  # a run that was already at its end
        shown = validation.predictions(model.eval(), 8)
        save_samples(folder / "samples", config.max_steps, shown)
    if dropped:
        log.say(f"training records dropped: {by_source(dropped)}")
    _hand_over(model, config, folder, data.tokenizer, shown[0], log, pusher)


def _begin(config: Config, folder: Path, best: BestCheckpoint, step: int, back: bool) -> None:
    """Nothing is refused any more: the folder becomes a run, or goes on behind `step`; `back`: it was further."""
    write_config(config, folder)
    if (folder / NEW_TOKENIZER).is_dir():
        (folder / NEW_TOKENIZER).rename(folder / "tokenizer")
    aside = partial(move_to_abandoned, folder=folder / "checkpoints")
    best.go_back(step, aside)
    for exported in (folder / "model", folder / "adapters") if back else ():  # of the end that it had
        if exported.exists():
            aside(exported)
    forget_samples(folder / "samples", step)


def _how_to_go_on(folder: Path, world: DistributedContext) -> str:
    script = [sys.argv[0], "--output_dir", str(folder), "--resume", "auto"]
    if (
        nodes := world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    ) > 1:  # no rank knows what their torchruns were told
        return f"go on with the same torchrun on each of the {nodes} nodes, and behind its own flags:\n  {shlex.join(script)}"
    torchrun = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(world.size), *TORCHRUN, "--"]
        if world.size > 1
        else []
    )
    return f"go on with:\n  {shlex.join([sys.executable, *torchrun, *script])}"


def _hand_over(
    model: Any,
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    example: dict[str, Any],
    log: RunLog,
    pusher: Pusher | None,
) -> None:
    """Export what was learnt, and say how to ask it; `example` is one of the predictions."""
    for adapter in save_adapters(model, folder / "adapters"):
        log.say(f"adapter: {adapter} (merged into the model below)")
    merge_adapters(model)  # training is over: no copy is needed
    export(model, folder / "model", tokenizer, config, folder)
    if pusher is not None:
        pusher.finish(folder / "model")
    here = Path.cwd()
    python, image = (
        p.relative_to(here) if p.is_relative_to(here) else p
        for p in (Path(sys.executable), Path(example["image"]))
    )
    with_image = f" --image {shlex.quote(str(image))}" if example["image"] else ""
    log.say(
        f"model: {folder / 'model'}\ntry it:\n  {python} generate.py --checkpoint {folder / 'model'}{with_image} --prompt {shlex.quote(example['question'])}"
    )
