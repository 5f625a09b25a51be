"""DualTowerVLM: images through the left tower into a per-layer KV cache, text through the right tower, which reads it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig, Vocabulary
from models.dual_tower.dual_language_model import DualLanguageModel
from models.kv_cache import ImageKV, KeyValueRecorder
from models.language_model import KeyValueDecoder
from models.masks import left_mask
from models.modality_projector import ModalityProjector
from models.pretrained import load_model, save_model
from models.vision_encoder import VisionEncoder


class Output(NamedTuple):
    loss_sum: Tensor | None  # sum of cross-entropy over supervised tokens; None without labels
    hidden: Tensor  # (B, R, D)


class LeftTower(nn.Module):
    """Vision encoder → modality projector → decoder. Its only product is keys and values."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.vision_encoder = VisionEncoder(config.vision)
        self.modality_projector = ModalityProjector(self.vision_encoder.features, config.left.hidden_size, config.projector.pixel_shuffle)
        self.embed_markers = nn.Embedding(vocabulary.markers, config.left.hidden_size)
        nn.init.normal_(self.embed_markers.weight, std=0.02)
        self.decoder = KeyValueDecoder(config.left)

    def forward(self, tiles: Tensor, left_ids: Tensor, left_positions: Tensor, left_groups: Tensor, left_images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The left stream → every layer's unrotated keys and values (B, G, L, E). `tiles` (N, 3, h, w), the rest (B, L)."""
        placeholders = left_ids == self.vocabulary.image_token_id
        needed, given = int(placeholders.sum()), len(tiles) * self.config.tokens_per_tile
        if needed != given:
            raise ValueError(f"{needed} image placeholders in the left stream, but {len(tiles)} tiles make {given} image tokens")
        markers = (left_ids - self.vocabulary.first_marker_id).clamp(min=0)
        x = self.embed_markers(markers)  # (B, L, D)
        if given:
            features = self.modality_projector(self.vision_encoder(tiles))  # (N, P, D)
            x = x.masked_scatter(placeholders[..., None], features.flatten(0, 1).to(x.dtype))
        mask = left_mask(left_positions, left_groups, left_images, self.config.image_isolation, self.config.left_attention)
        recorder = KeyValueRecorder()
        self.decoder(x, left_positions, mask, recorder)
        return recorder.layers


class DualTowerVLM(nn.Module):
    """Exactly one tower per token. Batch keys are the arguments: `model(**batch)`."""

    model_type = "dual_tower"

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.left = LeftTower(config, vocabulary)
        self.right = DualLanguageModel(config.right, vocabulary.text_size)

    @property
    def device(self) -> torch.device:
        return self.right.embed_tokens.weight.device

    def parts(self) -> dict[str, nn.Module]:
        """The parts with learning rates of their own; together they hold every parameter once."""
        left_decoder = nn.ModuleList((self.left.embed_markers, self.left.decoder))
        return {"vision": self.left.vision_encoder, "projector": self.left.modality_projector, "left": left_decoder, "right": self.right}

    def forward(
        self,
        tiles: Tensor,
        left_ids: Tensor,
        left_positions: Tensor,
        left_groups: Tensor,
        left_images: Tensor,
        right_ids: Tensor,
        right_positions: Tensor,
        right_documents: Tensor,
        right_groups: Tensor,
        labels: Tensor | None = None,
    ) -> Output:
        """Tiles (N, 3, h, w) uint8, left stream (B, L), right stream (B, R); see DESIGN's batch table in docs/architecture.md."""
        image_kv = self.left(tiles, left_ids, left_positions, left_groups, left_images)
        hidden = self.right.read(image_kv, left_positions, left_groups, right_ids, right_positions, right_documents, right_groups)
        return Output(self.right.loss(hidden, labels) if labels is not None else None, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) → logits over the text vocabulary (…, V)."""
        return self.right.logits(hidden)

    def encode_images(self, tiles: Tensor, blocks: list[Tensor]) -> list[ImageKV]:
        """Image KVs of several images. `tiles` (N, 3, h, w) uint8 of all of them in order; `blocks`: each image's token ids (T,)."""
        lengths = [len(block) for block in blocks]
        ids = nn.utils.rnn.pad_sequence(blocks, batch_first=True, padding_value=self.vocabulary.first_marker_id).to(self.device)  # (B, L)
        slots = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        images = torch.arange(len(blocks), device=self.device)[:, None].expand_as(ids)
        images = images.masked_fill(slots >= torch.tensor(lengths, device=self.device)[:, None], -1)
        with torch.inference_mode():
            layers = self.left(tiles.to(self.device), ids, slots, images, images)
        data = torch.stack([torch.stack(layer) for layer in layers])  # (layers, 2, B, G, L, E)
        return [ImageKV(data[:, :, b, :, :n].clone()) for b, n in enumerate(lengths)]

    def encode_image(self, tiles: Tensor, block: Tensor) -> ImageKV:
        """Image KV of one image: its tiles (n, 3, h, w) uint8 and its block's token ids (T,)."""
        return self.encode_images(tiles, [block])[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; beside and renamed."""
        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DualTowerVLM":
        """Load a folder written by `save_pretrained`. A missing, foreign or misshapen file raises `UserError`."""
        return load_model(cls, Path(folder))
