"""Vision features → image tokens in the left decoder's space."""

from collections.abc import Callable

from torch import Tensor, nn

from configs.model import ProjectorConfig
from utils.errors import UsageError, nearest


def linear(width: int, hidden_size: int) -> nn.Module:
    return nn.Linear(width, hidden_size, bias=False)


def mlp(width: int, hidden_size: int) -> nn.Module:
    """Two layers with GELU between them (LLaVA 1.5, arXiv 2310.03744)."""
    return nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


# (features of an image token, hidden size of the left decoder) → module. Add yours here.
PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": linear, "mlp": mlp}


def check_kind(config: ProjectorConfig) -> str:
    """Return the projector's kind, or raise `UsageError` where it is unknown."""
    if config.kind not in PROJECTORS:
        raise UsageError(
            f"model.projector.kind = '{config.kind}' is unknown{nearest(config.kind, list(PROJECTORS))}"
        )
    return config.kind


class ModalityProjector(nn.Module):
    """Pixel shuffle (arXiv 1609.05158, inverted: space to depth), an optional norm, one of `PROJECTORS`."""

    blank_tile = False  # batches without images go through encoder and projector, too (`blank`)

    def __init__(self, config: ProjectorConfig, features: int, hidden_size: int) -> None:
        super().__init__()
        self.shuffle = config.pixel_shuffle
        width = features * self.shuffle**2
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.proj = PROJECTORS[check_kind(config)](width, hidden_size)
        for layer in self.proj.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) → (N, P, D), image tokens row by row."""
        s = self.shuffle
        N, C, h, w = features.shape
        x = features.reshape(N, C, h // s, s, w // s, s)  # blocks of s × s features
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(N, h // s * (w // s), s * s * C)  # (N, P, s·s·C)
        return self.proj(self.norm(x))


def blank(tiles: Tensor, encoder: nn.Module, projector: nn.Module) -> Tensor:
    """Zero, computed through encoder and projector, for a batch without `tiles` (0, 3, h, w).

    So all their parameters get gradients, as on ranks whose batches have images.
    """
    zero: Tensor = 0 * projector(encoder(tiles.new_zeros(1, *tiles.shape[1:]))).sum()
    return zero


def put_image_tokens(x: Tensor, placeholders: Tensor, image_tokens: Tensor) -> Tensor:
    """Replace embeddings of `x` (B, T, D) by `image_tokens` (N, P, D), in order, where `placeholders` (B, T).

    `ValueError` where their numbers differ.
    """
    needed, given = int(placeholders.sum()), image_tokens.shape[0] * image_tokens.shape[1]
    if needed != given:
        raise ValueError(
            f"{needed} image placeholders, but {len(image_tokens)} tiles make {given} image tokens"
        )
    return x.masked_scatter(placeholders[..., None], image_tokens.flatten(0, 1).to(x.dtype))
