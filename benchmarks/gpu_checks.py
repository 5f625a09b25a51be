"""Correctness on the device: the checks of `benchmarks.gpu`. Each returns figures or raises AssertionError.

They use made-up documents of `benchmarks.trial`: with tiny models if `quick`, else those of size 222m.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.trial import DOCUMENTS, MARKERS, MODELS, SIZES, make_config, standard_row
from configs.model import GenerationConfig, Vocabulary
from configs.train import Config
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import Generation, generate
from models.kernels.flex_attention import FlexLayout
from models.kernels.segment_attention import BlockSparseLayout
from models.language_model import DecoderBlock
from models.layers import attention
from models.masks import Mask, left_mask, right_mask
from training.distributed import full_tensor, gradient_sync
from training.logging import RunLog
from training.trainer import Batch, Trainer
from utils.device import compute_dtype

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # of a relative distance
LIVELY = {"tiny": 6.0, "222m": 1.5}  # factor of weights: some drafts are accepted, some rejected
TIE = 1e-4  # difference of two log-probabilities

Figures = dict[str, Any]


def size_of(quick: bool) -> str:
    return "tiny" if quick else "222m"


def vocabulary_of(size: str) -> Vocabulary:
    return Vocabulary(SIZES[size].text, MARKERS)


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ ÷ ‖expected‖"""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def check(figures: Figures, limit: float) -> Figures:
    """Return `figures`; raise AssertionError if one exceeds `limit`."""
    wrong = {name: value for name, value in figures.items() if not value <= limit}
    assert not wrong, ", ".join(f"{name}: {value:.2g}" for name, value in wrong.items()) + f" > {limit:g}"
    return figures


# Attention.


def sdpa(device: torch.device, quick: bool) -> Figures:
    """torch's attention with the dense mask; on a CPU the block-sparse kernel, too."""
    out = _attention(lambda mask, kv_heads: mask.dense(), "sdpa", device, quick)
    if BlockSparseLayout.applies(torch.empty(0, device=device)):
        out |= _attention(BlockSparseLayout, "block_sparse", device, quick)
    return out


def flex_attention(device: torch.device, quick: bool) -> Figures:
    return _attention(FlexLayout, "flex", device, quick)


def _attention(
    prepare: Callable[[Mask, int], Any], name: str, device: torch.device, quick: bool
) -> dict[str, float]:
    """Largest distance of `attention` and its gradients from a softmax over all scores in float64.

    Both towers' masks, of two rows, one of them with padding; grouped queries.
    """
    torch.manual_seed(0)
    size, out = SIZES[size_of(quick)], {}
    c = size.decoder
    config = make_config("dual_tower", size, "fp32").model
    row = standard_row(config, vocabulary_of(size_of(quick)))
    padded = {name: column.clone() for name, column in row.items()}
    for column in (n for n in padded if n.endswith(("groups", "documents", "images"))):
        padded[column][:, -7:] = -1
    b = on_device({name: torch.cat((row[name], padded[name])) for name in row}, device)
    left = b["left_positions"], b["left_groups"]
    masks = {
        "left": left_mask(*left, b["left_images"], True, "causal"),
        "right": right_mask(b["right_positions"], b["right_documents"], b["right_groups"], *left),
    }
    for dtype in {torch.float32, compute_dtype("auto", device)}:
        for tower, mask in masks.items():
            dense = mask.dense()
            B, _, T, S = dense.shape
            inputs = [
                torch.randn(B, n, t, c.head_size, device=device).to(dtype).requires_grad_()
                for n, t in ((c.heads, T), (c.kv_heads, S), (c.kv_heads, S))
            ]
            exact = [x.detach().double().requires_grad_() for x in inputs]
            results = [attention(*inputs, prepare(mask, c.kv_heads)), _softmax_attention(*exact, dense)]
            upstream = torch.randn_like(results[0])
            actual, expected = (
                [result, *torch.autograd.grad(result, of, upstream.to(result.dtype))]
                for result, of in zip(results, (inputs, exact), strict=True)
            )
            worst = max(map(distance, actual, expected))  # of the result and three gradients
            label = f"{name} {tower} {str(dtype).removeprefix('torch.')}"
            out |= check({label: worst}, TOLERANCE[dtype])
    return out


