"""A decode step waits for the device once; with --compile its shapes are fixed and its answers the same."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import models.generation
import models.kv_cache
from configs.model import GenerationConfig, MultiTokenConfig
from data.collators import collate_prompts
from models.generation import DecodingBatch, Generation, Row, forward_cached, generate, new_cache
from models.kernels.compiled_decode import compile_decoding
from models.kv_cache import DecodingCache
from models.multi_token import Drafts
from tests.conftest import TINY_MODEL, lively_model, random_tiles
from tests.test_dual_tower import block_starts
from tests.test_generation import prompt_ids
from utils.errors import UsageError

WITH_HEADS = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=3, mlp_size=32))
GREEDY = GenerationConfig(max_new_tokens=9)
SETTINGS = {
    "greedy": GREEDY,
    "drafts": GenerationConfig(max_new_tokens=9, speculative="on", draft_tokens=3),
    "sampled": GenerationConfig(
        max_new_tokens=9, sampling=True, temperature=0.8, top_p=0.9, top_k=9, min_p=0.1
    ),
    "sampled drafts": GenerationConfig(
        max_new_tokens=9, sampling=True, top_p=0.9, repetition_penalty=1.2, speculative="on", draft_tokens=3
    ),
}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_decode_step_on_a_gpu_waits_for_it_once(tokenizer, monkeypatch, name, fixed):
    """Fake CUDA tensors have no values, so that every other wait for one raises."""
    settings, waits, B = SETTINGS[name], [], 3

    def report(tensor: torch.Tensor) -> list[list[int]]:
        """Finite; two tokens of the first row are accepted, one of the others."""
        waits.append(tuple(tensor.shape))
        width = tensor.shape[1] - 2
        return [[1, min(width, 2 if row == 0 else 1), *[5] * width] for row in range(B)]

    def to_device(values: list[int], device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        return torch.empty(len(values), dtype=torch.int64, device=device)

    monkeypatch.setattr(FakeTensor, "tolist", report)
    for module in (models.generation, models.kv_cache):
        monkeypatch.setattr(module, "to_device", to_device)
    model = lively_model(tokenizer, WITH_HEADS)
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        for part in model.modules():
            for store in (part._parameters, part._buffers):
                for key, value in store.items():
                    if value is not None:
                        store[key] = torch.empty_like(value, device="cuda")
        cache = new_cache(model, B, 30)
        cache.fixed = fixed
        cache.reserve(torch.empty(B, 4, dtype=torch.int64, device="cuda"))
        positions = torch.empty(B, dtype=torch.int64, device="cuda")
        batch = DecodingBatch(model, cache, [Row(b) for b in range(B)], positions, GREEDY, frozenset(), None)
        batch.settings = settings  # without a generator: a fake device has none
        if settings.repetition_penalty != 1:
            batch.seen = torch.empty(B, model.vocabulary.text_size, dtype=torch.bool, device="cuda")
        batch.tokens = positions
        batch.hidden = torch.empty(B, model.config.right.hidden_size, device="cuda")
        for step in range(1, 3):
            drafts = batch.draft(settings.draft_tokens)
            batch.commit(drafts, *batch.verify(drafts))
            assert len(waits) == step, "one wait a decode step"
    assert [len(row.tokens) for row in batch.rows] == ([4, 2, 2] if settings.draft_tokens else [2, 2, 2])


@pytest.mark.parametrize("drafts", ["off", "on"])
def test_fixed_shapes_answer_as_growing_ones(tokenizer, renderer, monkeypatch, drafts):
    """Rows with and without images that end at different times, and what the caller ends."""
    model = lively_model(tokenizer, WITH_HEADS)
    asked = [(1, "what is it?"), (0, "is it red, or is it a longer question?"), (2, "what?")]
    prompts = [prompt_ids(renderer, n, text)[0] for n, text in asked]
    block = torch.tensor(renderer.image_block())
    images = [
        list(zip(model.encode_images(random_tiles(n), [block] * n), block_starts(prompt), strict=True))
        if n
        else []
        for (n, _), prompt in zip(asked, prompts, strict=True)
    ]
    ends, settings = [3, 16, 7], GenerationConfig(max_new_tokens=16, speculative=drafts, logprobs=True)

    def answers() -> Generation:
        return generate(
            model,
            images=images,
            turn_end=-1,
            settings=settings,
            on_tokens=lambda row, tokens: len(tokens) >= ends[row],
            **collate_prompts(prompts),
        )

    expected = answers()
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: whole(call, backend="eager", fullgraph=True))
    compile_decoding(model)
    assert new_cache(model, 3, 20).positions.shape == (3, 256)
    actual = answers()
    assert [len(tokens) for tokens in expected.tokens] == ends
    assert actual.tokens == expected.tokens and actual.decode_steps == expected.decode_steps
    for row, logprobs in zip(expected.logprobs, actual.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(logprobs), atol=1e-4, rtol=0)


def test_a_row_that_is_done_takes_no_slots(tokenizer, renderer, monkeypatch):
    """Its drafts are all accepted, while another row takes a token at a time: it must not fill its slots."""
    monkeypatch.setattr(models.generation, "SLOTS", 1)
    model, accept = lively_model(tokenizer, WITH_HEADS), DecodingBatch.accept
    model.right.compiled_step = forward_cached

    def uneven(
        batch: DecodingBatch, drafts: Drafts, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return accept(batch, drafts, logits)[0], torch.tensor([logits.shape[1], 1])

    monkeypatch.setattr(DecodingBatch, "accept", uneven)
    result = generate(
        model,
        images=[[], []],
        turn_end=-1,
        settings=GenerationConfig(max_new_tokens=24, speculative="on", draft_tokens=3),
        on_tokens=lambda row, tokens: row == 0 and len(tokens) == 2,
        **collate_prompts([prompt_ids(renderer, 0, text)[0] for text in ("what?", "is it?")]),
    )
    assert [len(tokens) for tokens in result.tokens] == [2, 24]


def test_attention_reads_all_slots_of_a_fixed_cache(model):
    cache = DecodingCache(1, 2, 1, 20, 4, torch.float32, torch.device("cpu"), fixed=True)
    cache.reserve(torch.zeros(2, 3, dtype=torch.int64))
    keys, values = cache.update(0, *torch.randn(2, 2, 1, 3, 4), None)
    assert keys.shape == values.shape == (2, 1, 20, 4)


def test_compiling_needs_a_compiler(model, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="--compile needs the C\\+\\+ compiler"):
        compile_decoding(model)
