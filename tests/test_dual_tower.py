"""The real dual tower against the naive one; packing, isolation and image KV."""

from dataclasses import replace

import pytest
import torch

from data.collators import collate, collate_prompts
from data.conversations import IMAGE_PART, text_part
from data.datasets import Sample
from data.images import tile_count
from data.render import Renderer
from models import losses
from models.generation import prefill
from models.kernels import use_kernels
from tests.conftest import TINY_MODEL, TURNS, chat, random_tiles, tiny_model
from tests.naive_dual_tower import Naive


def make_sample(renderer, images: int | list, conversations: list[list[dict]], seed: int = 0) -> Sample:
    """`images`: how many, each one square; or the grid of each."""
    grids = [(1, 1)] * images if isinstance(images, int) else images
    tiles = random_tiles(sum(map(tile_count, grids)), seed)
    return Sample(
        (0, 0, 0), tiles, [renderer.conversation(chat(turns, len(grids)), grids) for turns in conversations]
    )


def in_context(renderer, seed: int = 5) -> Sample:
    """A system message, and images at their places: between texts, and in a later turn."""
    content = [IMAGE_PART, text_part(" or "), IMAGE_PART, text_part("?")]
    messages = [
        {"role": "system", "content": "is it large or is it small?"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [text_part("what is it? "), IMAGE_PART]},
        {"role": "assistant", "content": "a rectangle"},
    ]
    grids = [(1, 1), (2, 1), (1, 1)]
    tiles = random_tiles(sum(map(tile_count, grids)), seed)
    return Sample((0, 0, 0), tiles, [renderer.conversation(messages, grids)])


def block_starts(document) -> list[int]:
    return [document.left_positions[block.start] for block in document.blocks(isolated=True)]


def full_ids(renderer, sample: Sample, number: int) -> list[int]:
    """A document's tokens in one sequence, rebuilt from positions alone."""
    document = sample.documents[number]
    ids = dict(zip(document.right_positions, document.right_ids, strict=True))
    ids |= dict(zip(document.left_positions, document.left_ids, strict=True))
    assert sorted(ids) == list(range(len(ids)))
    return [ids[p] for p in sorted(ids)]


def document_logits(model, batch, row: int, document: int) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return model.logits(model(**inputs).hidden)[row][batch["right_documents"][row] == document]


@pytest.fixture
def samples(renderer) -> list[Sample]:
    return [
        make_sample(
            renderer, 1, [[TURNS[0]], [TURNS[1]], [TURNS[2]]], seed=1
        ),  # three questions on one image
        make_sample(renderer, 3, [TURNS], seed=2),  # a conversation about three images
        make_sample(
            renderer, [(2, 1), (1, 1)], [[TURNS[3]], TURNS[:2]], seed=3
        ),  # the first image is cut into two tiles
        make_sample(renderer, 0, [[TURNS[2]]], seed=4),  # text alone
        in_context(renderer),
    ]


@pytest.mark.parametrize("isolation", [True, False])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_equals_the_naive_dual_tower(tokenizer, renderer, samples, isolation, attention):
    model = tiny_model(tokenizer, replace(TINY_MODEL, image_isolation=isolation, left_attention=attention))
    naive = Naive(model)
    packed = collate([[samples[3], samples[0], samples[1]], samples[2:5:2]], tokenizer.global_image)
    locations = {0: (0, 1), 1: (0, 4), 2: (1, 0), 3: (0, 0), 4: (1, 2)}  # sample → row, first document
    for number, sample in enumerate(samples):
        alone = collate([[sample]], tokenizer.global_image)
        for d in range(len(sample.documents)):
            expected = (
                naive.logits(full_ids(renderer, sample, d), sample.tiles) if len(sample.tiles) else None
            )
            row, first = locations[number]
            got_packed, got_alone = (
                document_logits(model, packed, row, first + d),
                document_logits(model, alone, 0, d),
            )
            torch.testing.assert_close(got_packed, got_alone, atol=1e-5, rtol=0)
            if expected is not None:
                torch.testing.assert_close(got_packed, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("context", ["prefix", "none"])
def test_other_routings_equal_their_naive_models(tokenizer, attention, context):
    """Everything up to the last image token goes left; or nothing does (vanilla). Packed and alone."""
    config = replace(TINY_MODEL, left_context=context, image_isolation=False, left_attention=attention)
    model = tiny_model(tokenizer, config)
    renderer = Renderer(tokenizer, config.tokens_per_tile, context)
    naive = Naive(model)
    first = (
        [make_sample(renderer, 1, [[TURNS[0]], [TURNS[1]]], seed=1)]
        if context == "prefix"
        else [make_sample(renderer, 1, [[t]], seed=1) for t in TURNS[:2]]
    )
    samples = [
        *first,
        make_sample(renderer, 2, [TURNS[:2]], seed=2),
        make_sample(renderer, 0, [[TURNS[2]]], seed=3),
        in_context(renderer),
    ]
    packed = collate([samples], tokenizer.global_image)
    numbers = [(s, d) for s in samples for d in range(len(s.documents))]
    for index, (sample, d) in enumerate(numbers):
        got, alone = (
            document_logits(model, packed, 0, index),
            document_logits(model, collate([[sample]], tokenizer.global_image), 0, d),
        )
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)
        if len(sample.tiles):
            torch.testing.assert_close(
                got, naive.logits(full_ids(renderer, sample, d), sample.tiles), atol=1e-5, rtol=0
            )
    batch = {k: v for k, v in packed.items() if k != "labels"}
    with torch.no_grad():
        base = model.logits(model(**batch).hidden)[0]
        changed = model.logits(
            model(**batch | {"tiles": torch.cat((255 - batch["tiles"][:1], batch["tiles"][1:]))}).hidden
        )[0]
    assert torch.equal(
        base[batch["right_groups"][0] != 0], changed[batch["right_groups"][0] != 0]
    ) and not torch.equal(base, changed)


