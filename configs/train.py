"""All settings of a run, `model.py`'s included: frozen dataclasses, resolved once, saved with every run."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from configs.model import ModelConfig
from configs.settings import (
    Amount,
    Bounds,
    Count,
    Decay,
    Fraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed,
    check_bounds,
    setting,
)
from utils.errors import UsageError
from utils.files import CACHE

DEFAULT_PRESET = "dual_tower_easyvqa"
Rate = Annotated[float, Bounds(ge=0, lt=1000)]
Steps = Annotated[int, Bounds(ge=-1)]  # -1: as many as the others
RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")  # FineVision's, 1 to 5


@dataclass(frozen=True)
class FilterConfig:
    """Bounds on records and turns; those outside are left out of training, and counted. 0: no bound."""

    min_relevance: Count = setting(
        0, "minimum FineVision rating, 1 to 5, of the question's relevance to the image (0: no bound)"
    )
    min_visual_dependency: Count = setting(
        0, "minimum rating of the answer's dependency on the image (0: no bound)"
    )
    min_image_correspondence: Count = setting(
        0, "minimum rating of the match of image and text (0: no bound)"
    )
    min_formatting: Count = setting(0, "minimum rating of the text's formatting (0: no bound)")
    min_question: Count = setting(0, "minimum characters of a question (0: no bound)")
    max_question: Count = setting(0, "maximum characters of a question (0: no bound)")
    min_answer: Count = setting(0, "minimum characters of an answer (0: no bound)")
    max_answer: Count = setting(0, "maximum characters of an answer (0: no bound)")
    min_side: Count = setting(0, "minimum shorter side of an image, in pixels (0: no bound)")
    min_clip_score: Annotated[float, Bounds(ge=0)] = setting(
        0.0, "minimum CLIP score, for records that have one (0: no bound)"
    )

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            minimum, maximum = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if 0 < maximum < minimum:
                raise UsageError(
                    f"data.filters: no {name} has at least {minimum} characters (min_{name}) "
                    f"and at most {maximum} (max_{name})"
                )


@dataclass(frozen=True)
class DataConfig:
    sources: str = setting(
        "easy_vqa",
        "comma-separated data sources, NAME[*WEIGHT][:CAP][=PATH]: hf=ORG/NAME, hf=FOLDER, jsonl=FILE, "
        "easy_vqa, … (docs/data.md)",
        path=True,
    )
    temperature: Annotated[float, Bounds(ge=0.1)] = setting(
        1.0, "T: a source is drawn in proportion to size^(1/T); above 1 favours small sources"
    )
    limit: Count = setting(0, "use only the first N training records of each source (0: all)")
    validation_images: PositiveInt = setting(200, "records of each source held out for validation")
    filters: FilterConfig = FilterConfig()
    curation: str = setting(
        "",
        "comma-separated marks of training records, from tools.score and tools.duplicates; marked duplicates "
        "are left out",
        path=True,
    )
    turns: Literal["branch", "chain"] = setting(
        "branch", "turns of a record: independent questions on its images, or one conversation (chain)"
    )
    vocab_size: Annotated[int, Bounds(ge=256, le=1_000_000)] = setting(
        512, "vocabulary size of the byte-level BPE tokenizer, trained if the right tower is not pretrained"
    )
    chat_template: str = setting(
        "auto",
        "chat template: auto (the pretrained right tower's; else ChatML), chatml, or a Jinja file",
        path=True,
    )
    system: str = setting(
        "", "system message of conversations without one; it becomes part of the chat template"
    )
    left_length: Count = setting(64, "left-stream length L of a packed row, in tokens")
    right_length: PositiveInt = setting(512, "right-stream length R of a packed row, in tokens")
    max_tiles: Count = setting(
        0, "maximum tiles of a packed row, to bound the vision encoder's memory (0: as many as fit)"
    )
    window: Annotated[int, Bounds(ge=1, lt=1 << 19)] = setting(
        256, "samples from which packing chooses the next row"
    )
    streams: Count = setting(
        0, "shards of the records; a rank reads one or more, or a part of one (0: one per rank at the start)"
    )
    workers: Count = setting(
        0, "image-decoding processes per rank and shard; they only change the speed (0: the main process)"
    )
    read_gb: Annotated[float, Bounds(gt=0, lt=1_000_000)] = setting(
        1.0, "GB of memory for rows of Parquet and Arrow files: half to read ahead, half to shuffle"
    )
    download: bool = setting(
        False, "download data sets before the start instead of streaming them from the Hub"
    )


@dataclass(frozen=True)
class TrainConfig:
    local_batch_size: PositiveInt = setting(8, "packed rows per forward and rank")
    global_batch_size: Annotated[int, Bounds(ge=1, le=1 << 20)] = setting(
        8, "packed rows per optimizer step, over all ranks; a multiple of local_batch_size × ranks"
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "AdamW, or Muon for the weights of linear layers and AdamW for the rest"
    )
    lr_vision: Rate = setting(0.0, "learning rate of the vision encoder (0: frozen)")
    lr_projector: Rate = setting(2e-3, "learning rate of the modality projector (0: frozen)")
    lr_left: Rate = setting(2e-3, "learning rate of the left decoder (0: frozen)")
    lr_right: Rate = setting(2e-3, "learning rate of the right decoder (0: frozen)")
    lr_heads: Rate = setting(1e-3, "learning rate of the multi-token heads (0: frozen)")
    head_weight: Amount = setting(
        0.3, "weight of the first multi-token head's loss; the next-token loss has weight 1"
    )
    head_decay: Amount = setting(0.8, "weight of each further head ÷ weight of the head before")
    head_warmup: Count = setting(
        0, "steps of each head's weight warm-up, one head after another (0: no warm-up; arXiv 2505.22757)"
    )
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", "learning-rate schedule: cosine decay, or wsd (warm-up, stable, decay over the last steps)"
    )
    warmup_steps: Count = setting(50, "steps of linear warm-up")
    warmup_vision: Steps = setting(-1, "warm-up steps of the vision encoder (-1: warmup_steps)")
    warmup_projector: Steps = setting(-1, "warm-up steps of the modality projector (-1: warmup_steps)")
    warmup_left: Steps = setting(
        -1, "warm-up steps of the left decoder; many let the projector learn first (-1: warmup_steps)"
    )
    warmup_right: Steps = setting(-1, "warm-up steps of the right decoder (-1: warmup_steps)")
    decay_share: PositiveFraction = setting(0.2, "wsd: fraction of all steps with decay, at the end")
    final_lr: Fraction = setting(0.0, "learning rate at the last step, as a fraction of the peak")
    weight_decay: Rate = setting(0.05, "weight decay of AdamW, for matrices only")
    beta2: Decay = setting(0.95, "second-moment decay of AdamW")
    ema: Decay = setting(
        0.0,
        "decay of an average of the trained weights, such as 0.999; the average is validated and exported, "
        "and takes as much memory as they do (0: none)",
    )
    clip: Amount = setting(1.0, "maximum gradient norm (0: no clipping)")
    skips: PositiveInt = setting(
        10,
        "stop after this many skipped steps in a row; steps with a non-finite loss or gradient are skipped",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "autocast type; auto: bf16 if the hardware supports it, else fp32; fp16: with loss scaling"
    )
    device: str = setting("auto", "cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is there")
    feature_cache: Literal["auto", "on", "off"] = setting(
        "auto",
        "cache the features of a frozen vision encoder; auto: if a look-up is faster than encoding, "
        "measured when the run starts",
    )
    feature_cache_gb: Amount = setting(2.0, "GB of memory, and of disk, for cached features (0: no cache)")
    log_every: PositiveInt = setting(1, "steps between lines of metrics.jsonl")
    diagnostics_every: Count = setting(
        100, "steps between measurements of updates ÷ weights by part, and histograms for --log (0: none)"
    )
    stall_minutes: Amount = setting(
        30.0, "minutes without a step, validation included, until all thread stacks are printed (0: never)"
    )
    eval_every: Count = setting(200, "steps between validations (0: only at the end)")
    checkpoint_every: Count = setting(500, "steps between checkpoints (0: only at the end)")
    checkpoint_minutes: Amount = setting(0.0, "maximum minutes between checkpoints (0: no limit)")
    recompute: bool = setting(
        False, "activation checkpointing of decoder blocks: less memory, one more forward per step"
    )
    compile: bool = setting(
        False,
        "torch.compile decoder blocks: some 15 s at the start, then faster steps; CPUs need a C++ compiler",
    )
    keep_checkpoints: PositiveInt = setting(
        2, "number of newest checkpoints to keep; with eval.best, the best one too"
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UsageError(f"train.device = {self.device!r} is none of auto, cpu, cuda, mps")

    @property
    def micro_batches(self) -> int:
        """Forwards per optimizer step, over all ranks; `training.distributed.check_world` has checked it."""
        return self.global_batch_size // self.local_batch_size


@dataclass(frozen=True)
class LoraTower:
    r: Count = setting(
        0, "rank of the adapters; only they are trained in this decoder, with its learning rate (0: none)"
    )
    alpha: PositiveFloat = setting(32.0, "scale of the adapters: alpha ÷ r")
    dropout: Decay = setting(0.0, "dropout on the adapters' input")
    targets: str = setting(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "comma-separated linear layers with an adapter",
    )
    nf4: bool = setting(False, "store the frozen weights in 4 bits (QLoRA; needs CUDA and bitsandbytes)")


@dataclass(frozen=True)
class LoraConfig:
    left: LoraTower = LoraTower()
    right: LoraTower = LoraTower()


@dataclass(frozen=True)
class EvalConfig:
    captions: Count = setting(
        100, "validation captions to generate and score by CIDEr, for sources with captions (0: none)"
    )
    caption_tokens: PositiveInt = setting(32, "maximum length of these captions, in tokens")
    tasks: str = setting(
        "", "comma-separated tasks to score, such as mmstar (see evaluation.py --tasks)", path=True
    )
    tasks_every: Count = setting(
        0, "steps between runs of these tasks, each with a validation (0: only at the end)"
    )
    limit: Count = setting(0, "use only the first N questions of each task (0: all)")
    data_root: str = setting(
        "", "folder with copies of the tasks' data sets, used instead of the network", path=True
    )
    best: str = setting(
        "",
        "metric of metrics.jsonl that selects the best model, kept in best/, and its checkpoint: "
        "validation_accuracy, validation_cider, mmstar_average … (highest; a loss: lowest)",
    )


@dataclass(frozen=True)
class HubConfig:
    repo: str = setting(
        "",
        "repository of the Hugging Face Hub, NAME or OWNER/NAME, to push the model to: at each checkpoint, "
        "in the background, and at the end",
    )
    private: bool = setting(False, "make the repository private")
    licence: str = setting(
        "", "licence of the weights for the model card, as the Hub names it: apache-2.0, … (empty: none)"
    )


@dataclass(frozen=True)
class Config:
    config: str = setting(DEFAULT_PRESET, "preset: NAME of configs/config_NAME.py")
    max_steps: Annotated[int, Bounds(ge=1, le=10**12)] = setting(1500, "optimizer steps")
    output_dir: str = setting(
        "", "run folder (default: runs/<config>, or the next free runs/<config>-N)", path=True
    )
    resume: str = setting(
        "", "'auto' (the newest checkpoint of output_dir), a run folder or a checkpoint folder", path=True
    )
    dry_run: bool = setting(False, "print parameters, FLOPs and memory, then stop")
    gpus: str = setting(
        "",
        "with dry_run: also print what these GPUs need, 8xH100 or 1xH100,8xH100: hours, cost, loader cores, "
        "network and memory (docs/scaling.md)",
    )
    init_from: str = setting(
        "",
        "train on from a model folder or Hub id: all weights, sizes, tokenizer and chat template are its own",
        path=True,
    )
    init_left_from: str = setting(
        "",
        "initialise the left tower from a nanoVLM checkpoint or vanilla model: a folder or Hub id",
        path=True,
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "with several ranks (torchrun): each holds the whole model (ddp), or a share of it (fsdp: FSDP2)",
    )
    fit_memory: str = setting(
        "",
        "choose the largest train.local_batch_size that fits in this many GB (no value: in free memory); "
        "train.global_batch_size is unchanged",
        bare="auto",
    )
    log: str = setting(
        "", "comma-separated experiment trackers: wandb, tensorboard (metrics.jsonl is always written)"
    )
    seed: Seed = setting(0, "random seed of initial weights and data order")
    kernels: Literal["auto", "plain"] = setting(
        "auto", "auto: faster forms of the model's operations where they apply; plain: PyTorch's alone"
    )
    cache_dir: str = setting(CACHE, "folder of cached vision features", path=True)
    model: ModelConfig = ModelConfig()  # noqa: RUF009 (frozen)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    eval: EvalConfig = EvalConfig()
    hub: HubConfig = HubConfig()

    def __post_init__(self) -> None:
        check_bounds(self)
        heads = ("heads",) if self.model.multi_token.heads else ()
        parts = ("vision", "projector", *self.model.towers, *heads)
        rates = {f"train.lr_{part}": getattr(self.train, f"lr_{part}") for part in parts}
        if not any(rates.values()):
            raise UsageError(
                f"nothing learns: {', '.join(rates)} are all 0, which freezes every part of this model"
            )
        no_effect = [
            ("gpus", self.gpus and not self.dry_run, "dry_run is off"),
            ("eval.tasks_every", self.eval.tasks_every and not self.eval.tasks, "eval.tasks names no task"),
            ("eval.limit", self.eval.limit and not self.eval.tasks, "eval.tasks names no task"),
            (
                "model.bridge",
                self.model.bridge != "none" and self.model.left_context == "none",
                "a vanilla model has no left tower",
            ),
            ("hub.private", self.hub.private and not self.hub.repo, "hub.repo names no repository"),
            (
                "train.warmup_vision",
                self.train.warmup_vision >= 0 and not self.train.lr_vision,
                "train.lr_vision = 0 freezes the vision encoder",
            ),
            (
                "train.head_warmup",
                self.train.head_warmup and not self.model.multi_token.heads,
                "model.multi_token.heads is 0",
            ),
        ]
        for name, given, reason in no_effect:
            if given:
                raise UsageError(f"{name} has no effect, for {reason}: leave it out, or change that")
        if self.fit_memory not in ("", "auto") and not (
            re.fullmatch(r"\d+(\.\d+)?", self.fit_memory) and float(self.fit_memory) > 0
        ):
            raise UsageError(
                f"fit_memory = {self.fit_memory!r} must be a number of GB, or auto: the free memory"
            )
        d, block = self.data, 1 + self.model.tokens_per_tile
        stream = "right" if self.model.left_context == "none" else "left"
        if (length := getattr(d, f"{stream}_length")) < block:
            raise UsageError(
                f"data.{stream}_length = {length} is shorter than one image block of {block} tokens "
                f"(1 marker + {block - 1} image tokens)"
            )
