"""Linear layers and norms of training on a CPU.

They are compared with PyTorch's plain operations in double precision, and with its own in bf16.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from configs.model import VisionConfig
from models.kernels import linear
from models.kernels.linear import Linear, product
from models.layers import Gated, RMSNorm, TrainedNorm
from models.vision_encoder import VisionEncoder


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the whole tensors, in units of `b`'s length."""
    return float((a.double() - b.double()).norm() / b.double().norm())


SHAPES = [
    (1008, 576, 576),
    (714, 1536, 576),
    (1176, 768, 768),
    (1000, 520, 601),
    (33, 40, 700),
    (1008, 576, 192),
    (600, 512, 300),
]


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_product(monkeypatch, M, K, N, bias):
    """The whole product, and in halves of the rows or of the columns.

    No half is left out, and none is rounded more than PyTorch's whole product.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    a, b, c = (
        torch.randn(M, K).bfloat16(),
        torch.randn(N, K).bfloat16().t(),
        torch.randn(N).bfloat16() if bias else None,
    )
    expected = a.double() @ b.double() + (0 if c is None else c.double())
    out = product(a, b, c)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=0.05)
    assert distance(out, expected) < 2**-8


def test_products_are_halved_where_that_helps(monkeypatch):
    whole = {(M, K, N): torch.ones(M, K).bfloat16() @ torch.ones(K, N).bfloat16() for M, K, N in SHAPES}
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "mm", None)
    for M, K, N in SHAPES:
        product(torch.ones(M, K).bfloat16(), torch.ones(K, N).bfloat16())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: products.append((len(a), b.shape[1])) or mm(a, b, out=out)
    )
    halves = {}
    for M, K, N in SHAPES:
        products.clear()
        assert torch.equal(product(torch.ones(M, K).bfloat16(), torch.ones(K, N).bfloat16()), whole[M, K, N])
        halves[M, K, N] = list(products)
    assert halves == {
        (1008, 576, 576): [(1008, 288)] * 2,
        (714, 1536, 576): [(384, 576), (330, 576)],
        (1176, 768, 768): [(608, 768), (568, 768)],
        (1000, 520, 601): [(1000, 300), (1000, 301)],
        (33, 40, 700): [],
        (1008, 576, 192): [(1008, 96)] * 2,
        (600, 512, 300): [(600, 150)] * 2,
    }


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 576), (96, 640), (640, 96)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needed", ["all", "input", "weight"])
def test_a_linear_layer_in_training(inputs, outputs, bias, needed):
    """Forward and every gradient are as accurate as PyTorch's own under autocast.

    Accuracy is measured against double precision. Each gradient has its tensor's type; frozen tensors get
    none.
    """
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, bias=bias)
    x, upstream = torch.randn(2, 300, inputs), torch.randn(2, 300, outputs).bfloat16()
    x.requires_grad_(needed != "weight")
    layer.requires_grad_(needed != "input")

    def run(forward):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = forward()
        assert out.dtype == torch.bfloat16 and out.shape == upstream.shape
        out.backward(upstream)
        return [out.detach(), *(t.grad for t in (x, *layer.parameters()))]

    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        ours = run(lambda: layer(x))
    assert saved == [
        shape
        for shape, of in (((600, inputs), "weight"), ((outputs, inputs), "input"))
        if needed in (of, "all")
    ]  # what nobody needs is not saved
    theirs = run(lambda: F.linear(x, layer.weight, layer.bias))
    double = [
        t.detach().bfloat16().double().requires_grad_(t.requires_grad) for t in (x, *layer.parameters())
    ]
    exact = F.linear(*double)
    exact.backward(upstream.double())
    for mine, other, best in zip(ours, theirs, [exact.detach(), *(t.grad for t in double)], strict=True):
        assert (mine is None) == (other is None) == (best is None)
        if mine is not None:
            assert mine.dtype == other.dtype and mine.shape == other.shape
            assert distance(mine, best) <= 1.1 * distance(other, best) < 2**-7


def test_a_linear_layer_elsewhere_is_torchs(monkeypatch):
    """In fp32, and where nothing is trained: to the bit, and by torch's function."""
    monkeypatch.setattr(linear.TrainedLinear, "apply", None)
    layer, x = Linear(8, 4), torch.randn(3, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(TypeError), torch.autocast("cpu", torch.bfloat16):
        layer(x)


def test_an_encoders_linear_layers_are_these():
    """The same numbers as timm's model, whose other parts stay what they are."""
    name = "vit_base_patch16_siglip_224"
    options = '{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}'
    encoder = VisionEncoder(VisionConfig(name, "random", image_size=32, grid=4, options=options))
    kinds = {type(m) for m in encoder.backbone.modules() if isinstance(m, nn.Linear)}
    assert kinds == {Linear}
    own = timm.create_model(name, img_size=32, embed_dim=32, depth=2, num_heads=2, patch_size=8).eval()
    own.load_state_dict(encoder.backbone.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 32, 32)
    theirs = own.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(
        encoder.backbone.forward_intermediates(pixels, indices=[1], norm=False, intermediates_only=True)[0],
        theirs,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (1, 3, 2, 24)])
def test_the_norms_gradient(shape):
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-5).double()
    norm.weight.data.uniform_(-2, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: TrainedNorm.apply(x, w, 1e-5, torch.float64), (x, norm.weight)
    )
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_norm_in_training(dtype, frozen):
    """Under autocast, results and gradients are as accurate as PyTorch's own.

    Accuracy is measured against double precision, with tiny and huge rows too. The result has autocast's
    type, each gradient its tensor's type.
    """
    torch.manual_seed(0)
    norm = RMSNorm(576, 1e-5)
    norm.weight.data.uniform_(-2, 2)
    norm.weight.requires_grad_(not frozen)
    x = (torch.randn(200, 576) * torch.logspace(-6, 6, 200)[:, None]).requires_grad_()
    upstream = torch.randn(200, 576).to(dtype)

    def run(forward):
        norm.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = forward()
        assert out.dtype == dtype
        out.backward(upstream)
        return [out.detach(), x.grad, norm.weight.grad]

    ours, theirs = run(lambda: norm(x)), run(lambda: F.rms_norm(x, (576,), norm.weight, 1e-5).to(dtype))
    double = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    exact = F.rms_norm(double[0], (576,), double[1], 1e-5)
    exact.backward(upstream.double())
    for mine, other, best in zip(ours, theirs, [exact.detach(), *(t.grad for t in double)], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            scale = best.abs().amax(-1, keepdim=True)
            assert ((mine.double() - best) / scale).abs().max() <= 2 * max(
                ((other.double() - best) / scale).abs().max(), 2**-21
            )


def test_a_gated_product():
    """As torch's plain operations give it, and its gradient; to the bit in bf16."""
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))
    torch.testing.assert_close(Gated.apply(gate, up), F.silu(gate) * up, rtol=1e-15, atol=0)
    inputs, upstream = (
        [torch.randn(40, 64).bfloat16().requires_grad_() for _ in range(2)],
        torch.randn(40, 64).bfloat16(),
    )
    ours, theirs = (
        [out, *torch.autograd.grad(out, inputs, upstream)]
        for out in (Gated.apply(*inputs), F.silu(inputs[0]) * inputs[1])
    )
    assert all(map(torch.equal, ours, theirs))
