"""nanoVLM and dual-tower checkpoints, against what their own code computed from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from configs.model import DecoderConfig, GenerationConfig, Vocabulary, as_left_decoder
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import generate
from models.kv_cache import KeyValueRecorder
from models.masks import cache_mask
from models.vision_language_model import VisionLanguageModel
from models.weights.model_folder import left_tower_of, load_left_tower
from tests.conftest import TINY, TINY_MODEL, random_tiles, tiny_model
from utils.errors import UserError

FIXTURES = Path(__file__).parent.parent.parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no nanoVLM checkpoints at {FIXTURES}")


@needs_fixtures
def test_nanovlm_as_vanilla():
    """Features, projection, logits and loss to 1e-4, greedy tokens exactly."""
    model = VisionLanguageModel.from_pretrained(FIXTURES / "nanovlm_tiny")
    expected = load_file(FIXTURES / "nanovlm_tiny" / "expected.safetensors")
    tiles, ids = expected["pixel_values"] * 255, expected["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    documents, nothing = torch.zeros_like(ids), torch.empty(len(ids), 0, dtype=torch.int64)
    with torch.no_grad():
        features = model.vision_encoder(tiles)
        torch.testing.assert_close(
            features.flatten(2).transpose(1, 2), expected["vision_features"], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            model.modality_projector(features), expected["projected"], atol=1e-4, rtol=0
        )
        output = model(
            tiles,
            nothing,
            nothing,
            nothing,
            nothing,
            ids,
            positions,
            documents,
            documents,
            expected["labels"],
        )
        torch.testing.assert_close(model.logits(output.hidden), expected["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            output.loss_sum / (expected["labels"] != -100).sum(), expected["loss"][0], atol=1e-4, rtol=0
        )
    prompt, tokens = expected["greedy_prompt"], expected["greedy_tokens"]
    settings = GenerationConfig(max_new_tokens=tokens.shape[1])
    result = generate(
        model, prompt, torch.arange(prompt.shape[1]).expand_as(prompt), [[], []], -1, settings, tiles=tiles
    )
    assert result.tokens == tokens.tolist()


@needs_fixtures
def test_the_first_dual_tower_as_prefix():
    """Text logits and loss to 1e-4, greedy tokens exactly; the prefix is encoded once and reused."""
    model = DualTowerVLM.from_pretrained(FIXTURES / "dualtower_tiny")
    assert model.config.left_context == "prefix"
    last = model.config.left.layers - 1
    assert {
        "left.decoder.norm.weight",
        f"left.decoder.layers.{last}.self_attn.q_proj.weight",
        f"left.decoder.layers.{last}.mlp.up_proj.weight",
    } <= set(model.dropped_tensors)
    expected = load_file(FIXTURES / "dualtower_tiny" / "expected.safetensors")
    tiles, ids, labels = expected["pixel_values"] * 255, expected["input_ids"], expected["labels"]
    boundary = int(expected["last_image_index"]) + 1
    positions, zeros = torch.arange(ids.shape[1]).expand_as(ids), torch.zeros_like(ids)
    images = torch.where(ids[:, :boundary] == model.vocabulary.image_token_id, 0, -1)
    with torch.no_grad():
        left = (ids[:, :boundary], positions[:, :boundary], zeros[:, :boundary], images)
        output = model(
            tiles,
            *left,
            ids[:, boundary:],
            positions[:, boundary:],
            zeros[:, boundary:],
            zeros[:, boundary:],
            labels[:, boundary:],
        )
        logits = model.logits(output.hidden)
        torch.testing.assert_close(logits, expected["text_logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            output.loss_sum / (labels != -100).sum(), expected["loss"][0], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            F.cross_entropy(logits.flatten(0, 1), labels[:, boundary:].flatten()),
            expected["loss"][0],
            atol=1e-4,
            rtol=0,
        )
    prompt, tokens = expected["greedy_prompt"], expected["greedy_tokens"]
    kvs = model.encode_images(tiles, list(prompt[:, :boundary]), list(images))
    positions = torch.arange(boundary, prompt.shape[1]).expand(len(prompt), -1)
    for _ in range(2):
        result = generate(
            model,
            prompt[:, boundary:],
            positions,
            [[(kv, 0)] for kv in kvs],
            -1,
            GenerationConfig(max_new_tokens=tokens.shape[1]),
        )
        assert result.tokens == tokens.tolist()


@needs_fixtures
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_hidden_dim": 96}, "wrong shape"),
        ({"vit_cls_flag": True}, "vit_cls_flag = True is not supported"),
        ({"vlm_extra_tokens": {}}, "must begin with image_token"),
        ({"lm_vocab_size": 131}, "leaves room for 66 markers"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, message, tmp_path):
    shutil.copytree(FIXTURES / "nanovlm_tiny", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        VisionLanguageModel.from_pretrained(tmp_path / "copy")


@needs_fixtures
def test_the_wrong_class_says_so():
    with pytest.raises(UserError, match="type 'vanilla', not 'dual_tower'"):
        DualTowerVLM.from_pretrained(FIXTURES / "nanovlm_tiny")


def keys_and_values_of(model: VisionLanguageModel, tiles: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """(layers, 2, G, T, E): what a vanilla model's decoder makes of an image block."""
    recorder = KeyValueRecorder()
    positions = torch.arange(len(block))[None]
    with torch.no_grad():
        model.right(
            model.embed(block[None], tiles),
            positions,
            cache_mask(positions, positions),
            recorder,
        )
    return torch.stack([torch.stack(layer) for layer in recorder.layers])[:, :, 0]


