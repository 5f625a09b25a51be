"""Properties of the loss mask, packing, masks, spans and tiles, against their plain definitions."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.model import MAX_GRID, VisionConfig
from data.datasets import Sample
from data.images import grid_of, tile_count, to_tiles
from data.packing import Budget, RowStream
from data.render import IGNORE, Document, Renderer
from data.tokenizer import CHAT_TOKENS, IMAGE_TOKENS
from models.kernels import segment_attention
from models.kernels.segment_attention import BlockSparseLayout
from models.layers import attention
from models.masks import NEVER, cache_mask, left_mask, right_mask
from tests.conftest import chat

same_every_time = settings(derandomize=True, deadline=None, max_examples=150)

texts = st.lists(
    st.text(max_size=10) | st.sampled_from([*CHAT_TOKENS, *IMAGE_TOKENS[:3], "assistant\n", "\n"]),
    min_size=1,
    max_size=4,
).map("".join)
conversations = st.lists(st.fixed_dictionaries({"user": texts, "assistant": texts}), min_size=1, max_size=4)
grids_of_images = st.lists(st.sampled_from([(1, 1), (1, 2), (3, 2)]), max_size=3)


@same_every_time
@given(turns=conversations, grids=grids_of_images, left_context=st.sampled_from(["image", "prefix", "none"]))
def test_answers_and_their_end_of_turn_are_supervised_and_nothing_else(tokenizer, turns, grids, left_context):
    """The loss mask, read back from the tokens alone.

    A turn goes from its start token to its end token, which no text can contain, and begins with its role.
    """
    document = Renderer(tokenizer, 2, left_context).conversation(chat(turns, len(grids)), grids)
    tokens = dict(
        zip(
            [*document.left_positions, *document.right_positions],
            [*document.left_ids, *document.right_ids],
            strict=True,
        )
    )
    assert sorted(tokens) == list(range(document.length))
    ids = [
        *(tokens[i] for i in range(document.length)),
        tokenizer.turn_end,
    ]  # the last one is supervised, never read
    header = tokenizer.encode("assistant\n")
    supervised, answers = set(), []
    for start in (i for i, token in enumerate(ids) if token == tokenizer.special["<|im_start|>"]):
        end = ids.index(tokenizer.turn_end, start)
        if ids[start + 1 : start + 1 + len(header)] == header:
            supervised |= set(range(start + 1 + len(header), end + 1))
            answers.append(tokenizer.decode(ids[start + 1 + len(header) : end]))
    assert document.labels == [
        ids[p + 1] if p + 1 in supervised else IGNORE for p in document.right_positions
    ]
    assert answers == [turn["assistant"] for turn in turns]
    assert ids.count(tokenizer.global_image) == len(grids) and ids.count(tokenizer.image) == 2 * sum(
        map(tile_count, grids)
    )


class Epochs:
    """Stands in for a `SampleStream`: the same samples again and again."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.given = samples, 0

    def __iter__(self):
        while True:
            self.given += 1
            yield self.samples[(self.given - 1) % len(self.samples)]


@same_every_time
@given(
    lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=25),
    unit=st.sampled_from([1, 5]),
    tiles=st.sampled_from([0, 4]),
    window=st.integers(1, 30),
)
def test_a_stream_of_rows_loses_and_repeats_nothing(lengths, unit, tiles, window):
    """After any row, every sample is either packed or pending.

    Each comes as often as the epochs so far contain it, and no row exceeds a budget.
    """
    samples = []
    for number, (images, right) in enumerate(lengths):
        left = [7] * 5 * images
        samples.append(
            Sample(
                (0, number, 0),
                torch.empty(images, 0),
                [Document(left, left, left, [1] * right, list(range(right)), [IGNORE] * right)],
            )
        )
    epochs = Epochs(samples)
    stream = RowStream(epochs, Budget(20, 50, unit, tiles), window)
    came = [0] * len(samples)
    for _, row in zip(range(2 * len(samples)), stream, strict=False):
        assert row and sum(s.left_length for s in row) <= 20 and sum(s.right_length for s in row) <= 50
        assert not tiles or sum(s.tile_total for s in row) <= tiles
        for sample in row:
            came[sample.key[1]] += 1
        waiting = [sample.key[1] for sample, _, _ in stream.window.waiting.values()]
        whole, begun = divmod(epochs.given, len(samples))
        assert [n + waiting.count(i) for i, n in enumerate(came)] == [
            whole + (i < begun) for i in range(len(samples))
        ]


@st.composite
def rows_of_documents(draw):
    """A packed row as in docs/architecture.md, one token a line, padded with −1.

    Left: (position, group, image). Right: (position, document, group).
    """
    left, right, document = [], [], 0
    for group in range(draw(st.integers(1, 3))):
        head, blocks = draw(st.integers(0, 2)), draw(st.lists(st.integers(1, 4), max_size=2))
        starts = list(accumulate(blocks, initial=head))
        left += [
            (starts[image] + i, group, image) for image, length in enumerate(blocks) for i in range(length)
        ]
        for length in draw(st.lists(st.integers(0, 4), min_size=1, max_size=2)):
            behind = draw(
                st.integers(0, starts[-1])
            )  # a batch has it at starts[-1]; what the masks say holds wherever text stands
            right += [(p, document, group) for p in [*range(head), *range(behind, behind + length)]]
            document += 1
    left += [(0, -1, -1)] * draw(st.integers(0, 2))
    right += [(0, -1, -1)] * draw(st.integers(0 if right else 1, 2))
    return left, right


