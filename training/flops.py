"""FLOPs of a model: the matrix products of its forward and backward, two per multiply-add."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.model import DecoderConfig, ModelConfig


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of the matrix products. Nothing else is counted."""

    tile: int  # vision encoder and projector, one tile
    left_token: int  # left decoder, one token; without attention scores
    right_token: int
    supervised_token: int  # its logits
    left_pair: int  # attention, all layers: one query and one key
    right_pair: int

    def forward(self, batch: dict[str, Tensor]) -> int:
        """FLOPs of one batch without gradients; attention runs over whole rows."""
        (B, L), R = batch["left_ids"].shape, batch["right_ids"].shape[1]
        left = L * (self.left_token + L * self.left_pair)
        right = R * (self.right_token + (L + R) * self.right_pair)
        supervised = int((batch["labels"] != -100).sum())
        return len(batch["tiles"]) * self.tile + B * (left + right) + supervised * self.supervised_token

    def training(self, counts: Mapping[str, float], trained: dict[str, float]) -> float:
        """FLOPs of forward and backward as they are computed: the logits twice."""
        return self.model_flops(counts, trained) + counts["supervised"] * self.supervised_token

    def model_flops(self, counts: Mapping[str, float], trained: dict[str, float]) -> float:
        """FLOPs of forward and backward without recomputation; attention over what each query sees.

        `counts`: those of `trainer.batch_counts`. `trained`: part → trained share of its matrices. The
        backward of a trained part costs two forwards, that of a frozen part one if gradients flow through it.
        """
        left = trained.get("left", 0.0)
        before_right = bool(trained["vision"] or trained["projector"] or left)
        return (
            counts["tiles"] * self.tile * (3.0 if trained["vision"] else 1.0)
            + counts["left"] * self.left_token * (1 + before_right + left)
            + counts["left_pairs"] * self.left_pair * (3 if before_right else 1)
            + counts["right"] * self.right_token * (2 + trained["right"])
            + counts["right_pairs"] * self.right_pair * 3
            + counts["supervised"] * self.supervised_token * (2 + (trained["right"] == 1))
        )


def trained_shares(model: Any) -> dict[str, float]:
    """Part → trained share of its matrices: 0 if it is frozen, small if it has adapters."""
    shares = {}
    for name, part in model.parts().items():
        matrices = [m.weight for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        shares[name] = sum(w.numel() for w in matrices if w.requires_grad) / sum(w.numel() for w in matrices)
    return shares


def count_flops(model: Any) -> Flops:
    """Count FLOPs from shapes alone, so the model may be on the meta device.

    Torch's counter counts vision encoder and projector.
    """
    c: ModelConfig = model.config
    encoder, projector = model.parts()["vision"], model.parts()["projector"]
    side, device = c.vision.image_size, next(encoder.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(encoder.encode(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)))

    def token(layers: nn.Module) -> int:
        return 2 * sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))

    def pair(decoder: DecoderConfig, layers: int) -> int:
        return 4 * decoder.heads * decoder.head_size * layers

    has_left = "left" in c.towers
    return Flops(
        tile=counter.get_total_flops(),
        left_token=token(model.left.decoder) if has_left else 0,
        right_token=token(model.right.layers),
        supervised_token=2 * model.right.unembedding.numel(),
        left_pair=pair(c.left, c.left.layers - 1) if has_left else 0,
        right_pair=pair(c.right, c.right.layers),
    )
