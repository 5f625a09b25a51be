"""Every setting of a run, the model's (`model.py`) among them: frozen dataclasses, resolved once, saved whole with every run. `command_line.py` reads and writes them."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from configs.model import ModelConfig, check_seed, opt
from utils.errors import UsageError
from utils.files import CACHE

DEFAULT_PRESET = "dual_tower_easyvqa"
MANY = 1_000_000  # more minutes, or GB, than there can be


@dataclass(frozen=True)
class FilterConfig:
    """What is left out of training and counted. 0: no bound."""

    min_relevance: int = opt(
        0, "least of FineVision's ratings, 1 to 5: does the question belong to the image?"
    )
    min_visual_dependency: int = opt(0, "does the answer need the image?")
    min_image_correspondence: int = opt(0, "does the image belong to the text?")
    min_formatting: int = opt(0, "is the text well formed?")
    min_question: int = opt(0, "characters of a question, at least")
    max_question: int = opt(0, "characters of a question, at most")
    min_answer: int = opt(0, "characters of an answer, at least")
    max_answer: int = opt(0, "characters of an answer, at most")
    min_side: int = opt(0, "pixels of an image's shorter side, at least")
    min_clip_score: float = opt(0.0, "least CLIP score, where a record has one")
    duplicates: bool = opt(
        False,
        "leave out images that look like one seen before (perceptual hash; every image is decoded in the main process for it)",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise UsageError(
                    f"data.filters.{f.name} = {getattr(self, f.name)} must be 0 (no bound) or more"
                )
        for name in ("question", "answer"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if 0 < most < least:
                raise UsageError(
                    f"data.filters: no {name} has at least {least} characters (min_{name}) and at most {most} (max_{name})"
                )


@dataclass(frozen=True)
class DataConfig:
    sources: str = opt(
        "easy_vqa",
        "where the records come from: NAME[*WEIGHT][:CAP][=PATH], with commas between; NAME is easy_vqa, openmoji, the_cauldron/SUBSET, … (docs/data.md)",
    )
    temperature: float = opt(
        1.0,
        "sources are drawn in proportion to size^(1/T): above 1 small ones come more often than large ones",
    )
    limit: int = opt(0, "use only the first N training images of each source (0: all)")
    validation_images: int = opt(200, "images of each source held out for validation")
    filters: FilterConfig = FilterConfig()
    turns: Literal["branch", "chain"] = opt(
        "branch", "turns of a record: independent questions on the same images, or one conversation"
    )
    vocab_size: int = opt(
        512,
        "size of the byte-level BPE vocabulary trained on the training text, where the right tower has no weights of its own",
    )
    chat_template: Literal["auto", "chatml"] = opt(
        "auto", "a pretrained right tower must speak ChatML (auto), or is taught it (chatml)"
    )
    left_length: int = opt(64, "L, left-stream length of a packed row")
    right_length: int = opt(512, "R, right-stream length of a packed row")
    max_tiles: int = opt(
        0, "tiles of a packed row, at most: bounds the vision encoder's memory (0: as many as fit)"
    )
    window: int = opt(256, "samples that packing may choose from")
    streams: int = opt(
        0,
        "shares of the records that are read side by side; the ranks of a run take them, or parts of them (0: one a rank at the start)",
    )
    workers: int = opt(
        0,
        "processes that decode images (0: the training process), a rank and stream; they change speed alone",
    )
    read_gb: float = opt(
        1.0,
        "memory for rows of Parquet and Arrow files, of which half is read ahead; the other half is what is mixed",
    )
    download: bool = opt(
        False, "fetch sub-sets whole before the start, instead of reading them from the Hub bit by bit"
    )

    def __post_init__(self) -> None:
        for name, least in (
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
            if getattr(self, name) < least:
                raise UsageError(f"data.{name} = {getattr(self, name)} must be at least {least}")
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
    local_batch_size: int = opt(8, "packed rows of a forward, on each rank")
    global_batch_size: int = opt(
        8, "packed rows of an optimizer step, of all ranks together; a multiple of local_batch_size × ranks"
    )
    optimizer: Literal["adamw", "muon"] = opt(
        "adamw", "muon: Muon for the weights of linear layers, AdamW for the rest"
    )
    lr_vision: float = opt(0.0, "learning rate of the vision encoder (0 freezes a part)")
    lr_projector: float = opt(2e-3, "learning rate of the modality projector")
    lr_left: float = opt(2e-3, "learning rate of the left decoder")
    lr_right: float = opt(2e-3, "learning rate of the right decoder")
    lr_heads: float = opt(1e-3, "learning rate of the multi-token heads")
    head_weight: float = opt(0.3, "weight of the first multi-token head's loss beside the next token's")
    head_decay: float = opt(0.8, "each further head's weight ÷ that of the one before")
    head_warmup: int = opt(
        0,
        "steps after which one more head joins, over as many steps: next token first, then the first head (arXiv 2505.22757)",
    )
    schedule: Literal["cosine", "wsd"] = opt(
        "cosine",
        "how rates fall: from the warm-up on, or (wsd: warm-up, stable, decay) over the last steps alone",
    )
    warmup_steps: int = opt(50, "steps of linear warm-up")
    warmup_vision: int = opt(-1, "those of the vision encoder (−1: warmup_steps)")
    warmup_projector: int = opt(-1, "those of the modality projector")
    warmup_left: int = opt(-1, "those of the left decoder: many, and the projector learns first")
    warmup_right: int = opt(-1, "those of the right decoder")
    decay_share: float = opt(0.2, "wsd: share of the steps over which rates fall, at the end")
    final_lr: float = opt(0.0, "learning rate at the last step, as a fraction of the peak")
    weight_decay: float = opt(0.05, "AdamW's, on matrices")
    beta2: float = opt(0.95, "AdamW's second-moment decay")
    ema: float = opt(
        0.0,
        "decay of a moving average of the trained weights, which is validated and exported: 0.999; as much memory as they (0: none)",
    )
    clip: float = opt(1.0, "largest gradient norm (0: no clipping)")
    skips: int = opt(
        10, "steps in a row without a finite loss and gradient, each of them skipped, at which the run stops"
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = opt(
        "auto", "autocast type; auto: bf16 where the machine computes in it; fp16: with scaled gradients"
    )
    device: str = opt("auto", "auto: cuda where there is one, else cpu")
    feature_cache_gb: float = opt(
        2.0, "memory (and disk) that features of a frozen vision encoder may take (0: no cache)"
    )
    log_every: int = opt(1, "steps between two lines of metrics.jsonl")
    diagnostics_every: int = opt(
        100,
        "steps between two looks at updates ÷ weights by part, and for --log at histograms by layer (0: none)",
    )
    stall_minutes: float = opt(
        30.0,
        "minutes without a step, a validation's included, after which the stacks of all threads are printed (0: never)",
    )
    eval_every: int = opt(200, "steps between two validations (0: only at the end)")
    checkpoint_every: int = opt(500, "steps between two checkpoints (0: only at the end)")
    checkpoint_minutes: float = opt(0.0, "minutes after which there is one all the same (0: none)")
    recompute: bool = opt(
        False,
        "keep no activations inside decoder blocks: computed again in the backward pass, one more forward for less memory",
    )
    compile: bool = opt(
        False,
        "compile decoder blocks (torch.compile): a quarter of a minute at the start, steps a little shorter; needs a C++ compiler on a CPU",
    )
    keep_checkpoints: int = opt(
        2, "checkpoints kept, the last ones; the best one too where eval.best says what that is"
    )

    def __post_init__(self) -> None:
        for name in ("local_batch_size", "global_batch_size", "log_every", "keep_checkpoints", "skips"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be at least 1")
        if self.global_batch_size > 1 << 20:
            raise UsageError(
                f"train.global_batch_size = {self.global_batch_size} must be at most {1 << 20:,}"
            )
        if self.global_batch_size % self.local_batch_size:
            raise UsageError(
                f"train.global_batch_size = {self.global_batch_size} rows of a step is not a multiple of train.local_batch_size = {self.local_batch_size} rows of a forward: change one of them"
            )
        for name in ("eval_every", "diagnostics_every", "checkpoint_every", "warmup_steps", "head_warmup"):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be 0 or more")
        for name in (
            "stall_minutes",
            "checkpoint_minutes",
            "clip",
            "feature_cache_gb",
            "head_weight",
            "head_decay",
        ):
            if not 0 <= getattr(self, name) < MANY:
                raise UsageError(
                    f"train.{name} = {getattr(self, name)} must be 0 or more, and below {MANY:,}"
                )
        for name in ("lr_vision", "lr_projector", "lr_left", "lr_right", "lr_heads", "weight_decay"):
            if not 0 <= getattr(self, name) < 1e3:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be 0 or more, and below 1,000")
        for part in ("vision", "projector", "left", "right"):
            if getattr(self, f"warmup_{part}") < -1:
                raise UsageError(
                    f"train.warmup_{part} = {getattr(self, f'warmup_{part}')} must be 0 or more, or −1 (as many as warmup_steps)"
                )
        if not 0 < self.decay_share <= 1 or not 0 <= self.final_lr <= 1:
            raise UsageError(
                f"train.decay_share = {self.decay_share} must be in (0, 1], final_lr = {self.final_lr} in [0, 1]"
            )
        if self.schedule == "cosine" and self.decay_share != TrainConfig.decay_share:
            raise UsageError(
                f"train.decay_share = {self.decay_share} is of the schedule wsd, and train.schedule is cosine: give --train.schedule wsd, or leave it out"
            )
        for name in ("beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be in [0, 1)")

    @property
    def micro_batches(self) -> int:
        """Forwards of an optimizer step, of all ranks together."""
        return self.global_batch_size // self.local_batch_size


@dataclass(frozen=True)
class LoraTower:
    r: int = opt(
        0,
        "rank of the adapters (0: none); then only they are trained in this decoder, with its learning rate",
    )
    alpha: float = opt(32.0, "adapters are scaled by alpha ÷ r")
    dropout: float = opt(0.0, "dropout before an adapter")
    targets: str = opt(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "linear layers that get one, with commas between",
    )
    nf4: bool = opt(
        False, "keep the weights under the adapters in 4 bits (QLoRA; needs CUDA and bitsandbytes)"
    )

    def __post_init__(self) -> None:
        if self.r < 0 or not 0 <= self.dropout < 1 or not self.alpha > 0:
            raise UsageError(
                f"lora: r = {self.r} must be 0 or more, dropout = {self.dropout} in [0, 1), alpha = {self.alpha} above 0"
            )


@dataclass(frozen=True)
class LoraConfig:
    left: LoraTower = LoraTower()
    right: LoraTower = LoraTower()


@dataclass(frozen=True)
class EvalConfig:
    captions: int = opt(
        100,
        "validation captions that are generated and scored by CIDEr, where records are captions (0: none)",
    )
    caption_tokens: int = opt(32, "longest of these captions, in tokens")
    tasks: str = opt(
        "",
        "tasks of lmms-eval that are scored too, as evaluation.py --tasks takes them, commas apart: mmstar",
    )
    tasks_every: int = opt(
        0, "steps between two runs of these tasks, each with a validation (0: only at the end)"
    )
    limit: int = opt(0, "only the first questions of each task (0: all)")
    data_root: str = opt("", "copies of the tasks' data sets, used before the network")
    best: str = opt(
        "",
        "metric of metrics.jsonl by which the best model is kept, in best/, and its checkpoint: validation_accuracy, validation_cider, mmstar_average … (a loss: the lowest)",
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
        "repository of the Hugging Face Hub, NAME or OWNER/NAME: the model is pushed there at each checkpoint, in the background, and at the end",
    )
    private: bool = opt(False, "make the repository private")
    licence: str = opt(
        "",
        "licence of the weights, as the Hub names it, for the model card: apache-2.0, cc-by-4.0 … (empty: the card says that none is stated)",
    )


@dataclass(frozen=True)
class Config:
    config: str = opt(DEFAULT_PRESET, "preset: NAME of configs/config_NAME.py")
    max_steps: int = opt(1500, "optimizer steps")
    output_dir: str = opt("", "run folder (default: runs/<config>, or the next free runs/<config>-N)")
    resume: str = opt("", "'auto' (the newest checkpoint of output_dir), a run folder or a checkpoint folder")
    dry_run: bool = opt(False, "print parameters, FLOPs and memory, and stop")
    init_left_from: str = opt(
        "",
        "a nanoVLM checkpoint or vanilla model whose encoder, projector and decoder the left tower starts from: folder or Hub id",
    )
    parallel: Literal["ddp", "fsdp"] = opt(
        "ddp",
        "several ranks under torchrun: each holds the whole model (ddp), or a share of it (fsdp: FSDP2)",
    )
    fit_memory: str = opt(
        "",
        "GB of memory (alone: what is free) that train.local_batch_size is chosen to fit at a run's start; train.global_batch_size stays",
        const="auto",
    )
    log: str = opt(
        "",
        "experiment trackers that are told too, commas apart: wandb, tensorboard, trackio (metrics.jsonl is always written)",
    )
    seed: int = opt(0, "of weights and data order")
    cache_dir: str = opt(CACHE, "folder of what is computed once: vision features")
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
        learning = {
            f"train.lr_{part}": getattr(self.train, f"lr_{part}")
            for part in (
                "vision",
                "projector",
                *self.model.towers,
                *["heads"] * bool(self.model.multi_token.heads),
            )
        }
        if not any(learning.values()):
            raise UsageError(
                f"nothing learns: {', '.join(learning)} are all 0, which freezes every part of this model"
            )
        idle = [
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
        for name, given, why in idle:
            if given:
                raise UsageError(f"{name} says nothing here, for {why}: leave it out, or change that")
        if self.fit_memory not in ("", "auto") and not (
            re.fullmatch(r"\d+(\.\d+)?", self.fit_memory) and float(self.fit_memory) > 0
        ):
            raise UsageError(
                f"fit_memory = {self.fit_memory!r} must be a number of GB, or auto: what is free"
            )
        d, block = self.data, 1 + self.model.tokens_per_tile
        stream = "right" if self.model.left_context == "none" else "left"
        if (length := getattr(d, f"{stream}_length")) < block:
            raise UsageError(
                f"data.{stream}_length = {length} is shorter than one image block of {block} tokens (1 marker + {block - 1} image tokens)"
            )