def left_tower_from(
    source: Path, right: DecoderConfig, layer_map: str = ""
) -> tuple[DualTowerVLM, list[str]]:
    source_config, vocabulary, tensors = left_tower_of(str(source))
    left = as_left_decoder(source_config.left, layer_map)
    config = replace(
        source_config,
        left_context="image",
        image_isolation=True,
        left=left,
        right=replace(
            right, layers=source_config.left.layers, kv_heads=left.kv_heads, head_size=left.head_size
        ),
        layer_map=layer_map,
    )
    model = DualTowerVLM(config, Vocabulary(text_size=300, markers=65)).eval()
    return model, load_left_tower(model.left, source_config, vocabulary, tensors, str(source))


@needs_fixtures
def test_a_left_tower_from_nanovlm():
    """The image KV equals that of nanoVLM's decoder.

    Weights that the left tower does not use are listed.
    """
    vanilla = VisionLanguageModel.from_pretrained(FIXTURES / "nanovlm_tiny")
    model, dropped = left_tower_from(FIXTURES / "nanovlm_tiny", TINY)
    v, w = vanilla.vocabulary, model.vocabulary
    assert w.first_marker_id != v.first_marker_id
    tiles, images = random_tiles(1), vanilla.config.tokens_per_tile
    block = torch.tensor([v.first_marker_id] + [v.image_token_id] * images)
    expected = keys_and_values_of(vanilla, tiles, block)
    kv = model.encode_image(tiles, torch.tensor([w.first_marker_id] + [w.image_token_id] * images))
    torch.testing.assert_close(kv.data, expected, atol=1e-5, rtol=0)
    assert dropped == sorted(
        [
            f"decoder.layers.2.{n}.weight"
            for n in (
                "mlp.down_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "post_attention_layernorm",
                "self_attn.o_proj",
                "self_attn.q_proj",
            )
        ]
        + ["decoder.norm.weight"]
    )


def test_a_left_tower_from_our_own_models(tokenizer, tmp_path):
    dual, vanilla = (
        tiny_model(tokenizer),
        tiny_model(tokenizer, replace(TINY_MODEL, left_context="none"), seed=1),
    )
    block = torch.tensor([tokenizer.global_image] + [tokenizer.image] * 4)
    for source, expected in (
        (dual, dual.encode_image(random_tiles(1), block).data),
        (vanilla, keys_and_values_of(vanilla, random_tiles(1), block)),
    ):
        source.save_pretrained(tmp_path / source.model_type)
        model, _ = left_tower_from(tmp_path / source.model_type, TINY)
        w = model.vocabulary
        kv = model.encode_image(random_tiles(1), torch.tensor([w.first_marker_id] + [w.image_token_id] * 4))
        torch.testing.assert_close(kv.data, expected, atol=1e-5, rtol=0)
