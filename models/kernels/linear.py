"""Linear layers, faster in training on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn


def working_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products are computed in: autocast's where it is on, else `own`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own


class Linear(nn.Linear):
    """torch's linear layer; when training in bf16 on a CPU, its products are `product`'s."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == "cpu"
            and torch.is_grad_enabled()
            and working_dtype(x.dtype, x.device) == torch.bfloat16
        ):
            return TrainedLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class TrainedLinear(torch.autograd.Function):
    """Linear layer in bf16: x (…, inputs), weight (outputs, inputs). Gradients have their input's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, w = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(
            rows if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None
        )
        ctx.shape, ctx.types = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return product(rows, w.t(), None if bias is None else bias.bfloat16()).view(*x.shape[:-1], len(w))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, w = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        d_x = product(g, w).to(ctx.types[0]).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            # A copy saves a third of the time for 576 outputs and 1,536 inputs; the reverse is slower.
            transposed = g.t().contiguous() if g.shape[1] < rows.shape[1] else g.t()
            d_weight = (transposed @ rows).to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            d_bias = g.sum(0).to(ctx.types[2])
        return d_x, d_weight, d_bias


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a` (M, K) @ `b` (K, N) + `bias` (N,).

    With two threads (no other number was measured), oneDNN 3.13 computes some bf16 products in one of them:
    0.8 · N < M < 1,400 where N is small. Computed as two halves they use both. Rows are halved where that
    leaves the slow range, else columns (docs/log/experiments.md).
    """
    (M, K), N = a.shape, b.shape[1]
    min_rows = 0.8 * N
    if not (min_rows < M < 1400 and N <= 1024 and K >= 512 and torch.get_num_threads() == 2):
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out, half = a.new_empty(M, N), -(-M // 64) * 32
    by_rows = [(slice(half), slice(N)), (slice(half, M), slice(N))]
    by_columns = [(slice(M), slice(N // 2)), (slice(M), slice(N // 2, N))]
    for rows, columns in by_rows if half < min_rows else by_columns:
        if bias is None:
            torch.mm(a[rows], b[:, columns], out=out[rows, columns])
        else:
            torch.addmm(bias[columns], a[rows], b[:, columns], out=out[rows, columns])
    return out
