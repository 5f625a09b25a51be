"""The right tower: a language model over text tokens that attends to image KV."""

from torch import Tensor

from models.kv_cache import ImageContext
from models.language_model import LanguageModel
from models.layers import Rotary
from models.masks import right_mask


class DualLanguageModel(LanguageModel):
    """A `LanguageModel` that also reads image KV. It has no weights of its own."""

    def forward_packed(
        self,
        image_kv: list[tuple[Tensor, Tensor]],
        left_positions: Tensor,
        left_groups: Tensor,
        right_ids: Tensor,
        right_positions: Tensor,
        right_documents: Tensor,
        right_groups: Tensor,
    ) -> Tensor:
        """Packed text rows, with the left stream's keys and values → hidden states (B, R, D).

        `image_kv`: for each of its layers, the unrotated keys and values that it reads (B, G, L, E). Other
        arguments as in the batch.
        """
        mask = right_mask(right_positions, right_documents, right_groups, left_positions, left_groups)
        kv_source = ImageContext(image_kv, Rotary.at(left_positions, self.config))
        return self(self.embed_tokens(right_ids), right_positions, mask, kv_source)
