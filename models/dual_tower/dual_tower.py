"""DualTowerVLM: the left tower turns images into image KV; the right tower reads it, and the text."""

import torch
from torch import Tensor, nn

from configs.model import DecoderConfig, ModelConfig, Vocabulary
from models.dual_tower.dual_language_model import DualLanguageModel
from models.kv_cache import ImageKV
from models.language_model import KeyValueDecoder, Output
from models.masks import left_mask
from models.modality_projector import ModalityProjector, blank, put_image_tokens
from models.multi_token import make_heads
from models.vision_encoder import VisionEncoder
from models.weights.hub_model import HubModel


class Bridge(nn.Module):
    """Factors 1 + g on image keys and values, per channel as in (IA)³ (arXiv 2205.05638); g starts at 0.

    Only the right tower reads the result: the left tower's own attention is as without a bridge.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(config.layers, 2, config.kv_heads, 1, config.head_size))

    def forward(self, image_kv: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        factors = (1 + self.gates).to(image_kv[0][0].dtype)
        return [(k * f[0], v * f[1]) for (k, v), f in zip(image_kv, factors, strict=True)]


class LeftTower(nn.Module):
    """Vision encoder → modality projector → language decoder. Its only product is keys and values."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.vision_encoder = VisionEncoder(config.vision)
        self.modality_projector = ModalityProjector(
            config.projector, self.vision_encoder.features, config.left.hidden_size
        )
        # Token id of the embedding table's first row. It holds markers only, unless text goes left, too.
        self.first_id = vocabulary.first_marker_id if config.left_context == "image" else 0
        self.embed_tokens = nn.Embedding(vocabulary.size - self.first_id, config.left.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.decoder = KeyValueDecoder(config.left)
        self.bridge = Bridge(config.left) if config.bridge == "gate" else None

    def forward(
        self,
        tiles: Tensor,
        left_ids: Tensor,
        left_positions: Tensor,
        left_groups: Tensor,
        left_images: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """The left stream → unrotated keys and values (B, G, L, E) of each of its layers.

        `tiles` (N, 3, h, w) uint8, other arguments (B, L). `left_positions` are those in the document: the
        mask needs them, and rotary embedding has `block_positions`. A group is the images that some documents
        see.
        """
        x = self.embed_tokens((left_ids - self.first_id).clamp(min=0))  # (B, L, D)
        placeholders = left_ids == self.vocabulary.image_token_id
        if len(tiles) or placeholders.any():  # tiles and placeholders that do not match raise
            x = put_image_tokens(x, placeholders, self.modality_projector(self.vision_encoder(tiles)))
        mask = left_mask(
            left_positions, left_groups, left_images, self.config.image_isolation, self.config.left_attention
        )
        if self.modality_projector.blank_tile and not len(tiles):
            x = x + blank(tiles, self.vision_encoder, self.modality_projector)
        positions = block_positions(left_groups, left_images, self.config.image_isolation)
        image_kv = self.decoder(x, positions, mask)
        return image_kv if self.bridge is None else self.bridge(image_kv)


def block_positions(groups: Tensor, images: Tensor, isolation: bool) -> Tensor:
    """Each left token's position in its block, counted from the block's own start; all (B, L).

    A block is what is encoded together: an image with isolation, else all of a group. So an image KV does not
    depend on where its image stands. Images A, B and C in two groups, then padding:

        image              A A A B B C C - -
        group              0 0 0 0 0 1 1 - -
        with isolation     0 1 2 0 1 0 1 0 1
        without            0 1 2 3 4 0 1 0 1
    """
    index = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    first = torch.ones_like(groups, dtype=torch.bool)
    first[:, 1:] = groups[:, 1:] != groups[:, :-1]
    if isolation:
        first[:, 1:] |= images[:, 1:] != images[:, :-1]
    return index - torch.where(first, index, 0).cummax(1).values


class DualTowerVLM(HubModel):
    """Every token goes through exactly one tower. Batch keys are forward's arguments: `model(**batch)`."""

    model_type = "dual_tower"

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
        """The parts with their own learning rates; together they hold every parameter once."""
        left = nn.ModuleList(filter(None, (self.left.embed_tokens, self.left.decoder, self.left.bridge)))
        return {
            "vision": self.left.vision_encoder,
            "projector": self.left.modality_projector,
            "left": left,
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
        """Tiles (N, 3, h, w) uint8, left stream (B, L), right stream (B, R).

        The table of batch keys is in docs/architecture.md.
        """
        left_kv = self.left(tiles, left_ids, left_positions, left_groups, left_images)
        read_kv = [left_kv[layer] for layer in self.config.left_layer_of]  # by each right layer
        hidden = self.right.forward_packed(
            read_kv, left_positions, left_groups, right_ids, right_positions, right_documents, right_groups
        )
        return self.right.output(hidden, labels, right_documents, self.heads)

    def embed(self, ids: Tensor, tiles: Tensor | None = None) -> Tensor:
        """Token ids (B, T) → embeddings of the right tower (B, T, D). `tiles` are for vanilla models only."""
        return self.right.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) → logits over the text vocabulary (…, V)."""
        return self.right.logits(hidden)

    @torch.inference_mode()
    def encode_images(
        self, tiles: Tensor, blocks: list[Tensor], image_numbers: list[Tensor] | None = None
    ) -> list[ImageKV]:
        """Image KVs of several image blocks.

        `tiles` (N, 3, h, w) uint8: of all blocks, in order. `blocks`: each block's token ids (T,). Without
        image isolation a block may hold several images and the tokens between them; then `image_numbers` (T,)
        are each token's image in its block (−1: none).
        """
        lengths = torch.tensor([len(block) for block in blocks], device=self.device)
        image_numbers = image_numbers or [torch.zeros_like(block) for block in blocks]
        padding_id = self.vocabulary.first_marker_id
        pad = nn.utils.rnn.pad_sequence
        ids = pad(blocks, batch_first=True, padding_value=padding_id).to(self.device)  # (B, L)
        numbers = pad(image_numbers, batch_first=True, padding_value=-1).to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        groups = torch.arange(len(blocks), device=self.device)[:, None].expand_as(ids)  # one per block
        groups = groups.masked_fill(positions >= lengths[:, None], -1)
        layers = self.left(tiles.to(self.device), ids, positions, groups, numbers)
        data = torch.stack([torch.stack(layer) for layer in layers])  # (layers, 2, B, G, L, E)
        return [ImageKV(data[:, :, b, :, :n].clone()) for b, n in enumerate(lengths.tolist())]

    def encode_image(self, tiles: Tensor, block: Tensor) -> ImageKV:
        """Image KV of one image: its tiles (n, 3, h, w) uint8 and its block's token ids (T,)."""
        return self.encode_images(tiles, [block])[0]
