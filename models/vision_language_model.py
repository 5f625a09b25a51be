"""The vanilla baseline: one decoder over image and text tokens in one sequence, as in nanoVLM."""

import torch
from torch import Tensor, nn

from configs.model import ModelConfig, Vocabulary
from models.language_model import LanguageModel, Output
from models.masks import right_mask
from models.modality_projector import ModalityProjector, blank, put_image_tokens
from models.multi_token import make_heads
from models.vision_encoder import VisionEncoder
from models.weights.hub_model import HubModel


class VisionLanguageModel(HubModel):
    """Takes the dual tower's batches: the left stream is empty, image blocks are in the right one."""

    model_type = "vanilla"

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.vision_encoder = VisionEncoder(config.vision)
        self.modality_projector = ModalityProjector(
            config.projector, self.vision_encoder.features, config.right.hidden_size
        )
        self.right = LanguageModel(config.right, vocabulary.size)
        self.heads = make_heads(config, vocabulary.size)

    @property
    def device(self) -> torch.device:
        return self.right.embed_tokens.weight.device

    def parts(self) -> dict[str, nn.Module]:
        """The parts with their own learning rates; together they hold every parameter once."""
        return {"vision": self.vision_encoder, "projector": self.modality_projector, "right": self.right} | (
            {"heads": self.heads} if self.heads is not None else {}
        )

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
        """Tiles (N, 3, h, w) uint8, empty left stream (B, 0), right stream (B, R)."""
        if left_ids.shape[1]:
            raise ValueError(
                "a vanilla model has no left tower, "
                f"but the left stream holds {left_ids.shape[1]} tokens a row"
            )
        mask = right_mask(right_positions, right_documents, right_groups, left_positions, left_groups)
        hidden = self.right(self.embed(right_ids, tiles), right_positions, mask)
        return self.right.output(hidden, labels, right_documents, self.heads)

    def embed(self, ids: Tensor, tiles: Tensor | None = None) -> Tensor:
        """Token ids (B, T) → embeddings (B, T, D), image tokens of `tiles` (N, 3, h, w) at placeholders."""
        x = self.right.embed_tokens(ids)
        placeholders = ids == self.vocabulary.image_token_id
        if tiles is not None and not len(tiles) and self.modality_projector.blank_tile:
            x = x + blank(tiles, self.vision_encoder, self.modality_projector)
        if tiles is None or not len(tiles):
            if not placeholders.any():
                return x
            no_tokens = x.new_empty(0, self.config.tokens_per_tile, x.shape[-1])
            return put_image_tokens(x, placeholders, no_tokens)  # raises: there are placeholders
        return put_image_tokens(x, placeholders, self.modality_projector(self.vision_encoder(tiles)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) → logits over the whole vocabulary (…, V)."""
        return self.right.logits(hidden)