def _softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5  # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values


# Packing.


def packed(device: torch.device, quick: bool) -> Figures:
    """A packed row against its documents one by one: hidden states and gradients; what leaks is 0."""
    out: Figures = {}
    for kind, model_class in MODELS.items():
        torch.manual_seed(0)
        size = size_of(quick)
        config = make_config(kind, SIZES[size], "fp32").model
        model = model_class(config, vocabulary_of(size)).to(device).train()
        row = on_device(standard_row(config, vocabulary_of(size)), device)
        whole = model(**row)
        whole.loss_sum.backward()
        together = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        states = torch.empty_like(whole.hidden)
        for number in range(DOCUMENTS):
            output = model(**_document(row, number))
            output.loss_sum.backward()
            states[:, row["right_documents"][0] == number] = output.hidden.detach()
        alone = torch.cat([p.grad.flatten() for p in model.parameters()])
        figures = {"states": distance(whole.hidden, states), "gradients": distance(together, alone)}
        check(figures, TOLERANCE[torch.float32])
        other = {name: column.clone() for name, column in row.items()}
        other["tiles"][0] = 255 - other["tiles"][0]
        text = (row["right_documents"] == 0) & (row["right_ids"] < SIZES[size].text)
        other["right_ids"][text] = (row["right_ids"][text] + 1) % SIZES[size].text
        change = (model(**other).hidden - whole.hidden).abs().amax(-1)  # (1, R)
        assert change[row["right_documents"] == 0].min() > 0, "the change did not change its own document"
        leak = {"leak": change[row["right_documents"] != 0].max().item()}
        out[kind] = figures | check(leak, 0.0)
        del model, whole, output
    return out


def _document(row: Batch, number: int) -> Batch:
    """One document of the standard row, with its image."""
    left, right = row["left_groups"][0] == number, row["right_documents"][0] == number
    columns = {
        name: column[:, left if name.startswith("left") else right]
        for name, column in row.items()
        if name != "tiles"
    }
    return columns | {"tiles": row["tiles"][number : number + 1]}


# Drafts.


def drafts(device: torch.device, quick: bool) -> Figures:
    """Greedy answers in fp32 with and without drafts, at batch 1 and 8; only near-ties may differ."""
    size, tokens = size_of(quick), 24 if quick else 64
    torch.manual_seed(0)
    model = DualTowerVLM(make_config("dual_tower", SIZES[size], "fp32", heads=3).model, vocabulary_of(size))
    model.to(device).eval()
    with torch.no_grad():  # answers that change and repeat tokens: drafts of both kinds
        for p in (p for p in model.right.layers.parameters() if p.dim() == 2):
            p.mul_(LIVELY[size])
    out: Figures = {}
    for rows in (1, 8):
        ids = torch.randint(0, SIZES[size].text, (rows, 20)).to(device)
        lengths = torch.randint(5, 21, (rows, 1)).to(device)
        positions = torch.arange(20, device=device).expand(rows, -1)
        positions = positions.masked_fill(positions >= lengths, -1)
        plain, drafted = (
            generate(
                model,
                ids,
                positions,
                [[]] * rows,
                -1,
                GenerationConfig(max_new_tokens=tokens, speculative=mode, logprobs=True),
            )
            for mode in ("off", "on")
        )
        steps = sum(drafted.decode_steps) - rows
        ties = sum(_is_tie(plain, drafted, row) for row in range(rows))
        out[f"batch {rows}"] = {
            "tokens": rows * tokens,
            "tokens_per_step": rows * (tokens - 1) / steps,
            "near-ties": ties,
        }
    return out


