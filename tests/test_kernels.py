"""Every kernel against its plain form, and the seam that chooses them."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from configs.model import DecoderConfig
from models.kernels import KERNELS, find_kernel, flex_attention, in_use, segment_attention, use_kernels
from models.kernels.flex_attention import FlexLayout
from models.kernels.packed_block import PackedBlock, PackedLinear, pack_blocks
from models.kernels.rms_norm import TrainedRMSNorm
from models.kernels.segment_attention import BlockSparseLayout
from models.kernels.swiglu import RecomputedSwiGLU
from models.kv_cache import DecodingCache
from models.language_model import LanguageModel
from models.layers import RMSNorm, attention, swiglu
from models.masks import NEVER, Mask, cache_mask, left_mask, right_mask


def as_mask(dense: torch.Tensor) -> Mask:
    """A mask (B, 1, T, S) as the core's masks are given."""
    return Mask(lambda query, key: dense[:, 0], (), ())


def segments_of(dense: torch.Tensor, kv_heads: int) -> BlockSparseLayout:
    return BlockSparseLayout(as_mask(dense), kv_heads)


def packed_mask(lengths: list[list[int]], left: int = 0) -> torch.Tensor:
    """The mask (B, 1, T, left + T) of causal documents of these lengths, in padded rows.

    Each document also attends to its share of `left` keys in front.
    """
    T = max(map(sum, lengths))
    mask = torch.zeros(len(lengths), 1, T, left + T, dtype=torch.bool)
    for row, documents in enumerate(lengths):
        padding = T - sum(documents)
        start = 0
        for number, length in enumerate([*documents, padding] if padding else documents):
            mask[row, 0, start : start + length, left + start : left + start + length] = (
                torch.ones(length, length).tril().bool()
            )
            share = left // len(documents)
            mask[row, 0, start : start + length, number * share : (number + 1) * share] = True
            start += length
    return mask


@pytest.mark.parametrize(
    ("lengths", "left", "heads"),
    [
        ([[5, 9, 3]], 0, (4, 2)),
        ([[20], [3, 3, 1]], 0, (3, 3)),
        ([[4, 8], [7, 2]], 40, (6, 2)),
        ([[1]], 0, (2, 1)),
        ([[1, 1, 1, 17], [2, 2, 15], [30]], 6, (4, 1)),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 100.0])  # every length for itself, all together
def test_spans_give_what_the_whole_mask_gives(monkeypatch, lengths, left, heads, spread):
    for name, value in (("MAX_QUERIES", 4), ("ALIGNED", 3), ("SPREAD", spread)):
        monkeypatch.setattr(segment_attention, name, value)
    torch.manual_seed(0)
    mask, (H, G), E = packed_mask(lengths, left), heads, 8
    B, _, T, S = mask.shape
    inputs = [
        torch.randn(B, n, s, E, dtype=torch.float64, requires_grad=True) for n, s in ((H, T), (G, S), (G, S))
    ]
    layout = segments_of(mask, G)
    assert len(layout.segments) == 1 or spread == 1.0
    out = attention(*inputs, layout)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=H != G)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_span_is_whole_documents_or_an_equal_part_of_a_long_one(monkeypatch):
    monkeypatch.setattr(segment_attention, "MAX_QUERIES", 4)
    seen = packed_mask([[2, 1, 1, 2, 3, 10, 1, 4]])[0, 0].numpy()
    assert segment_attention._split_queries(seen) == [
        (0, 4),
        (4, 6),
        (6, 9),
        (9, 12),
        (12, 15),
        (15, 19),
        (19, 20),
        (20, 24),
    ]


