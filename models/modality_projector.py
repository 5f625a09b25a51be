"""Vision features → image tokens in the left decoder's space."""

from torch import Tensor, nn


class ModalityProjector(nn.Module):
    """Pixel shuffle (space to depth; Shi et al., arXiv 1609.05158, run backwards), norm, linear.

    The norm is there because the feature levels of convolutional encoders come unnormalised.
    """

    def __init__(self, features: int, hidden_size: int, shuffle: int) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.norm = nn.LayerNorm(features * shuffle**2)
        self.proj = nn.Linear(features * shuffle**2, hidden_size, bias=False)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, height, width) → (N, P, D), image tokens row by row."""
        s = self.shuffle
        N, C, h, w = features.shape
        x = features.reshape(N, C, h // s, s, w // s, s)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(N, h // s * (w // s), s * s * C)  # (N, P, s·s·C)
        return self.proj(self.norm(x))
