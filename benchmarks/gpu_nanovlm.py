"""nanoVLM's training step and greedy decoding, of the sizes and the row of 222m in `benchmarks.trial`.

  python benchmarks/gpu_nanovlm.py CHECKOUT cuda bfloat16 full

Part of `benchmarks.gpu`. Weights are random; its tokenizer, which it would download, is replaced by the ids
that the model reads. Its attention mask is left out: it would be all ones. Prints one JSON object.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

IMAGES, IMAGE_TOKENS, QUESTION, ANSWER = 6, 49, 59, 60
ROWS = 16  # on a GPU, as in `benchmarks.gpu_speed`


def main(folder: str, device_name: str, dtype_name: str, mode: str) -> None:
    sys.path[0] = folder  # instead of the folder of this file
    import data.processors  # of the checkout, as all that follow

    tokenizer = SimpleNamespace(image_token_id=49152, eos_token_id=None)
    data.processors.get_tokenizer = lambda *args, **kwargs: tokenizer
    from models.config import VLMConfig

    from models.vision_language_model import VisionLanguageModel

    torch.manual_seed(0)
    device, dtype, quick = torch.device(device_name), getattr(torch, dtype_name), mode == "quick"
    config = VLMConfig(
        vit_img_size=224,
        lm_hidden_dim=576,
        lm_inter_dim=1536,
        lm_n_heads=9,
        lm_n_kv_heads=3,
        lm_n_blocks=2 if quick else 30,
        vit_n_blocks=2 if quick else 12,
        mp_pixel_shuffle_factor=2,
        mp_image_token_length=IMAGE_TOKENS,
    )
    model = VisionLanguageModel(config, load_backbone=False).to(device)
    out = {"parameters": sum(p.numel() for p in model.parameters())}
    out |= training(model, ROWS if device.type == "cuda" else 1, device, dtype)
    out |= decoding(model, 8 if quick else 128, device, dtype)
    print(json.dumps(out))


def training(model: Any, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds, tokens/s and memory of a step: forward, backward, clipping and AdamW."""
    image = torch.full((IMAGE_TOKENS,), 49152)
    text = torch.randint(0, 49152, (rows, IMAGES, QUESTION + ANSWER))
    ids = torch.cat((image.expand(rows, IMAGES, -1), text), 2)  # (rows, IMAGES, tokens of a document)
    labels = ids.roll(-1, 2)
    labels[:, :, : -ANSWER - 1] = labels[:, :, -1] = -100
    ids, labels = ids.flatten(1).to(device), labels.flatten(1).to(device)
    images = torch.rand(rows * IMAGES, 3, 224, 224).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = model(ids, images, targets=labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = statistics.median(timed(step, device) for _ in range(2 if device.type == "cpu" else 12))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    rates = {"tokens_per_s": ids.numel() / seconds, "samples_per_s": rows * IMAGES / seconds}
    return rates | {"memory_gb": peak / 1e9, "rows": rows, "step_s": seconds}


def decoding(model: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Greedy tokens/s after the first, and the first token's milliseconds; under autocast."""
    model.eval()
    image = torch.full((IMAGE_TOKENS,), 49152)
    ids = torch.cat((image, torch.randint(0, 49152, (32,))))[None].to(device)
    pixels = torch.rand(1, 3, 224, 224).to(device)

    def seconds(count: int) -> float:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return timed(lambda: model.generate(ids, pixels, max_new_tokens=count, greedy=True), device)

    seconds(1)
    first, whole = seconds(1), seconds(tokens)
    return {"decode_tokens_per_s": (tokens - 1) / (whole - first), "first_token_ms": 1e3 * first}


def timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(*sys.argv[1:])
