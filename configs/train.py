"""All settings of a run, `model.py`'s included: frozen dataclasses, resolved once, saved with every run."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from configs.model import ModelConfig, check_seed, opt
from utils.errors import UsageError
from utils.files import CACHE

DEFAULT_PRESET = "dual_tower_easyvqa"
MANY = 1_000_000  # upper bound of minutes, GB and the like


RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")  # FineVision's, 1 to 5


@dataclass(frozen=True)
class FilterConfig:
    """Bounds on records and turns; those outside are left out of training, and counted. 0: no bound."""

    min_relevance: int = opt(
        0, "minimum FineVision rating, 1 to 5, of the question's relevance to the image (0: no bound)"
    )
    min_visual_dependency: int = opt(
        0, "minimum rating of the answer's dependency on the image (0: no bound)"
    )
    min_image_correspondence: int = opt(0, "minimum rating of the match of image and text (0: no bound)")
    min_formatting: int = opt(0, "minimum rating of the text's formatting (0: no bound)")
    min_question: int = opt(0, "minimum characters of a question (0: no bound)")
    max_question: int = opt(0, "maximum characters of a question (0: no bound)")
    min_answer: int = opt(0, "minimum characters of an answer (0: no bound)")
    max_answer: int = opt(0, "maximum characters of an answer (0: no bound)")
    min_side: int = opt(0, "minimum shorter side of an image, in pixels (0: no bound)")
    min_clip_score: float = opt(0.0, "minimum CLIP score, for records that have one (0: no bound)")

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise UsageError(
                    f"data.filters.{f.name} = {getattr(self, f.name)} must be 0 (no bound) or more"
                )
        for name in ("question", "answer"):
            minimum, maximum = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if 0 < maximum < minimum:
                raise UsageError(
                    f"data.filters: no {name} has at least {minimum} characters (min_{name}) "
                    f"and at most {maximum} (max_{name})"
                )


@dataclass(frozen=True)
class DataConfig:
    sources: str = opt(
        "easy_vqa",
        "comma-separated data sources, NAME[*WEIGHT][:CAP][=PATH]; NAME: easy_vqa, openmoji, "
        "the_cauldron/SUBSET, … (docs/data.md)",
        path=True,
    )
    temperature: float = opt(
        1.0, "T: a source is drawn in proportion to size^(1/T); above 1 favours small sources"
    )
    limit: int = opt(0, "use only the first N training images of each source (0: all)")
    validation_images: int = opt(200, "images of each source held out for validation")
    filters: FilterConfig = FilterConfig()
    turns: Literal["branch", "chain"] = opt(
        "branch",
        "turns of a record: independent questions on its images, or one conversation (chain)",
    )
    vocab_size: int = opt(
        512,
        "vocabulary size of the byte-level BPE tokenizer, trained if the right tower is not pretrained",
    )
    chat_template: Literal["auto", "chatml"] = opt(
        "auto", "auto: a pretrained right tower must use ChatML; chatml: train it to"
    )
    left_length: int = opt(64, "left-stream length L of a packed row, in tokens")
    right_length: int = opt(512, "right-stream length R of a packed row, in tokens")
    max_tiles: int = opt(
        0, "maximum tiles of a packed row, to bound the vision encoder's memory (0: as many as fit)"
    )
    window: int = opt(256, "samples from which packing chooses the next row")
    streams: int = opt(
        0, "shards of the records; a rank reads one or more, or a part of one (0: one per rank at the start)"
    )
    workers: int = opt(
        0,
        "image-decoding processes per rank and shard; they only change the speed (0: the main process)",
    )
    read_gb: float = opt(
        1.0, "GB of memory for rows of Parquet and Arrow files: half to read ahead, half to shuffle"
    )
    download: bool = opt(False, "download data sets before the start instead of streaming them from the Hub")

    def __post_init__(self) -> None:
        for name, minimum in (
            ("right_length", 1),
            ("window", 1),
            ("vocab_size", 256),
            ("validation_images", 1),
            ("limit", 0),
            ("left_length", 0),
            ("max_tiles", 0),
            ("workers", 0),
            ("streams", 0),
        ):
            if getattr(self, name) < minimum:
                raise UsageError(f"data.{name} = {getattr(self, name)} must be at least {minimum}")
        if not 0.1 <= self.temperature < float("inf"):
            raise UsageError(f"data.temperature = {self.temperature} must be at least 0.1")
        if not 0 < self.read_gb < MANY:
            raise UsageError(f"data.read_gb = {self.read_gb} must be above 0, and below {MANY:,}")
        if self.vocab_size > MANY:
            raise UsageError(f"data.vocab_size = {self.vocab_size} must be at most {MANY:,}")
        if self.window >= 1 << 19:
            raise UsageError(f"data.window = {self.window} must be below {1 << 19}")


@dataclass(frozen=True)
class TrainConfig:
    local_batch_size: int = opt(8, "packed rows per forward and rank")
    global_batch_size: int = opt(
        8, "packed rows per optimizer step, over all ranks; a multiple of local_batch_size × ranks"
    )
    optimizer: Literal["adamw", "muon"] = opt(
        "adamw", "AdamW, or Muon for the weights of linear layers and AdamW for the rest"
    )
    lr_vision: float = opt(0.0, "learning rate of the vision encoder (0: frozen)")
    lr_projector: float = opt(2e-3, "learning rate of the modality projector (0: frozen)")
    lr_left: float = opt(2e-3, "learning rate of the left decoder (0: frozen)")
    lr_right: float = opt(2e-3, "learning rate of the right decoder (0: frozen)")
    lr_heads: float = opt(1e-3, "learning rate of the multi-token heads (0: frozen)")
    head_weight: float = opt(
        0.3, "weight of the first multi-token head's loss; the next-token loss has weight 1"
    )
    head_decay: float = opt(0.8, "weight of each further head ÷ weight of the head before")
    head_warmup: int = opt(
        0,
        "steps of each head's weight warm-up, one head after another (0: no warm-up; arXiv 2505.22757)",
    )
    schedule: Literal["cosine", "wsd"] = opt(
        "cosine", "learning-rate schedule: cosine decay, or wsd (warm-up, stable, decay over the last steps)"
    )
    warmup_steps: int = opt(50, "steps of linear warm-up")
    warmup_vision: int = opt(-1, "warm-up steps of the vision encoder (-1: warmup_steps)")
    warmup_projector: int = opt(-1, "warm-up steps of the modality projector (-1: warmup_steps)")
    warmup_left: int = opt(
        -1, "warm-up steps of the left decoder; many let the projector learn first (-1: warmup_steps)"
    )
    warmup_right: int = opt(-1, "warm-up steps of the right decoder (-1: warmup_steps)")
    decay_share: float = opt(0.2, "wsd: fraction of all steps with decay, at the end")
    final_lr: float = opt(0.0, "learning rate at the last step, as a fraction of the peak")
    weight_decay: float = opt(0.05, "weight decay of AdamW, for matrices only")
    beta2: float = opt(0.95, "second-moment decay of AdamW")
    ema: float = opt(
        0.0,
        "decay of an average of the trained weights, such as 0.999; the average is validated and exported, "
        "and takes as much memory as they do (0: none)",
    )
    clip: float = opt(1.0, "maximum gradient norm (0: no clipping)")
    skips: int = opt(
        10,
        "stop after this many skipped steps in a row; steps with a non-finite loss or gradient are skipped",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = opt(
        "auto", "autocast type; auto: bf16 if the hardware supports it, else fp32; fp16: with loss scaling"
    )
    device: str = opt("auto", "cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is there")
    feature_cache_gb: float = opt(
        2.0, "GB of memory, and of disk, for cached features of a frozen vision encoder (0: no cache)"
    )
    log_every: int = opt(1, "steps between lines of metrics.jsonl")
    diagnostics_every: int = opt(
        100,
        "steps between measurements of updates ÷ weights by part, and histograms for --log (0: none)",
    )
    stall_minutes: float = opt(
        30.0, "minutes without a step, validation included, until all thread stacks are printed (0: never)"
    )
    eval_every: int = opt(200, "steps between validations (0: only at the end)")
    checkpoint_every: int = opt(500, "steps between checkpoints (0: only at the end)")
    checkpoint_minutes: float = opt(0.0, "maximum minutes between checkpoints (0: no limit)")
    recompute: bool = opt(
        False, "activation checkpointing of decoder blocks: less memory, one more forward per step"
    )
    compile: bool = opt(
        False,
        "torch.compile decoder blocks: some 15 s at the start, then faster steps; CPUs need a C++ compiler",
    )
    keep_checkpoints: int = opt(2, "number of newest checkpoints to keep; with eval.best, the best one too")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UsageError(f"train.device = {self.device!r} is none of auto, cpu, cuda, mps")
        for name in ("local_batch_size", "global_batch_size", "log_every", "keep_checkpoints", "skips"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be at least 1")
        if self.global_batch_size > 1 << 20:
            raise UsageError(
                f"train.global_batch_size = {self.global_batch_size} must be at most {1 << 20:,}"
            )
        for name in ("eval_every", "diagnostics_every", "checkpoint_every", "warmup_steps", "head_warmup"):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be 0 or more")
        amounts = (
            "stall_minutes",
            "checkpoint_minutes",
            "clip",
            "feature_cache_gb",
            "head_weight",
            "head_decay",
        )
        for name in amounts:
            if not 0 <= getattr(self, name) < MANY:
                raise UsageError(
                    f"train.{name} = {getattr(self, name)} must be 0 or more, and below {MANY:,}"
                )
        for name in ("lr_vision", "lr_projector", "lr_left", "lr_right", "lr_heads", "weight_decay"):
            if not 0 <= getattr(self, name) < 1e3:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be 0 or more, and below 1,000")
        for part in ("vision", "projector", "left", "right"):
            if (steps := getattr(self, f"warmup_{part}")) < -1:
                raise UsageError(
                    f"train.warmup_{part} = {steps} must be 0 or more, or −1 (as many as warmup_steps)"
                )
        if not 0 < self.decay_share <= 1 or not 0 <= self.final_lr <= 1:
            raise UsageError(
                f"train.decay_share = {self.decay_share} must be in (0, 1], "
                f"final_lr = {self.final_lr} in [0, 1]"
            )
        if self.schedule == "cosine" and self.decay_share != TrainConfig.decay_share:
            raise UsageError(
                f"train.decay_share = {self.decay_share} is of the schedule wsd, and train.schedule is "
                "cosine: give --train.schedule wsd, or leave it out"
            )
        for name in ("beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be in [0, 1)")

    @property
    def micro_batches(self) -> int:
        """Forwards per optimizer step, over all ranks; `training.distributed.check_world` has checked it."""
        return self.global_batch_size // self.local_batch_size


@dataclass(frozen=True)
class LoraTower:
    r: int = opt(
        0,
        "rank of the adapters; only they are trained in this decoder, with its learning rate (0: none)",
    )
    alpha: float = opt(32.0, "scale of the adapters: alpha ÷ r")
    dropout: float = opt(0.0, "dropout on the adapters' input")
    targets: str = opt(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "comma-separated linear layers with an adapter",
    )
    nf4: bool = opt(False, "store the frozen weights in 4 bits (QLoRA; needs CUDA and bitsandbytes)")

    def __post_init__(self) -> None:
        if self.r < 0 or not 0 <= self.dropout < 1 or not self.alpha > 0:
            raise UsageError(
                f"lora: r = {self.r} must be 0 or more, dropout = {self.dropout} in [0, 1), "
                f"alpha = {self.alpha} above 0"
            )


@dataclass(frozen=True)
class LoraConfig:
    left: LoraTower = LoraTower()
    right: LoraTower = LoraTower()


@dataclass(frozen=True)
class EvalConfig:
    captions: int = opt(
        100, "validation captions to generate and score by CIDEr, for sources with captions (0: none)"
    )
    caption_tokens: int = opt(32, "maximum length of these captions, in tokens")
    tasks: str = opt(
        "", "comma-separated tasks to score, such as mmstar (see evaluation.py --tasks)", path=True
    )
    tasks_every: int = opt(
        0, "steps between runs of these tasks, each with a validation (0: only at the end)"
    )
    limit: int = opt(0, "use only the first N questions of each task (0: all)")
    data_root: str = opt(
        "", "folder with copies of the tasks' data sets, used instead of the network", path=True
    )
    best: str = opt(
        "",
        "metric of metrics.jsonl that selects the best model, kept in best/, and its checkpoint: "
        "validation_accuracy, validation_cider, mmstar_average … (highest; a loss: lowest)",
    )

    def __post_init__(self) -> None:
        for name in ("captions", "tasks_every", "limit"):
            if getattr(self, name) < 0:
                raise UsageError(f"eval.{name} = {getattr(self, name)} must be 0 or more")
        if self.caption_tokens < 1:
            raise UsageError(f"eval.caption_tokens = {self.caption_tokens} must be at least 1")


@dataclass(frozen=True)
class HubConfig:
    repo: str = opt(
        "",
        "repository of the Hugging Face Hub, NAME or OWNER/NAME, to push the model to: at each checkpoint, "
        "in the background, and at the end",
    )
    private: bool = opt(False, "make the repository private")
    licence: str = opt(
        "",
        "licence of the weights for the model card, as the Hub names it: apache-2.0, … (empty: none)",
    )


@dataclass(frozen=True)
class Config:
    config: str = opt(DEFAULT_PRESET, "preset: NAME of configs/config_NAME.py")
    max_steps: int = opt(1500, "optimizer steps")
    output_dir: str = opt(
        "", "run folder (default: runs/<config>, or the next free runs/<config>-N)", path=True
    )
    resume: str = opt(
        "", "'auto' (the newest checkpoint of output_dir), a run folder or a checkpoint folder", path=True
    )
    dry_run: bool = opt(False, "print parameters, FLOPs and memory, then stop")
    init_left_from: str = opt(
        "",
        "initialise the left tower from a nanoVLM checkpoint or vanilla model: a folder or Hub id",
        path=True,
    )
    parallel: Literal["ddp", "fsdp"] = opt(
        "ddp",
        "with several ranks (torchrun): each holds the whole model (ddp), or a share of it (fsdp: FSDP2)",
    )
    fit_memory: str = opt(
        "",
        "choose the largest train.local_batch_size that fits in this many GB (no value: in free memory); "
        "train.global_batch_size is unchanged",
        const="auto",
    )
    log: str = opt(
        "",
        "comma-separated experiment trackers: wandb, tensorboard (metrics.jsonl is always written)",
    )
    seed: int = opt(0, "random seed of initial weights and data order")
    kernels: Literal["auto", "plain"] = opt(
        "auto", "auto: faster forms of the model's operations where they apply; plain: PyTorch's alone"
    )
    cache_dir: str = opt(CACHE, "folder of cached vision features", path=True)
    model: ModelConfig = ModelConfig()  # noqa: RUF009 (frozen)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    eval: EvalConfig = EvalConfig()
    hub: HubConfig = HubConfig()

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise UsageError(f"max_steps = {self.max_steps} must be at least 1")
        if self.max_steps > MANY**2:
            raise UsageError(f"max_steps = {self.max_steps} must be at most {MANY**2:,}")
        check_seed(self.seed)
        heads = ("heads",) if self.model.multi_token.heads else ()
        parts = ("vision", "projector", *self.model.towers, *heads)
        rates = {f"train.lr_{part}": getattr(self.train, f"lr_{part}") for part in parts}
        if not any(rates.values()):
            raise UsageError(
                f"nothing learns: {', '.join(rates)} are all 0, which freezes every part of this model"
            )
        no_effect = [
            ("eval.tasks_every", self.eval.tasks_every and not self.eval.tasks, "eval.tasks names no task"),
            ("eval.limit", self.eval.limit and not self.eval.tasks, "eval.tasks names no task"),
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