def test_the_image_changes_the_answer(model, tokenizer, renderer):
    batches = [
        collate([[make_sample(renderer, 1, [[TURNS[0]]], seed)]], tokenizer.global_image) for seed in (1, 2)
    ]
    a, b = (document_logits(model, batch, 0, 0) for batch in batches)
    before = 3  # <|im_start|>, user and newline stand before the image
    assert torch.equal(a[:before], b[:before])
    assert (a[before:] - b[before:]).abs().max() > 1e-2


def test_packing_leaks_nothing(model, tokenizer, samples):
    """Packed documents are independent: the difference is exactly 0.

    Changing any token of a document changes no logit of another. An image affects its own group only.
    """
    batch = collate([[samples[0], samples[1], samples[2]]], tokenizer.global_image)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    documents, groups = batch["right_documents"][0], batch["right_groups"][0]

    def logits(**changed) -> torch.Tensor:
        with torch.no_grad():
            return model.logits(model(**inputs | changed).hidden)[0]

    with torch.no_grad():  # once: the left tower never sees what changes
        image_kv = model.left(
            *(batch[name] for name in ("tiles", "left_ids", "left_positions", "left_groups", "left_images"))
        )

    def logits_of_text(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            columns = (batch[name] for name in ("right_positions", "right_documents", "right_groups"))
            return model.logits(
                model.right.forward_packed(
                    image_kv, batch["left_positions"], batch["left_groups"], ids, *columns
                )
            )[0]

    base = logits()
    assert torch.equal(logits_of_text(batch["right_ids"]), base)
    for t in range(len(documents)):
        ids = batch["right_ids"].clone()
        ids[0, t] = (ids[0, t] + 1) % model.vocabulary.text_size
        changed = logits_of_text(ids)
        others = documents != documents[t]
        assert torch.equal(changed[others], base[others])
        assert not torch.equal(changed[t], base[t])
        own_earlier = (documents == documents[t]) & (
            batch["right_positions"][0] < batch["right_positions"][0, t]
        )
        assert torch.equal(changed[own_earlier], base[own_earlier])
    tiles = batch["tiles"].clone()
    tiles[0] = 255 - tiles[0]  # the image of group 0
    changed = logits(tiles=tiles)
    assert torch.equal(changed[groups != 0], base[groups != 0])
    assert not torch.equal(changed[groups == 0], base[groups == 0])


def test_padding_changes_nothing(model, tokenizer, samples):
    alone = collate([[samples[0]]], tokenizer.global_image)
    padded = collate([[samples[0]], [samples[1], samples[2]]], tokenizer.global_image)
    for d in range(3):
        torch.testing.assert_close(
            document_logits(model, padded, 0, d), document_logits(model, alone, 0, d), atol=1e-5, rtol=0
        )


def test_loss_is_cross_entropy_over_supervised_tokens(monkeypatch, model, tokenizer, samples):
    batch = collate([[samples[0], samples[2]], [samples[1]]], tokenizer.global_image)
    with torch.no_grad():
        output = model(**batch)
        logits = model.logits(output.hidden)
        monkeypatch.setattr(losses, "CHUNK", model.vocabulary.text_size * 3)
        chunked = model.right.loss(output.hidden, batch["labels"])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(chunked.sum(), expected)


def test_every_parameter_gets_a_gradient(tokenizer, samples):
    """The left tower holds nothing that nobody reads."""
    model = tiny_model(tokenizer)
    batch = collate([samples[:2]], tokenizer.global_image)
    model(**batch).loss_sum.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_image_kv_composes_at_any_position(model, tokenizer, renderer, samples):
    """Image KVs encoded one by one, put into prompts of other shapes, give the packed model's logits."""
    sample = samples[1]
    batch = collate([[sample]], tokenizer.global_image)
    document = sample.documents[0]
    expected = document_logits(model, batch, 0, 0)[-1]
    block = torch.tensor(renderer.image_block())
    kvs = [model.encode_image(sample.tiles[i : i + 1], block) for i in range(3)]
    c = model.config.right
    assert kvs[0].data.shape == (c.layers, 2, c.kv_heads, len(block), c.head_size)
    together = model.encode_images(sample.tiles, [block] * 3)
    for one, other in zip(kvs, together, strict=True):
        torch.testing.assert_close(one.data, other.data, atol=1e-5, rtol=0)
    prompts = collate_prompts([document, samples[0].documents[0]])
    with torch.no_grad():
        images = [list(zip(kvs, block_starts(document), strict=True)), [(kvs[2], 3)]]
        states = prefill(model, prompts["ids"], prompts["positions"], images, 4)[1]
        logits = model.logits(states[torch.arange(2), (prompts["positions"] >= 0).sum(1) - 1])
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=0)