def test_a_key_is_added_up_as_often_as_it_is_seen(monkeypatch):
    """A key's gradient is summed over all segments of queries that attend to it.

    A document of 20 in parts of 4: five parts attend to the first part's keys, one to the last part's. In the
    other row one part attends to each key.
    """
    monkeypatch.setattr(segment_attention, "MAX_QUERIES", 4)
    layout = segments_of(packed_mask([[20], [4] * 5]), 3)
    assert layout.key_slots.unique().numel() == 2 * 20 * 3
    assert [sorted({row // 3 for row in rows.tolist()}) for rows, _ in layout.more_keys] == [
        list(range(n)) for n in (16, 12, 8, 4)
    ]


def test_keys_that_nobody_sees_have_no_gradient_and_an_empty_batch_works():
    torch.manual_seed(0)
    mask = packed_mask([[3, 2]], left=4)
    mask[..., :2] = False
    inputs = [torch.randn(1, n, s, 4, requires_grad=True) for n, s in ((2, 5), (1, 9), (1, 9))]
    _, keys, values = torch.autograd.grad(attention(*inputs, segments_of(mask, 1)).sum(), inputs)
    assert (
        not keys[:, :, :2].any()
        and not values[:, :, :2].any()
        and keys[:, :, 2:].any()
        and values[:, :, 2:].any()
    )
    nothing = [torch.randn(2, n, 0, 4, requires_grad=True) for n in (2, 1, 1)]
    out = attention(*nothing, segments_of(torch.ones(2, 1, 0, 0, dtype=torch.bool), 1))
    assert out.shape == (2, 2, 0, 4) and [g.shape for g in torch.autograd.grad(out.sum(), nothing)] == [
        x.shape for x in nothing
    ]


def test_one_plan_serves_two_types():
    layout = segments_of(packed_mask([[3, 2]]), 1)
    for dtype in (torch.float32, torch.float64, torch.float32):
        inputs = [torch.ones(1, n, 5, 4, dtype=dtype) for n in (2, 1, 1)]
        assert attention(*inputs, layout).dtype == dtype


def test_spans_leave_out_what_nobody_sees():
    layout = segments_of(packed_mask([[300] * 6]), 1)
    scores = sum(segments.masked.numel() for segments in layout.segments)
    assert scores < 0.15 * 1800 * 1800
    left = segments_of(packed_mask([[300] * 6], left=1200), 1)
    scores = sum(segments.masked.numel() for segments in left.segments)
    assert scores < 0.19 * 1800 * 3000  # its image, its own text


@pytest.fixture
def plain_flex(monkeypatch):
    """FlexAttention as plain operations: kernels for a CPU would take a minute to compile."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    monkeypatch.setattr(flex_attention, "compiled_flex", lambda: flex)


def random_batch(seed: int, left_length: int, right_length: int, rows: int = 3) -> dict[str, torch.Tensor]:
    """The fields of a packed batch from which masks are made.

    Groups of images, each with documents that may share it, and padding.
    """
    draw = random.Random(seed)
    batch: dict[str, list[list[int]]] = {name: [] for name in FIELDS}
    for _ in range(rows):
        left: list[tuple[int, ...]] = []
        right: list[tuple[int, ...]] = []
        document = 0
        for group in range(draw.randint(1, 4)):
            tokens = draw.randint(1, left_length // 5)
            left += [(at, group, group) for at in range(tokens)]
            for _ in range(draw.randint(1, 2)):
                right += [(tokens + at, document, group) for at in range(draw.randint(1, right_length // 9))]
                document += 1
        left += [(0, -1, -1)] * (left_length - len(left))
        right += [(0, -1, -1)] * (right_length - len(right))
        for name, column in zip(FIELDS, [*zip(*left, strict=True), *zip(*right, strict=True)], strict=True):
            batch[name].append(list(column))
    return {name: torch.tensor(columns) for name, columns in batch.items()}


FIELDS = (
    "left_positions",
    "left_groups",
    "left_images",
    "right_positions",
    "right_documents",
    "right_groups",
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("left", "right"), [(40, 60), (300, 200), (128, 256)])
def test_flex_gives_what_the_whole_mask_gives(plain_flex, left, right):
    """FlexAttention's forward equals attention with the whole mask.

    Forward only, for FlexAttention has no backward on a CPU. Both towers, rows whose lengths are not
    multiples of its blocks, and grouped keys. Its mask equals that of models/masks.py, pair by pair.
    """
    torch.manual_seed(0)
    b = random_batch(left, left, right)
    masks_of = {
        "left": left_mask(b["left_positions"], b["left_groups"], b["left_images"], True, "causal"),
        "right": right_mask(
            b["right_positions"],
            b["right_documents"],
            b["right_groups"],
            b["left_positions"],
            b["left_groups"],
        ),
    }
    for rule in masks_of.values():
        mask, layout = rule.dense(), FlexLayout(rule, 2)
        B, _, T, S = mask.shape
        every = torch.meshgrid(torch.arange(B), torch.arange(T), torch.arange(S), indexing="ij")
        assert torch.equal(layout.blocks.mask_mod(every[0], torch.tensor(0), every[1], every[2]), mask[:, 0])
        whole = (
            F.pad(mask[:, 0], (0, -S % 128, 0, -T % 128))
            .unflatten(2, (-1, 128))
            .unflatten(1, (-1, 128))
            .any(4)
            .any(2)
        )  # blocks of which something is seen
        assert torch.equal(layout.blocks.to_dense()[:, 0].bool(), whole)
        queries, keys, values = torch.randn(B, 6, T, 16), torch.randn(B, 2, S, 16), torch.randn(B, 2, S, 16)
        with torch.no_grad():
            expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(
                attention(queries, keys, values, layout), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_prefills_rows_of_different_lengths(plain_flex):
    """Prompts padded on the right, behind image KVs of different lengths, with free slots between them."""
    torch.manual_seed(0)
    prompts, images, T, slots = [300, 130, 1], [40, 0, 170], 300, 33
    positions = torch.zeros(3, T, dtype=torch.int64)
    keys_at = torch.full((3, 170 + T + slots), NEVER)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        positions[row, :prompt] = image + torch.arange(prompt)
        keys_at[row, :image] = torch.arange(image)
        keys_at[row, 170 : 170 + prompt] = positions[row, :prompt]
    mask, S = cache_mask(positions, keys_at), keys_at.shape[1]
    queries, keys, values = torch.randn(3, 6, T, 16), torch.randn(3, 2, S, 16), torch.randn(3, 2, S, 16)
    with torch.no_grad():
        expected = attention(queries, keys, values, mask.dense())
        actual = attention(queries, keys, values, FlexLayout(mask, 2))
    assert actual.isfinite().all()  # padding, too, although nobody reads it
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(actual[row, :, :prompt], expected[row, :, :prompt], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_gives_no_nan_to_a_query_that_sees_nothing(plain_flex):
    positions, keys_at = torch.tensor([[0, 7]]), torch.tensor([[5, NEVER, 6]])
    layout = FlexLayout(cache_mask(positions, keys_at), 1)
    queries, keys = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 3, 16)
    with torch.no_grad():
        out = attention(queries, keys, keys, layout)
    assert out[0, 0, 0].eq(0).all() and out[0, 0, 1].isfinite().all()


def test_the_seam_chooses(monkeypatch, restored_kernels):
    """Segments in training on a CPU, FlexAttention on CUDA with its compiler, else the plain form.

    Without gradients FlexAttention is for validation and large prefills: many tokens, in long rows.
    """
    x, on_gpu = torch.empty(0), SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 64))
    monkeypatch.setattr(flex_attention, "find_spec", lambda name: name == "triton")
    assert find_kernel("attention", on_gpu) is FlexLayout
    with torch.no_grad():
        for B, T, kernel in ((16, 128, FlexLayout), (1, 4096, FlexLayout), (1, 900, None), (1024, 5, None)):
            on_gpu.shape = (B, T, 64)
            assert find_kernel("attention", on_gpu) is kernel
    monkeypatch.setattr(flex_attention, "find_spec", lambda name: None)
    assert find_kernel("attention", on_gpu) is None
    monkeypatch.undo()
    assert find_kernel("attention", x) is BlockSparseLayout
    with torch.no_grad():
        assert find_kernel("attention", x) is None
    use_kernels("plain")
    assert all(find_kernel(operation, x) is None for operation in KERNELS)
    assert not in_use(PackedBlock, x)
    use_kernels([FlexLayout])
    assert find_kernel("attention", x) is None
    use_kernels([BlockSparseLayout])
    assert find_kernel("attention", x) is BlockSparseLayout


def test_span_attention_has_the_right_gradient():
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, 5, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, segments_of(packed_mask([[2, 3]]), 1)), inputs)


TINY = DecoderConfig(layers=2, hidden_size=48, heads=4, kv_heads=2, head_size=12, mlp_size=96)
DECODERS = {
    "as it is": TINY,
    "biases": replace(TINY, qkv_bias=True),
    "norms on heads": replace(TINY, qk_norm=True),
    "layers without rotary embedding": replace(TINY, no_rope_interval=2),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_packed_blocks_compute_what_blocks_compute(decoder, monkeypatch):
    """Over a cache with rows of different lengths, four tokens each; and without a cache, as in training.

    In fp32, whose rounding hides nothing. Norms and biases are not trivial.
    """
    torch.manual_seed(0)
    model = LanguageModel(decoder, 40).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.5 if p.dim() == 1 else 0.1))
    products: list[int] = []
    product = PackedLinear.__call__
    monkeypatch.setattr(PackedLinear, "__call__", lambda self, x: products.append(1) or product(self, x))
    lengths = torch.tensor([7, 3])
    before = torch.where(torch.arange(7) < lengths[:, None], torch.arange(7), torch.iinfo(torch.int64).max)
    positions, x = lengths[:, None] + torch.arange(4), torch.randn(2, 4, 48)
    earlier = torch.randn(2, 7, 48)
    outputs = []
    for packed in (False, True):
        if packed:
            for block in model.layers:
                block.forward = PackedBlock(block)
        cache = DecodingCache(2, 2, 2, 11, 12, torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            for part, at in ((earlier, before), (x, positions)):
                cache.reserve(at)
                mask = cache_mask(at.clamp(max=99), cache.positions[:, : cache.used])
                hidden = model(part, at.clamp(max=99), mask, cache)
            outputs.append((hidden, model(x, positions, cache_mask(positions, positions))))
        assert bool(products) == packed
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="packed"):
        model.train()(x, positions, cache_mask(positions, positions))


def test_packed_blocks_follow_their_weights_and_the_mode(restored_kernels, monkeypatch):
    """Changed weights are packed again, a copied model has its own, and `plain` needs no other model."""
    torch.manual_seed(0)
    model = LanguageModel(TINY, 40).eval()
    pack_blocks(model)
    assert all(isinstance(block.forward, PackedBlock) for block in model.layers)
    x, positions = torch.randn(1, 3, TINY.hidden_size), torch.arange(3)[None]

    def run(model: LanguageModel) -> torch.Tensor:
        cache = DecodingCache(
            TINY.layers, 1, TINY.kv_heads, 3, TINY.head_size, torch.float32, torch.device("cpu")
        )
        cache.reserve(positions)
        with torch.inference_mode():
            return model(x, positions, cache_mask(positions, cache.positions), cache)

    def plain(model: LanguageModel) -> torch.Tensor:
        use_kernels("plain")
        try:
            with monkeypatch.context() as patch:
                patch.setattr(PackedLinear, "__call__", None)  # must not be called
                return run(model)
        finally:
            use_kernels("auto")

    before = run(model)
    torch.testing.assert_close(before, plain(model), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    assert not torch.allclose(run(model), before, atol=1e-3)
    torch.testing.assert_close(run(model), plain(model), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        frozen = LanguageModel(TINY, 40).eval()
    pack_blocks(frozen)
    torch.testing.assert_close(run(frozen), plain(frozen), atol=1e-5, rtol=1e-5)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.layers[0].mlp.down_proj.weight.zero_()
    assert not torch.allclose(run(copied), run(model), atol=1e-3)
    torch.testing.assert_close(run(copied), plain(copied), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_row_does_not_depend_on_the_others(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 instructions")
    torch.manual_seed(0)
    packed, x = PackedLinear(torch.nn.Linear(48, 96).to(dtype)), torch.randn(32, 48).to(dtype)
    assert all(torch.equal(packed(x[:n]), packed(x)[:n]) for n in (1, 2, 5, 8, 17))


@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (1, 3, 2, 24)])
def test_the_norms_gradient(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.empty(24, dtype=torch.float64).uniform_(-2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: TrainedRMSNorm.apply(x, w, 1e-5), (x, weight))
    torch.testing.assert_close(
        TrainedRMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_norm_in_training(autocast, frozen, restored_kernels):
    """Results and gradients are as accurate as the plain form's, against double precision.

    With tiny and huge rows too. The result has autocast's type, each gradient its tensor's type.
    """
    torch.manual_seed(0)
    norm, dtype = RMSNorm(576, 1e-5), torch.bfloat16 if autocast else torch.float32
    norm.weight.data.uniform_(-2, 2)
    norm.weight.requires_grad_(not frozen)
    x = (torch.randn(200, 576) * torch.logspace(-6, 6, 200)[:, None]).requires_grad_()
    upstream = torch.randn(200, 576).to(dtype)

    def run(kernels):
        use_kernels(kernels)
        norm.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = norm(x)
        assert out.dtype == dtype
        out.backward(upstream)
        return [out.detach(), x.grad, norm.weight.grad]

    ours, plain = run("auto"), run("plain")
    double = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    exact = F.rms_norm(double[0], (576,), double[1], 1e-5)
    exact.backward(upstream.double())
    for mine, other, best in zip(ours, plain, [exact.detach(), *(t.grad for t in double)], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            assert distance(mine, best) <= 1.1 * distance(other, best) + 3e-7  # of fp32's rounding


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the whole tensors, in units of `b`'s length."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_core_asks_for_its_kernels(restored_kernels, monkeypatch):
    """Norms, SwiGLU and attention in training are computed by their kernels; in plain mode, by none."""
    called: list[str] = []
    for kernel in (TrainedRMSNorm, RecomputedSwiGLU):
        original = kernel.apply
        name = kernel.__name__
        monkeypatch.setattr(kernel, "apply", lambda *a, o=original, n=name: called.append(n) or o(*a))
    attend = BlockSparseLayout.attend
    monkeypatch.setattr(
        BlockSparseLayout, "attend", lambda self, *a: called.append("attention") or attend(self, *a)
    )
    model, positions = LanguageModel(TINY, 40), torch.arange(6)[None]
    mask = right_mask(positions, positions * 0, positions * 0, positions[:, :0], positions[:, :0])
    model(torch.randn(1, 6, TINY.hidden_size), positions, mask).sum().backward()
    assert set(called) == {"TrainedRMSNorm", "RecomputedSwiGLU", "attention"}
    called.clear()
    use_kernels("plain")
    model(torch.randn(1, 6, TINY.hidden_size), positions, mask).sum().backward()
    assert not called


def test_swiglu_is_the_plain_one(restored_kernels):
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(RecomputedSwiGLU.apply, (gate, up))
    ours = swiglu(gate, up)
    use_kernels("plain")
    torch.testing.assert_close(ours, swiglu(gate, up), rtol=1e-12, atol=1e-12)