def _is_tie(plain: Generation, drafted: Generation, row: int) -> bool:
    """Whether answers differ, at first where two tokens are equally likely. Any other difference raises."""
    a, b = plain.tokens[row], drafted.tokens[row]
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
    if at is None:
        return False
    gap = abs(plain.logprobs[row][at] - drafted.logprobs[row][at])
    assert gap < TIE, (
        f"row {row}: token {at} is {a[at]} without drafts, {b[at]} with; log-probabilities {gap}"
    )
    return True


# Training.


class NumberedBatches:
    """Made-up batches, each a function of its number, which is the state."""

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        self.row, self.text, self.at = standard_row(config.model, vocabulary), vocabulary.text_size, 0

    def __next__(self) -> Batch:
        self.at += 1
        is_text = self.row["right_ids"] < self.text
        ids = torch.where(is_text, (self.row["right_ids"] + self.at) % self.text, self.row["right_ids"])
        return self.row | {"right_ids": ids}

    def sources(self) -> list[str]:
        return []

    samples = sources

    def dropped(self) -> Counter[Any]:
        return Counter()

    def examples(self) -> dict[Any, str]:
        return {}

    def state(self) -> dict[int, Any]:
        return {0: {"at": self.at, "damaged": []}}

    def load_state(self, states: list[Any]) -> None:
        self.at = states[0]["at"]

    def close(self) -> None:
        pass


def resume(device: torch.device, quick: bool) -> Figures:
    """Four steps against two, a checkpoint, and two more in a new trainer: the same weights to the bit.

    If two whole runs differ already, a resumed one may differ as much.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    size = size_of(quick)
    config = make_config("dual_tower", SIZES[size], "auto")
    train = replace(config.train, device=str(device), checkpoint_every=2, ema=0.9)
    config = replace(config, max_steps=4, train=train)

    def run(folder: Path, checkpoint: Path | None = None) -> Tensor:
        torch.manual_seed(0 if checkpoint is None else 1)
        model = DualTowerVLM(config.model, vocabulary_of(size))
        batches = NumberedBatches(config, vocabulary_of(size))
        Trainer(config, model, batches, folder, RunLog(folder, silent=True)).train(checkpoint)
        return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()

    with TemporaryDirectory() as folder:
        whole, again = (run(Path(folder) / name) for name in ("whole", "again"))
        resumed = run(Path(folder) / "resumed", Path(folder) / "whole/checkpoints/step_000002")
    noise = (again - whole).abs().max().item()
    return {"noise": noise} | check({"difference": (resumed - whole).abs().max().item()}, 3 * noise)


def distributed(device: torch.device, quick: bool) -> Figures:
    """One rank of NCCL (CPU: gloo): collectives, and FSDP2's gradients against those of the model itself."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        numbers = torch.arange(4, device=device)
        dist.all_reduce(numbers)
        objects = [None]
        dist.all_gather_object(objects, "gathered")
        assert numbers.tolist() == [0, 1, 2, 3] and objects == ["gathered"], (numbers, objects)
        torch.manual_seed(0)
        size = size_of(quick)
        config = make_config("dual_tower", SIZES[size], "fp32").model
        model = DualTowerVLM(config, vocabulary_of(size)).to(device).train()
        sharded = copy.deepcopy(model)
        mesh = init_device_mesh(device.type, (1,))
        for block in (m for m in sharded.modules() if isinstance(m, DecoderBlock)):
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        row = on_device(standard_row(config, vocabulary_of(size)), device)
        for each in (model, sharded):
            with gradient_sync(each, last=True):
                each(**row).loss_sum.backward()
        ours, theirs = (
            torch.cat([full_tensor(p.grad).flatten() for p in each.parameters()]) for each in (sharded, model)
        )
        return {"backend": backend} | check({"FSDP2 gradients": distance(ours, theirs)}, 1e-4)
    finally:
        dist.destroy_process_group()