def test_counts_of_placeholders_and_tiles_must_match(model, tokenizer, samples):
    batch = collate([[samples[1]]], tokenizer.global_image)
    batch["tiles"] = batch["tiles"][:2]
    with pytest.raises(ValueError, match="12 image placeholders.*2 tiles make 8"):
        model(**batch)


class Doubled(torch.nn.Module):
    """An encoder of float32 in a model of float64."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.encoder(tiles).double()


LEFT_KEYS = ("tiles", "left_ids", "left_positions", "left_groups", "left_images")


def left_kv(model, batch) -> torch.Tensor:
    """(layers, 2, B, G, L, E)"""
    layers = model.left(*(batch[name] for name in LEFT_KEYS))
    return torch.stack([torch.stack(layer) for layer in layers]).detach()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("isolation", [True, False])
def test_an_image_kv_is_the_same_to_the_bit_wherever_its_image_stands(
    tokenizer, renderer, samples, isolation, grad
):
    """Several images, groups and padding; each group's documents begin with more or less text."""
    model = tiny_model(tokenizer, replace(TINY_MODEL, image_isolation=isolation))
    batch = collate([[samples[0], samples[1], samples[2]], [samples[2]]], tokenizer.global_image)
    moved = batch["left_positions"] + 7 * (batch["left_groups"] + 1) * (batch["left_groups"] >= 0)
    with torch.set_grad_enabled(grad):
        expected, result = left_kv(model, batch), left_kv(model, batch | {"left_positions": moved})
    assert torch.equal(result, expected)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("isolation", [True, False])
def test_training_and_encoding_give_the_same_image_kv_to_the_bit(
    tokenizer, renderer, samples, isolation, attention
):
    """With plain kernels and matrices of one shape: rows of one block each, of several lengths.

    The kernels of training sum in another order.
    """
    model = tiny_model(tokenizer, replace(TINY_MODEL, image_isolation=isolation, left_attention=attention))
    one, two = samples[0], make_sample(renderer, [(2, 1)], [TURNS[:2]], seed=5)
    rows = [one, two] if isolation else [one, two, samples[1]]  # three images that see one another
    batch = collate([[row] for row in rows], tokenizer.global_image)
    use_kernels("plain")
    try:
        kvs = left_kv(model, batch).detach()
    finally:
        use_kernels("auto")
    torch.testing.assert_close(left_kv(model, batch).detach(), kvs, atol=1e-4, rtol=1e-4)
    documents = [row.documents[0] for row in rows]
    tiles = torch.cat([row.tiles for row in rows])
    blocks, images = ([torch.tensor(getattr(d, f"left_{n}")) for d in documents] for n in ("ids", "images"))
    for index, kv in enumerate(model.encode_images(tiles, blocks, images)):
        assert torch.equal(kvs[:, :, index, :, : kv.tokens], kv.data)


@pytest.mark.parametrize("isolation", [True, False])
def test_a_packed_row_and_encoding_differ_by_rounding_alone(tokenizer, samples, isolation):
    """In float64, from features in float32: a rotary angle of another position would differ by 1e-8."""
    # An encoder whose features do not depend on the number of tiles, to the bit.
    vision = replace(TINY_MODEL.vision, name="tf_efficientnet_lite0")
    config = replace(TINY_MODEL, image_isolation=isolation, vision=vision)
    model = tiny_model(tokenizer, config)
    features = model.left.vision_encoder
    model.double()
    features.float()
    model.left.vision_encoder = Doubled(features)
    batch = collate([[samples[0], samples[1], samples[2]], [samples[2]]], tokenizer.global_image)
    with torch.no_grad():
        kvs = left_kv(model, batch)[:, :, 0]
    tile = at = 0
    for sample in samples[:3]:
        document = sample.documents[0]
        for part in document.blocks(isolation):
            ids, images = torch.tensor(document.left_ids[part]), torch.tensor(document.left_images[part])
            count = int((ids >= tokenizer.global_image).sum())  # a marker for each tile
            tiles = batch["tiles"][tile : tile + count]
            kv = model.encode_images(tiles, [ids], [images - images.min()])[0]
            difference = (kvs[..., at : at + len(ids), :] - kv.data).abs().max()
            assert difference < 1e-13, difference
            tile, at = tile + count, at + len(ids)