def columns(tokens: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tokens → three tensors (1, T)."""
    return list(torch.tensor(tokens, dtype=torch.long).view(1, -1, 3).unbind(-1))


@same_every_time
@given(row=rows_of_documents(), isolation=st.booleans(), kind=st.sampled_from(["causal", "bidirectional"]))
def test_masks_are_what_the_design_says(row, isolation, kind):
    left, right = row
    positions, groups, images = columns(left)
    seen = left_mask(positions, groups, images, isolation, kind).dense()
    assert seen.shape == (1, 1, len(left), len(left))
    for i, (p, group, image) in enumerate(left):
        for j, (q, other_group, other_image) in enumerate(left):
            if group < 0:  # a padding token may look at what it likes, if it is padding
                assert not seen[0, 0, i, j] or other_group < 0
                continue
            same_image = image == other_image
            may = (
                group == other_group
                and (same_image or not isolation)
                and (q <= p or (same_image and kind == "bidirectional"))
            )
            assert seen[0, 0, i, j] == may
    right_positions, documents, of_group = columns(right)
    seen = right_mask(right_positions, documents, of_group, positions, groups).dense()
    assert seen.shape == (1, 1, len(right), len(left) + len(right)) and seen.any(-1).all()
    for i, (p, document, group) in enumerate(right):
        may_left = [group == g and q < p for q, g, _ in left]
        may_right = [document == d and q <= p for q, d, _ in right]
        if document < 0:
            assert not any(
                s and g >= 0 for s, (_, g, _) in zip(seen[0, 0, i, : len(left)].tolist(), left, strict=True)
            )
            assert not any(
                s and d >= 0 for s, (_, d, _) in zip(seen[0, 0, i, len(left) :].tolist(), right, strict=True)
            )
        else:
            assert seen[0, 0, i].tolist() == [*may_left, *may_right]


@same_every_time
@given(
    queries=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    slots=st.lists(st.integers(0, 20) | st.just(NEVER), min_size=1, max_size=12),
)
def test_a_cache_shows_what_is_not_later(queries, slots):
    seen = cache_mask(torch.tensor([queries]), torch.tensor([slots])).dense()
    assert seen.tolist() == [[[[slot != NEVER and slot <= query for slot in slots] for query in queries]]]


@same_every_time
@given(
    row=rows_of_documents(),
    limit=st.integers(1, 9),
    aligned=st.integers(1, 9),
    spread=st.floats(1, 9),
    seed=st.integers(0, 9),
)
def test_spans_attend_as_the_whole_mask_does(row, limit, aligned, spread, seed):
    left, right = row
    (left_positions, left_groups, _), (positions, documents, groups) = columns(left), columns(right)
    rule = right_mask(positions, documents, groups, left_positions, left_groups)
    mask = rule.dense()
    torch.manual_seed(seed)
    inputs = [
        torch.randn(1, heads, length, 4, dtype=torch.float64, requires_grad=True)
        for heads, length in ((4, len(right)), (2, mask.shape[-1]), (2, mask.shape[-1]))
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MAX_QUERIES", limit), ("ALIGNED", aligned), ("SPREAD", spread)):
            patch.setattr(segment_attention, name, value)
        layout = BlockSparseLayout(rule, 2)
    out, expected = (
        attention(*inputs, layout),
        F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True),
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@same_every_time
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    side=st.sampled_from([16, 64, 224]),
    limit=st.integers(0, MAX_GRID),
    enlarge=st.booleans(),
)
def test_a_grid_is_the_smallest_that_keeps_its_limits(width, height, side, limit, enlarge):
    """The smallest grid within the limits.

    The longer side has the tiles that it needs, at most `limit`; the shorter side has the fewest tiles that
    do not shrink the image further.
    """
    rows, across = grid_of(
        width, height, VisionConfig(image_size=side, max_side=limit * side, enlarge=enlarge)
    )
    if not limit:
        assert (rows, across) == (1, 1)
        return
    (long, along), (short, other) = sorted(
        [(width, across), (height, rows)], key=lambda pair: (pair[0], pair[1]), reverse=True
    )
    assert 1 <= other <= along <= limit
    assert along == limit if enlarge else along * side >= long or along == limit
    assert enlarge or (along - 1) * side < long
    assert other * long >= short * along > (other - 1) * long


@settings(same_every_time, max_examples=25)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    limit=st.integers(1, 4),
    enlarge=st.booleans(),
    seed=st.integers(0, 9),
)
def test_tiles_put_together_are_the_resized_picture(width, height, limit, enlarge, seed):
    pixels = torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    (rows, across), tiles = to_tiles(
        pixels, config := VisionConfig(image_size=16, max_side=16 * limit, enlarge=enlarge)
    )
    assert (rows, across) == grid_of(width, height, config) and tiles.shape == (
        tile_count((rows, across)),
        3,
        16,
        16,
    )

    def resized(h: int, w: int) -> torch.Tensor:
        return F.interpolate(pixels[None], size=(h, w), mode="bicubic", antialias=True)[0]

    assert torch.equal(tiles[0], resized(16, 16))
    whole = resized(16 * rows, 16 * across)
    for number, tile in enumerate(tiles[1:]):
        top, start = 16 * (number // across), 16 * (number % across)
        assert torch.equal(tile, whole[:, top : top + 16, start : start + 16])
