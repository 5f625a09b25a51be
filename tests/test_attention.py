"""Attention by spans and the chunked loss, against PyTorch's plain operations in double precision."""

import random
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from models import losses
from models.kernels import attention
from models.kernels.attention import (
    BlockSparseLayout,
    SegmentAttention,
    attend,
    attention_layout,
    flex_block_mask,
)
from models.losses import cross_entropy
from models.masks import left_mask, right_mask


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
        monkeypatch.setattr(attention, name, value)
    torch.manual_seed(0)
    mask, (H, G), E = packed_mask(lengths, left), heads, 8
    B, _, T, S = mask.shape
    inputs = [
        torch.randn(B, n, s, E, dtype=torch.float64, requires_grad=True) for n, s in ((H, T), (G, S), (G, S))
    ]
    layout = attention_layout(mask, G)
    assert isinstance(layout, BlockSparseLayout) and (len(layout.segments) == 1 or spread == 1.0)
    out = attend(*inputs, layout)
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
    monkeypatch.setattr(attention, "MAX_QUERIES", 4)
    seen = packed_mask([[2, 1, 1, 2, 3, 10, 1, 4]])[0, 0].numpy()
    assert attention._split_queries(seen) == [
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
    monkeypatch.setattr(attention, "MAX_QUERIES", 4)
    layout = attention_layout(packed_mask([[20], [4] * 5]), 3)
    assert isinstance(layout, BlockSparseLayout)
    assert layout.key_slots.unique().numel() == 2 * 20 * 3
    assert [sorted({row // 3 for row in rows.tolist()}) for rows, _ in layout.more_keys] == [
        list(range(n)) for n in (16, 12, 8, 4)
    ]


def test_keys_that_nobody_sees_have_no_gradient_and_an_empty_batch_works():
    torch.manual_seed(0)
    mask = packed_mask([[3, 2]], left=4)
    mask[..., :2] = False
    inputs = [torch.randn(1, n, s, 4, requires_grad=True) for n, s in ((2, 5), (1, 9), (1, 9))]
    _, keys, values = torch.autograd.grad(attend(*inputs, attention_layout(mask, 1)).sum(), inputs)
    assert (
        not keys[:, :, :2].any()
        and not values[:, :, :2].any()
        and keys[:, :, 2:].any()
        and values[:, :, 2:].any()
    )
    nothing = [torch.randn(2, n, 0, 4, requires_grad=True) for n in (2, 1, 1)]
    out = attend(*nothing, attention_layout(torch.ones(2, 1, 0, 0, dtype=torch.bool), 1))
    assert out.shape == (2, 2, 0, 4) and [g.shape for g in torch.autograd.grad(out.sum(), nothing)] == [
        x.shape for x in nothing
    ]


def test_one_plan_serves_two_types():
    layout = attention_layout(packed_mask([[3, 2]]), 1)
    for dtype in (torch.float32, torch.float64, torch.float32):
        inputs = [torch.ones(1, n, 5, 4, dtype=dtype) for n in (2, 1, 1)]
        assert attend(*inputs, layout).dtype == dtype


def test_spans_leave_out_what_nobody_sees():
    layout = attention_layout(packed_mask([[300] * 6]), 1)
    assert isinstance(layout, BlockSparseLayout)
    scores = sum(segments.masked.numel() for segments in layout.segments)
    assert scores < 0.15 * 1800 * 1800
    left = attention_layout(packed_mask([[300] * 6], left=1200), 1)
    assert (
        isinstance(left, BlockSparseLayout)
        and sum(segments.masked.numel() for segments in left.segments) < 0.19 * 1800 * 3000
    )  # its image, its own text


def test_spans_are_for_training_alone():
    with torch.no_grad():
        mask = packed_mask([[3]])
        assert attention_layout(mask, 1) is mask


@pytest.fixture
def plain_flex(monkeypatch):
    """FlexAttention as plain operations: kernels for a CPU would take a minute to compile."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "flex", lambda: flex_attention)


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
    for mask in masks_of.values():
        B, _, T, S = mask.shape
        layout = flex_block_mask(mask)
        every = torch.meshgrid(torch.arange(B), torch.arange(T), torch.arange(S), indexing="ij")
        assert torch.equal(layout.mask_mod(every[0], torch.tensor(0), every[1], every[2]), mask[:, 0])
        whole = (
            F.pad(mask[:, 0], (0, -S % 128, 0, -T % 128))
            .unflatten(2, (-1, 128))
            .unflatten(1, (-1, 128))
            .any(4)
            .any(2)
        )  # blocks of which something is seen
        assert torch.equal(layout.to_dense()[:, 0].bool(), whole)
        queries, keys, values = torch.randn(B, 6, T, 16), torch.randn(B, 2, S, 16), torch.randn(B, 2, S, 16)
        with torch.no_grad():
            expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(attend(queries, keys, values, layout), expected, rtol=1e-5, atol=1e-5)


def test_one_function_chooses(plain_flex, monkeypatch):
    """One function selects the form of attention.

    Spans on a CPU, blocks on CUDA if its compiler is installed, the mask itself elsewhere and without
    gradients.
    """
    mask = packed_mask([[3]])
    asked = Mock(spec=torch.Tensor, device=torch.device("cuda"))
    monkeypatch.setattr(attention, "flex_block_mask", lambda mask: "blocks")
    monkeypatch.setattr(attention, "find_spec", lambda name: name == "triton")
    assert isinstance(attention_layout(mask, 1), BlockSparseLayout) and attention_layout(asked, 1) == "blocks"
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert attention_layout(asked, 1) is asked
    with torch.no_grad():
        monkeypatch.undo()
        assert attention_layout(asked, 1) is asked and attention_layout(mask, 1) is mask


def test_span_attention_has_the_right_gradient():
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, 5, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    assert torch.autograd.gradcheck(
        lambda *x: SegmentAttention.apply(*x, attention_layout(packed_mask([[2, 3]]), 1)), inputs
    )


@pytest.mark.parametrize("chunk", [1, 3 * 50, 1 << 24])
def test_cross_entropy(monkeypatch, chunk):
    """Position by position, and its gradients where each position weighs differently."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 49, -100, 7, 7])
    loss = cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad((value * torch.arange(1, 8)).sum(), (hidden, weight))
        for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_cross_entropy_of_frozen_weights_and_of_nothing():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(50, 6)
    cross_entropy(hidden, weight, torch.tensor([1, 2, 3, -100])).sum().backward()
    assert hidden.grad is not None and not hidden.grad[3].any() and weight.grad is None
    weight.requires_grad_()
    loss = cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.long)).sum()
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any()


def test_cross_entropy_in_bf16_keeps_its_digits():
    """The sum is made in float32: of 300 losses of about 10, bf16 would keep two digits."""
    torch.manual_seed(0)
    hidden, weight, labels = (
        torch.randn(300, 64).bfloat16(),
        torch.randn(5000, 64).bfloat16() * 0.1,
        torch.randint(0, 5000, (300,)),
    )
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum").item()
    assert cross_entropy(hidden, weight, labels).sum().item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(hidden.float(), weight.float(), labels).sum().item() == pytest.approx(
            expected, rel=1e-4
        )
