"""DualTowerVLM: images through the left tower into a per-layer KV cache, text through the right tower, which reads it."""

import torch
from torch import Tensor, nn

from configs.model import ModelConfig, Vocabulary
from models.dual_tower.dual_language_model import DualLanguageModel
from models.kv_cache import ImageKV, KeyValueRecorder
from models.language_model import KeyValueDecoder, Output
from models.masks import left_mask
from models.modality_projector import ModalityProjector, blank, put_image_tokens
from models.multi_token import make_heads
from models.vision_encoder import VisionEncoder
from models.weights.hub_model import HubModel
from models.weights.tensors import module_fingerprint

IMAGE_KV_VERSION = 1  # of the code from image to image KV, data/images.py included: raised when it computes something else, so that what is stored is not used


class LeftTower(nn.Module):
    """Vision encoder → modality projector → decoder. Its only product is keys and values."""

    blank_tile = False  # batches without images run the encoder too, for nothing

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.vision_encoder = VisionEncoder(config.vision)
        self.modality_projector = ModalityProjector(
            config.projector, self.vision_encoder.features, config.left.hidden_size
        )
        self.first_id = (
            vocabulary.first_marker_id if config.left_context == "image" else 0
        )  # of the embedding table: markers alone, or all
        self.embed_tokens = nn.Embedding(vocabulary.size - self.first_id, config.left.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.decoder = KeyValueDecoder(config.left)

    def forward(
        self,
        tiles: Tensor,
        left_ids: Tensor,
        left_positions: Tensor,
        left_groups: Tensor,
        left_images: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """The left stream → every layer's unrotated keys and values (B, G, L, E). `tiles` (N, 3, h, w), the rest (B, L)."""
        x = self.embed_tokens((left_ids - self.first_id).clamp(min=0))  # (B, L, D)
        placeholders = left_ids == self.vocabulary.image_token_id
        if len(tiles) or placeholders.any():
            x = put_image_tokens(x, placeholders, self.modality_projector(self.vision_encoder(tiles)))
        mask = left_mask(
            left_positions, left_groups, left_images, self.config.image_isolation, self.config.left_attention
        )
        if self.blank_tile and not len(tiles):
            x = x + blank(tiles, self.vision_encoder, self.modality_projector)
        recorder = KeyValueRecorder()
        self.decoder(x, left_positions, mask, recorder)
        return recorder.layers


class DualTowerVLM(HubModel):
    """Exactly one tower per token. Batch keys are the arguments: `model(**batch)`."""

    model_type = "dual_tower"

    @property
    def blank_tile(self) -> bool:
        return self.left.blank_tile

    @blank_tile.setter
    def blank_tile(self, on: bool) -> None:
        self.left.blank_tile = on

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        config.check_join()
        self.config, self.vocabulary = config, vocabulary
        self.left = LeftTower(config, vocabulary)
        self.right = DualLanguageModel(
            config.right, vocabulary.text_size if config.left_context == "image" else vocabulary.size
        )
        self.heads = make_heads(config, self.right.embed_tokens.num_embeddings)

    @property
    def device(self) -> torch.device:
        return self.right.embed_tokens.weight.device

    def parts(self) -> dict[str, nn.Module]:
        """The parts with learning rates of their own; together they hold every parameter once."""
        left_decoder = nn.ModuleList((self.left.embed_tokens, self.left.decoder))
        return {
            "vision": self.left.vision_encoder,
            "projector": self.left.modality_projector,
            "left": left_decoder,
            "right": self.right,
        } | ({"heads": self.heads} if self.heads is not None else {})

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
        hidden = self.right.read(
            image_kv, left_positions, left_groups, right_ids, right_positions, right_documents, right_groups
        )
        heads, right = self.heads, self.right
        head_loss_sums = (
            heads.losses(hidden, labels, right_documents, right.embed_tokens, right.unembedding)
            if heads is not None and labels is not None
            else None
        )
        return right.output(hidden, labels, head_loss_sums)

    def embed(self, ids: Tensor, tiles: Tensor | None = None) -> Tensor:
        """What the right tower reads of token ids (B, T): (B, T, D). It never sees tiles."""
        return self.right.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) → logits over the text vocabulary (…, V)."""
        return self.right.logits(hidden)

    @torch.inference_mode()
    def encode_images(
        self, tiles: Tensor, blocks: list[Tensor], images: list[Tensor] | None = None
    ) -> list[ImageKV]:
        """Image KVs of several blocks. `tiles` (N, 3, h, w) uint8 of all of them in order; `blocks`: each block's token ids (T,).

        A block is one image's; or, where images are not isolated, several images' with what stands left between them:
        then `images` says which image each token belongs to (−1: none).
        """
        lengths = torch.tensor([len(block) for block in blocks], device=self.device)
        ids = nn.utils.rnn.pad_sequence(
            blocks, batch_first=True, padding_value=self.vocabulary.first_marker_id
        ).to(self.device)  # (B, L)
        images = images or [torch.zeros_like(block) for block in blocks]
        numbers = nn.utils.rnn.pad_sequence(images, batch_first=True, padding_value=-1).to(self.device)
        slots = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        groups = (
            torch.arange(len(blocks), device=self.device)[:, None]
            .expand_as(ids)
            .masked_fill(slots >= lengths[:, None], -1)
        )
        layers = self.left(tiles.to(self.device), ids, slots, groups, numbers)
        data = torch.stack([torch.stack(layer) for layer in layers])  # (layers, 2, B, G, L, E)
        return [ImageKV(data[:, :, b, :, :n].clone()) for b, n in enumerate(lengths.tolist())]

    def encode_image(self, tiles: Tensor, block: Tensor) -> ImageKV:
        """Image KV of one image: its tiles (n, 3, h, w) uint8 and its block's token ids (T,)."""
        return self.encode_images(tiles, [block])[0]

    def fingerprint(self) -> str:
        """Fingerprint of what an image KV depends on beside its image: the left tower's weights and settings. Computed at each call."""
        c = self.config
        settings = (
            IMAGE_KV_VERSION,
            c.vision,
            c.projector,
            c.left,
            c.left_context,
            c.image_isolation,
            c.left_attention,
            self.vocabulary,
        )
        return module_fingerprint(self.left, repr(settings))
