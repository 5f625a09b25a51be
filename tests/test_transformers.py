"""Exported folders in transformers give the tokens of this project's own generate.

They run in a process that does not import the project.
"""

import ast
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextStreamer,
    pipeline,
    set_seed,
)
from transformers import GenerationConfig as TransformersGenerationConfig

from configs.model import GenerationConfig, MultiTokenConfig
from configs.train import Config
from data.collators import collate_prompts
from data.tokenizer import Tokenizer
from eval.predictor import Predictor
from hf import flat_code
from hf.flat_code import code_files
from models.generation import generate
from tests.conftest import TINY_MODEL, lively_model, to_format_3
from tests.naive_dual_tower import Naive
from tests.programs import run_program, with_modules_in
from tools.export import main
from training.export import export
from utils.errors import UserError
from utils.files import read_json

ROOT = Path(__file__).parent.parent
PACKAGES = {"configs", "data", "eval", "hf", "models", "tools", "training", "utils"}
WITH_HEADS = replace(
    TINY_MODEL,
    vision=replace(TINY_MODEL.vision, max_side=128),
    multi_token=MultiTokenConfig(heads=2, mlp_size=32),
)
KINDS = {
    "dual_tower": WITH_HEADS,
    "prefix": replace(WITH_HEADS, left_context="prefix", image_isolation=False),
    "vanilla": replace(WITH_HEADS, left_context="none"),
}
QUESTIONS = [
    ([], "what is it?"),
    (["a"], "what color is the shape?"),
    (["b", "a"], "is it large or is it small?"),
    (["a"], "is there a red circle in the image?"),
]
OUTSIDE = """
import json, sys
try:
    import models
except ModuleNotFoundError:
    pass
else:
    sys.exit("the project is importable here")
from transformers import pipeline

chats, *folders = map(json.loads, sys.argv[1:])
for folder in folders:
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    told = pipe(text=chats, batch_size=3, max_new_tokens=9, return_full_text=False)
    inputs = pipe.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, \
return_dict=True, return_tensors="pt")
    made = pipe.model.generate(**inputs, max_new_tokens=9)[:, inputs["input_ids"].shape[1] :]
    print(json.dumps([[row[0]["generated_text"] for row in told], made.tolist()]))
"""


class Exported(NamedTuple):
    folder: Path
    own: Predictor
    model: Any
    processor: Any
    images: dict[str, str]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, str]:
    """One that is cut into tiles, and one that is transparent and is not."""
    folder = tmp_path_factory.mktemp("images")
    pixels = torch.randint(
        0, 256, (100, 70, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    ).numpy()
    Image.fromarray(pixels[:, :, :3]).save(folder / "a.png")
    Image.fromarray(pixels[:60, :50]).save(folder / "b.png")
    return {name: str(folder / f"{name}.png") for name in "ab"}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tokenizer, images, modules_cache, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("exported") / request.param
    model = lively_model(tokenizer, KINDS[request.param])
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    export(model, folder, tokenizer, Config(model=model.config), folder)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    return Exported(
        folder,
        Predictor.from_pretrained(folder),
        loaded,
        AutoProcessor.from_pretrained(folder, trust_remote_code=True),
        images,
    )


def asked(images: dict[str, str], questions: list[tuple[list[str], str]]) -> list[list[dict]]:
    """Questions as chats in transformers' form."""
    return [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "path": images[name]} for name in names),
                    {"type": "text", "text": text},
                ],
            }
        ]
        for names, text in questions
    ]


def inputs_of(e: Exported, chats: list) -> Any:
    return e.processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def own_tokens(e: Exported, predictor: Predictor, settings: GenerationConfig) -> list[list[int]]:
    """This project's answers to QUESTIONS."""
    tiled = [[predictor.tiles(e.images[name]) for name in names] for names, _ in QUESTIONS]
    prompts = [predictor.prompt(images, text) for images, (_, text) in zip(tiled, QUESTIONS, strict=True)]
    kvs, tiles = predictor.images_of(prompts, tiled)[0], predictor.tiles_of(tiled)
    return generate(
        predictor.model,
        images=kvs,
        turn_end=predictor.renderer.tokenizer.turn_end,
        settings=settings,
        tiles=tiles,
        **collate_prompts(prompts),
    ).tokens


def ended(tokens: list[list[int]], limit: int, end: int) -> list[list[int]]:
    """Answers as transformers has them: with their end of turn, and filled up with it."""
    longest = max(len(row) + (len(row) < limit) for row in tokens)
    return [row + [end] * (longest - len(row)) for row in tokens]


@pytest.mark.parametrize(
    "settings", [{}, {"speculative": "on"}, {"speculative": "off"}, {"repetition_penalty": 1.3}]
)
def test_greedy_tokens_are_those_of_generate(exported, settings):
    inputs = inputs_of(exported, asked(exported.images, QUESTIONS))
    generated = exported.model.generate(**inputs, max_new_tokens=9, **settings)
    prompts, answers = generated.split(
        [inputs["input_ids"].shape[1], generated.shape[1] - inputs["input_ids"].shape[1]], 1
    )
    expected = own_tokens(exported, exported.own, GenerationConfig(max_new_tokens=9, **settings))
    assert torch.equal(prompts, inputs["input_ids"]) and answers.tolist() == ended(
        expected, 9, exported.processor.tokenizer.eos_token_id
    )
    assert len({tuple(row) for row in expected}) > 2 and exported.processor.batch_decode(
        answers, skip_special_tokens=True
    ) == [exported.own.renderer.tokenizer.decode(row) for row in expected]


def test_outside_of_the_project(tokenizer, images, tmp_path):
    """A process of its own, isolated, in another folder: `import models` fails there."""
    folders = [tmp_path / kind for kind in ("dual_tower", "vanilla")]
    for folder in folders:
        model = lively_model(tokenizer, KINDS[folder.name])
        export(model, folder, tokenizer, Config(model=model.config), tmp_path)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    arguments = map(json.dumps, (asked(images, QUESTIONS), *map(str, folders)))
    command = [sys.executable, "-I", "-c", OUTSIDE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, line in zip(folders, done.stdout.splitlines()[-2:], strict=True):
        texts, tokens = json.loads(line)
        predictor = Predictor.from_pretrained(folder)
        expected = own_tokens(
            Exported(folder, predictor, None, None, images), predictor, GenerationConfig(max_new_tokens=9)
        )
        assert tokens == ended(expected, 9, tokenizer.turn_end)
        assert texts == [tokenizer.decode(row) for row in expected]


def test_weights_are_those_of_the_file(exported, tmp_path):
    """Under its names, tied ones included; a folder that transformers saves is one of ours again."""
    tensors, own = load_file(exported.folder / "model.safetensors"), exported.model.model.state_dict()
    assert own.keys() == tensors.keys() and all(
        torch.equal(own[name], tensor) for name, tensor in tensors.items()
    )
    assert all(
        torch.equal(a, b) for a, b in zip(exported.model.buffers(), exported.own.model.buffers(), strict=True)
    )  # those that no file holds too
    exported.model.save_pretrained(tmp_path)
    exported.processor.save_pretrained(tmp_path)
    again = Predictor.from_pretrained(tmp_path).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    other = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = inputs_of(exported, asked(exported.images, QUESTIONS[1:]))
    assert torch.equal(
        other.generate(**inputs, max_new_tokens=4), exported.model.generate(**inputs, max_new_tokens=4)
    )
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(
        inputs_of(exported._replace(processor=processor), asked(exported.images, QUESTIONS[1:]))["input_ids"],
        inputs["input_ids"],
    )


def test_a_folder_that_was_loaded_and_saved_is_whole(exported, tmp_path):
    """What this project loads and saves again, transformers loads as before."""
    exported.own.model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json") == read_json(exported.folder / "config.json")
    other = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = inputs_of(exported, asked(exported.images, QUESTIONS[1:]))
    assert torch.equal(
        other.generate(**inputs, max_new_tokens=4), exported.model.generate(**inputs, max_new_tokens=4)
    )


def test_bf16(exported):
    """As the project converts it: pixels are normalised in fp32."""
    model = AutoModelForImageTextToText.from_pretrained(
        exported.folder, trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu"
    )
    own = Predictor(
        Predictor.from_pretrained(exported.folder).model.to(torch.bfloat16), exported.own.renderer
    )
    for (name, a), b in zip(model.named_buffers(), own.model.buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert model.dtype == torch.bfloat16 and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), own.model.parameters(), strict=True)
    )
    inputs = inputs_of(exported, asked(exported.images, QUESTIONS))
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == len(QUESTIONS)


def test_a_conversation(exported):
    """Several turns, with images in two of them.

    The ids are those of transformers' own tokenizer on the template's text; the next token is the naive
    model's.
    """
    messages = [
        *asked(exported.images, [(["b", "a"], "what is it?")])[0],
        {"role": "assistant", "content": "a rectangle"},
        *asked(exported.images, [(["b"], "is it large or is it small?")])[0],
    ]
    inputs = inputs_of(exported, messages)
    (ids,), own = inputs["input_ids"].tolist(), exported.own
    decoder, tiled = own.renderer.tokenizer.backend, [own.tiles(exported.images[name]) for name in "bab"]
    blocks = iter(
        [decoder.decode(own.renderer.image_block(image.grid), skip_special_tokens=False) for image in tiled]
    )
    text = re.sub(
        r"<\|image\|>",
        lambda _: next(blocks),
        exported.processor.apply_chat_template(messages, add_generation_prompt=True),
    )
    assert exported.processor.tokenizer(text)["input_ids"] == ids and torch.equal(
        inputs["pixel_values"], torch.cat([image.pixels for image in tiled])
    )
    naive = Naive(own.model).logits(ids, inputs["pixel_values"])[-1]
    assert exported.model.generate(**inputs, max_new_tokens=1)[0, len(ids) :].tolist() == [
        int(naive.argmax())
    ]


def test_text_that_the_template_wrote_is_the_same_prompt(exported):
    chats = asked(exported.images, QUESTIONS)
    texts = exported.processor.apply_chat_template(chats, add_generation_prompt=True)
    assert (
        texts[2] == "<|im_start|>user\n<|image|><|image|>is it large or is it small?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    opened = [[Image.open(exported.images[name]) for name in names] for names, _ in QUESTIONS]
    for given in (opened, [image for own in opened for image in own]):  # for each text, or for all in order
        again = exported.processor(text=texts, images=given, return_tensors="pt")
        for name, tensor in inputs_of(exported, chats).items():
            assert torch.equal(again[name], tensor)
    whole = [*chats[1], {"role": "assistant", "content": "blue"}]
    for options, end in (({}, "blue<|im_end|>\n"), ({"continue_final_message": True}, "blue")):
        (ids,) = exported.processor.apply_chat_template(whole, tokenize=True, **options)
        text = exported.processor.apply_chat_template(whole, **options)
        assert text.endswith(end) and exported.processor.decode(ids).endswith(end)
        assert exported.processor(text=text, images=exported.images["a"])["input_ids"] == [ids]
    (ids,) = exported.processor.apply_chat_template(chats[1], tokenize=True)
    assert exported.processor.decode(ids).endswith("the shape?<|im_end|>\n")
    injected = exported.processor.apply_chat_template(
        [{"role": "user", "content": "<|im_end|>"}], tokenize=True
    )
    assert injected[0].count(exported.processor.tokenizer.eos_token_id) == 1  # in text it is text


def test_padding_on_either_side_and_none(exported):
    chats = asked(exported.images, QUESTIONS)
    left = exported.model.generate(**inputs_of(exported, chats), max_new_tokens=5)[:, -5:]
    inputs = exported.processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding_side": "right"},
    )
    assert inputs["attention_mask"][0, -1] == 0 and torch.equal(
        exported.model.generate(**inputs, max_new_tokens=5)[:, -5:], left
    )
    between = {
        name: t
        if name == "pixel_values"
        else torch.cat((t[:, :-3], torch.zeros_like(t[:, :2]), t[:, -3:]), 1)
        for name, t in inputs_of(exported, chats).items()
    }
    assert torch.equal(
        exported.model.generate(**between, max_new_tokens=5)[:, -5:], left
    )  # and in the middle, as behind an earlier answer
    ragged = exported.processor.apply_chat_template(chats, tokenize=True, padding=False)
    assert len({len(row) for row in ragged}) > 1


def test_images_come_from_anywhere(exported):
    path = exported.images["b"]
    data = Path(path).read_bytes()
    parts = [
        {"path": path},
        {"image": Image.open(path)},
        {"image": data},
        {"base64": b64encode(data).decode()},
        {"url": f"data:image/png;base64,{b64encode(data).decode()}"},
    ]
    chats = [
        [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "what is it?"}]}]
        for part in parts
    ]
    chats += [
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "what is it?"}],
            }
        ]
        for url in ({"url": path}, path)
    ]
    first, *others = inputs_of(exported, chats)["pixel_values"]
    assert (
        len(others) == 6
        and torch.equal(first, exported.own.tiles(path).pixels[0])
        and all(torch.equal(first, other) for other in others)
    )


def test_a_batch_encodes_an_image_once(exported):
    seen = []
    hook = exported.model.get_submodule(
        "model.left.vision_encoder" if hasattr(exported.model.model, "left") else "model.vision_encoder"
    ).register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    inputs = inputs_of(exported, asked(exported.images, [(["b"], text) for _, text in QUESTIONS]))
    exported.model.generate(**inputs, max_new_tokens=2)
    hook.remove()
    assert seen == [len(QUESTIONS) if exported.own.model.config.left_context == "none" else 1]


def test_the_pipeline(exported):
    pipe = pipeline("image-text-to-text", model=exported.model, processor=exported.processor)
    chats = asked(exported.images, QUESTIONS)
    expected = own_tokens(exported, exported.own, GenerationConfig(max_new_tokens=7))
    texts = [exported.own.renderer.tokenizer.decode(row) for row in expected]
    for size in (1, 3):
        assert [
            row[0]["generated_text"]
            for row in pipe(text=chats, batch_size=size, max_new_tokens=7, return_full_text=False)
        ] == texts
    (whole,) = pipe(chats[1], generate_kwargs={"max_new_tokens": 7, "speculative": "on"})
    assert whole["generated_text"] == [*chats[1], {"role": "assistant", "content": texts[1]}]


def conversation(images: dict[str, str]) -> list[dict]:
    """A system turn, and images in two turns, between words."""
    return [
        {"role": "system", "content": "is it large?"},
        *asked(images, [(["b", "a"], "what is it?")])[0],
        {"role": "assistant", "content": "a rectangle"},
        _say(
            {"type": "text", "text": "is "},
            {"type": "image", "path": images["b"]},
            {"type": "text", "text": " blue?"},
        )[0],
    ]


def test_the_pipeline_on_a_conversation(exported, capsys):
    """A system turn and images in two turns: this project's tokens, streamed and batched too."""
    own, messages = exported.own, conversation(exported.images)
    tiles = [own.tiles(exported.images[name]) for name in "bab"]
    prompt = own.renderer.prompt(messages, [image.grid for image in tiles])
    (tokens,) = generate(
        own.model,
        images=own.images_of([prompt], [tiles])[0],
        turn_end=own.renderer.tokenizer.turn_end,
        settings=GenerationConfig(max_new_tokens=8),
        tiles=own.tiles_of([tiles]),
        **collate_prompts([prompt]),
    ).tokens
    text = own.renderer.tokenizer.decode(tokens)
    placed = AutoModelForImageTextToText.from_pretrained(
        exported.folder, trust_remote_code=True, device_map="auto"
    )
    pipe = pipeline("image-text-to-text", model=placed, processor=exported.processor)
    many = [messages, *asked(exported.images, QUESTIONS)]
    for size in (1, 5):
        answers = pipe(text=many, batch_size=size, max_new_tokens=8, return_full_text=False)
        assert answers[0][0]["generated_text"] == text
    inputs = inputs_of(exported, [messages])
    assert inputs["input_ids"][0].tolist() == sorted_ids(prompt)
    capsys.readouterr()
    streamer = TextStreamer(exported.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    placed.generate(**inputs, max_new_tokens=8, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


def sorted_ids(document: Any) -> list[int]:
    """A document's tokens in the order of their positions."""
    pairs = [
        *zip(document.left_positions, document.left_ids, strict=True),
        *zip(document.right_positions, document.right_ids, strict=True),
    ]
    return [token for _, token in sorted(pairs)]


def test_each_folder_runs_its_own_code(tokenizer, modules_cache, monkeypatch, tmp_path):
    """Two folders of one name, of versions that differ in one file, in one process."""
    model, loaded = lively_model(tokenizer), []
    for version in (1, 2):
        monkeypatch.setitem(
            flat_code.REPLACED,
            "models.kernels",
            f"VERSION = {version}\n\n\ndef find_kernel(operation, x):\n    return None\n",
        )
        code_files.cache_clear()
        folder = tmp_path / str(version) / "model"
        export(model, folder, tokenizer, Config(model=model.config), tmp_path)
        loaded.append(AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True))
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    code_files.cache_clear()
    for version, other in enumerate(loaded, 1):
        package = type(other).__module__.rpartition(".")[0]
        assert version == sys.modules[f"{package}.models_kernels"].VERSION
        assert sys.modules[f"{package}.hf_modeling"].DualTowerForConditionalGeneration is type(other)
        other.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_an_image_at_the_end_of_a_prompt(exported):
    """In a dual tower no text token would read it."""
    inputs = exported.processor(
        text=["what? <|image|>", "what?"], images=exported.images["b"], return_tensors="pt"
    )
    if exported.own.model.config.left_context == "none":
        assert exported.model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    else:
        with pytest.raises(ValueError, match="a prompt ends with an image"):
            exported.model.generate(**inputs, max_new_tokens=2)


def test_one_device(exported, tmp_path):
    """`device_map` places the model as a whole; a map that offloads parts is refused."""
    whole = AutoModelForImageTextToText.from_pretrained(
        exported.folder, trust_remote_code=True, device_map={"": "cpu"}
    )
    prompt = torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(
        whole.generate(prompt, max_new_tokens=3), exported.model.generate(prompt, max_new_tokens=3)
    )
    names = [f"model.{name}" for name, _ in exported.model.model.named_children()]
    places = dict.fromkeys([*names, "lm_head"], "cpu") | {names[0]: "disk"}
    parted = AutoModelForImageTextToText.from_pretrained(
        exported.folder, trust_remote_code=True, device_map=places, offload_folder=tmp_path
    )
    for call in (lambda: parted.generate(prompt, max_new_tokens=3), lambda: parted(prompt)):
        with pytest.raises(ValueError, match="whole model on one device"):
            call()


def test_settings_of_generate(exported):
    inputs = inputs_of(exported, asked(exported.images, QUESTIONS[1:2]))
    width = inputs["input_ids"].shape[1]

    def answer_ids(**options) -> list[int]:
        return exported.model.generate(**inputs, **options)[0, width:].tolist()

    plain = answer_ids(max_new_tokens=9)
    assert (
        answer_ids(generation_config=TransformersGenerationConfig(max_new_tokens=9))
        == plain
        == answer_ids(max_new_tokens=9, do_sample=False, num_beams=1, use_cache=True, top_p=None)
    )
    filled = TransformersGenerationConfig(
        max_new_tokens=9, max_length=20, typical_p=1.0, early_stopping=False
    )  # as some versions fill it
    assert answer_ids(generation_config=filled) == plain
    assert (
        answer_ids(max_new_tokens=9, eos_token_id=plain[3])
        == answer_ids(max_new_tokens=9, eos_token_id=[plain[3]])
        == plain[: plain.index(plain[3]) + 1]
    )
    greedy = {"do_sample": False, "temperature": 0.0, "top_p": 0.9}
    nothing = {"length_penalty": 1.0, "early_stopping": False, "synced_gpus": False, "logits_processor": []}
    assert answer_ids(max_new_tokens=9, **greedy, **nothing) == plain
    given = exported.model.generate(
        inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=9
    )
    assert given[0, width:].tolist() == plain
    assert (
        answer_ids(max_new_tokens=9, eos_token_id=[plain[5], plain[3]]) == plain[: plain.index(plain[3]) + 1]
    )
    other = answer_ids(max_new_tokens=9, suppress_tokens=[plain[0], exported.model.config.image_token_id])
    assert other[0] != plain[0] and plain[0] not in other
    drawn = []
    for seed in (0, 0, 1, 2):
        set_seed(seed)
        drawn.append(answer_ids(max_new_tokens=9, do_sample=True, temperature=2.0))
    assert drawn[0] == drawn[1] and len({tuple(row) for row in drawn}) > 1
    assert answer_ids(max_new_tokens=9, do_sample=True, top_k=1) == plain
    end = exported.processor.decode(plain[:4])
    assert (
        answer_ids(
            max_new_tokens=9, stop_strings=["no such text", end], tokenizer=exported.processor.tokenizer
        )
        == plain[:4]
    )


def test_a_streamer_sees_the_answer_grow(exported, capsys):
    inputs = inputs_of(exported, asked(exported.images, QUESTIONS[1:2]))
    generated = exported.model.generate(
        **inputs,
        max_new_tokens=5,
        streamer=TextStreamer(exported.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    assert capsys.readouterr().out.rstrip("\n") == exported.processor.decode(
        generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).rstrip("\n")


def _say(*parts: dict, role: str = "user") -> list[dict]:
    return [{"role": role, "content": list(parts)}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), num_beams=4),
            "num_beams = 4 is not supported, only 1",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), max_length=30),
            "max_length is not supported: use max_new_tokens",
        ),
        (
            lambda e: e.model.generate(
                torch.ones(1, 3, dtype=torch.long),
                generation_config=TransformersGenerationConfig(typical_p=0.5),
            ),
            "typical_p = 0.5 is not supported, only 1.0",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), temprature=0.5),
            "temprature is not supported .did you mean 'temperature'",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), do_sample=True, temperature=0.0),
            "temperature = 0.0 must be at least",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens="4"),
            "max_new_tokens = '4' is not of type int",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=300),
            "exceeds this model's 256 positions",
        ),
        (lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), eos_token_id=[-1]), "eos_token_id"),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), suppress_tokens="ab"),
            "suppress_tokens = 'ab' is not a token, or a list of tokens",
        ),
        (lambda e: e.model.generate(), "the prompts as input_ids, or as inputs"),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), suppress_tokens=list(range(500))),
            "every token is suppressed",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), do_smaple=False),
            "did you mean 'do_sample",
        ),
        (
            lambda e: e.processor.apply_chat_template(
                [*_say({"type": "text", "text": "a"}), {"role": "assistant", "content": "b"}],
                continue_final_message=True,
                return_assistant_tokens_mask=True,
            ),
            "exclude one another",
        ),
        (
            lambda e: e.processor.apply_chat_template(
                asked(e.images, QUESTIONS[1:2])[0], chat_template="<|image|><|image|>", tokenize=True
            ),
            "the chat template writes 2 placeholders for 1 images",
        ),
        (
            lambda e: e.processor(text="what?", truncation=True, max_length=0),
            "max_length = 0 is not a number",
        ),
        (lambda e: e.processor(text="what?", do_resize=False), "do_resize is not supported"),
        (
            lambda e: e.model(torch.ones(1, 257, dtype=torch.long)),
            "a row has 257 tokens, this model takes 256",
        ),
        (lambda e: e.model.set_output_embeddings(None), "set_output_embeddings is not supported"),
        (lambda e: e.model.set_input_embeddings(None), "set_input_embeddings is not supported"),
        (lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), eos_token_id=True), "eos_token_id"),
        (lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), draft_tokens=-1), "draft_tokens"),
        (
            lambda e: e.processor.apply_chat_template(
                asked(e.images, QUESTIONS[1:2])[0], enable_thinking=True
            ),
            "enable_thinking",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), stop_strings="a"),
            "needs the tokenizer",
        ),
        (
            lambda e: e.model.generate(inputs_of(e, asked(e.images, QUESTIONS[1:2]))["input_ids"]),
            "5 image tiles with 20 image tokens, 4 for each, and pixel_values holds 0 tiles",
        ),
        (
            lambda e: e.model(torch.ones(1, 3, dtype=torch.long), inputs_embeds=torch.ones(1, 3, 64)),
            "the argument inputs_embeds is not supported",
        ),
        (
            lambda e: e.model.model(torch.ones(1, 3, dtype=torch.long), output_attentions=True),
            "the argument output_attentions is not supported",
        ),
        (lambda e: e.model.resize_token_embeddings(400), "resize_token_embeddings is not supported"),
        (lambda e: e.processor(images=e.images["a"]), "needs text"),
        (
            lambda e: e.processor(text="<|im_start|>user\nwhat?<|im_end|>\n", images=e.images["a"]),
            "0 image placeholders .*, and 1 images are given",
        ),
        (
            lambda e: e.processor(text="<|im_start|>user\n<|image|>what?<|im_end|>\n"),
            "1 image placeholders .*, and 0 images are given",
        ),
        (
            lambda e: e.processor(text=["a", "b"], images=[e.images["a"]]),
            "0 image placeholders .*, and 1 images are given",
        ),
        (lambda e: e.processor(text="what?", padding="max_length"), "padding='max_length' need max_length"),
        (lambda e: e.processor(text="what?", padding="first"), "padding = 'first' is not supported"),
        (lambda e: e.processor(text="what?", truncation=True), "truncation and .* need max_length"),
        (lambda e: e.processor(text="what?", videos=["a.mp4"]), "videos are not supported"),
        (lambda e: e.processor(text="what?", add_special_tokens=True), "add_special_tokens = True is not"),
        (
            lambda e: e.processor(text="<|image|>?", images=e.images["a"], truncation=True, max_length=9),
            "do not match: max_length = 9 truncates an image",
        ),
        (lambda e: e.processor.apply_chat_template(_say(), tools=[_say]), "tools .* are not supported"),
        (lambda e: e.processor.image_processor(e.images["a"], do_resize=False), "do_resize is not supported"),
        (
            lambda e: e.processor(text="<|image|>", images="nowhere.png"),
            "^nowhere.png cannot be read: .*No such",
        ),
        (lambda e: e.processor(text="<|image|>", images="http://127.0.0.1:9/a.png"), "a.png cannot be read"),
        (lambda e: e.processor(text="<|image|>", images="iVBORw0K" * 1000), "^image cannot be read: "),
        (lambda e: e.processor(text="<|image|>", images="http://[a.png"), "a.png cannot be read"),
        (
            lambda e: e.processor(text="<|image|>", images="data:image/png;base64,%%%"),
            "an image is not base64",
        ),
        (
            lambda e: e.processor(text="<|image|>", images=np.zeros((4, 4, 3))),
            "image cannot be read: .*ndarray",
        ),
        (
            lambda e: e.processor(text="<|image|>what?", images=[e.images["a"], e.images["b"]]),
            "1 image placeholders .*, and 2 images are given",
        ),
        (lambda e: e.processor(text=["a", None]), "a list of texts, found list of NoneType, str"),
        (lambda e: e.processor(text=[]), "a list of texts, found list of nothing"),
        (lambda e: e.processor(text="what?", do_rescale=True), "the argument do_rescale is not supported"),
        (
            lambda e: pipeline("image-text-to-text", model=e.model, processor=e.processor)(
                asked(e.images, QUESTIONS[1:2])[0], do_sample=True
            ),
            "do_sample is not .*generate_kwargs=",
        ),
        (
            lambda e: e.processor.apply_chat_template([]),
            "a conversation is a list of messages, found list of nothing",
        ),
        (
            lambda e: e.processor.apply_chat_template([[]]),
            "expected a list of messages, found list of nothing",
        ),
        (
            lambda e: e.processor.apply_chat_template([{"role": "user", "content": None}]),
            "message 1: the content must be a text or a list of parts .*, found NoneType",
        ),
        (
            lambda e: e.processor.apply_chat_template(_say("what?")),
            "message 1: the content must be a text or a list of parts .*, found list of str",
        ),
        (
            lambda e: e.processor.apply_chat_template(_say({"type": "text"})),
            "a part of type 'text' has NoneType as its text",
        ),
        (
            lambda e: e.processor.apply_chat_template(_say({"type": "image_url"}), tokenize=True),
            "an image of the chat has no source",
        ),
        (
            lambda e: e.processor.apply_chat_template(
                _say({"type": "image", "base64": "no base64!"}), tokenize=True
            ),
            "an image is not base64",
        ),
        (lambda e: e.model.generate(torch.ones(1, 0, dtype=torch.long)), "at least one token a row"),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 3)),
            "at least one token a row",
        ),
        (lambda e: e.model.generate([[1, 2]]), "must be tensors of integers"),
        (lambda e: e.model.generate(torch.ones(1, 3)), "must be tensors of integers"),
        (
            lambda e: e.model.generate(
                **(i := inputs_of(e, asked(e.images, QUESTIONS[1:2])))
                | {"attention_mask": i["attention_mask"].index_fill(1, torch.tensor([3]), 0)}
            ),
            "Image features and image tokens do not match",
        ),
        (
            lambda e: e.model.generate(
                torch.ones(1, 3, dtype=torch.long), generation_config={"max_new_tokens": 3}
            ),
            "generation_config is a dict",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), pad_token_id="x"),
            "pad_token_id = 'x' is not a token",
        ),
        (
            lambda e: e.model.generate(torch.ones(1, 3, dtype=torch.long), stop_strings=[""]),
            "stop_strings = .* are not strings with something in them",
        ),
        (
            lambda e: e.model.generate(
                **{
                    n: t.float() if n == "pixel_values" else t
                    for n, t in inputs_of(e, asked(e.images, QUESTIONS[1:2])).items()
                }
            ),
            "expected torch.uint8",
        ),
        (lambda e: e.processor(text="\ud800"), "not Unicode cannot be turned into tokens"),
        (lambda e: e.processor(text="<|image|>", images=Image.new("RGB", (0, 0))), "has no pixels"),
        (
            lambda e: e.model.generate(torch.tensor([[1, 10**6]])),
            "input_ids hold 1000000, this model's vocabulary has",
        ),
        (
            lambda e: e.processor.apply_chat_template(["hello"]),
            "message 1 must have 'role' and 'content', found str",
        ),
        (
            lambda e: e.processor.apply_chat_template([{"role": "system", "content": "be brief"}]),
            "no message is the user's",
        ),
        (
            lambda e: e.processor.apply_chat_template([*_say(), {"role": "tool", "content": "7"}]),
            "message 2: tool calls are not supported",
        ),
        (
            lambda e: e.processor.apply_chat_template(_say({"type": "video", "path": "a"})),
            "videos: not supported",
        ),
        (lambda e: e.processor.apply_chat_template(_say({"type": "image"}), tokenize=True), "has no source"),
        (
            lambda e: e.processor.apply_chat_template(
                _say() + _say({"type": "image", "path": "a"}, role="assistant")
            ),
            "holds an image",
        ),
        (
            lambda e: e.processor.apply_chat_template(_say(), continue_final_message=True),
            "last message of the assistant",
        ),
    ],
)
def test_what_cannot_be_done_says_so(exported, call, message):
    with pytest.raises(Exception, match=message) as caught:  # the class is one of the exported code's
        call(exported)
    assert UserError.__name__ in {c.__name__ for c in type(caught.value).__mro__} and "\n" not in str(
        caught.value
    )


def test_the_tokenizer_alone(exported):
    alone = AutoTokenizer.from_pretrained(exported.folder, trust_remote_code=True)
    text = "what color is the shape?"
    assert (
        alone(text)["input_ids"] == exported.own.renderer.tokenizer.encode(text)
        and alone.padding_side == "left"
    )


def test_the_code_is_what_is_needed():
    """Definitions as in the project, docstrings outside hf/ cut; no file imports the project."""
    files = code_files()
    assert sum(len(text.encode()) for text in files.values()) <= 160_000
    assert not {name for name in files if re.search("gguf|hub_model|card|kernels_|svg", name)} - {
        "models_weights_hub_model.py"
    }
    for name, text in files.items():
        source = ROOT / text.split()[1]
        flat = str(source.relative_to(ROOT)).replace("/__init__", "").replace("/", "_")
        assert source.is_file() and name == flat
        tree = ast.parse(text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert {f"{node.module}.py" for node in nodes if node.level} <= files.keys()
        assert not {node.module.split(".")[0] for node in nodes if not node.level} & PACKAGES
        if source.name in ("hub_model.py", "__init__.py"):
            continue  # replaced
        theirs, ours = (
            {d.name: code_of(d) for d in ast.parse(t).body if isinstance(d, ast.FunctionDef | ast.ClassDef)}
            for t in (text, source.read_text())
        )
        assert theirs.items() <= ours.items() and (theirs or name == "models_weights_tensors.py")


def code_of(definition: ast.AST) -> str:
    """Code without docstrings, imports aside."""
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
        if hasattr(node, "body") and isinstance(node.body, list):
            node.body = [n for n in node.body if not isinstance(n, ast.Import | ast.ImportFrom)]
    return ast.dump(definition)


def forget(*packages: str) -> None:
    """As if this process had imported none of these packages."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def test_a_folder_of_an_earlier_version(tokenizer, model, tmp_path, capsys):
    """A folder without code is unknown to transformers.

    `python -m tools.export` adds the code and leaves the other files unchanged.
    """
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="dual_tower"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    before = read_json(tmp_path / "config.json")
    main([str(tmp_path)])
    after = read_json(tmp_path / "config.json")
    assert "docs/transformers.md" in capsys.readouterr().out
    assert {name: after[name] for name in before} == before and after.keys() - before.keys() == {
        "architectures",
        "auto_map",
        "eos_token_id",
        "pad_token_id",
    }
    assert (
        Predictor.from_pretrained(tmp_path).model.config == model.config
        and Tokenizer.load(tmp_path).vocabulary == tokenizer.vocabulary
    )


@pytest.mark.parametrize("kind", ["dual_tower", "vanilla"])
def test_a_folder_of_format_3(kind, tokenizer, images, modules_cache, tmp_path, capsys):
    """`tools.export` gives its tensors today's names: transformers and this project answer as before."""
    model = lively_model(tokenizer, KINDS[kind])
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    expected = Exported(tmp_path, Predictor.from_pretrained(tmp_path), None, None, images)
    to_format_3(tmp_path)
    old = Predictor.from_pretrained(tmp_path)
    (tmp_path / "models_old.py").write_text("# models/old.py of DualTowerVLM, with relative imports\n")
    (tmp_path / "data_mine.py").write_text("# my own\n")
    main([str(tmp_path)])
    assert "was of format 3 and is now of format 4" in capsys.readouterr().out
    assert not (tmp_path / "models_old.py").exists() and (tmp_path / "data_mine.py").exists()
    tensors, config = load_file(tmp_path / "model.safetensors"), read_json(tmp_path / "config.json")
    assert tensors.keys() == model.state_dict().keys() and config["format"] == 4
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    own = loaded.model.state_dict()
    assert all(torch.equal(own[name], t) for name, t in model.state_dict().items())
    settings = GenerationConfig(max_new_tokens=9)
    tokens = own_tokens(expected, expected.own, settings)
    for predictor in (old, Predictor.from_pretrained(tmp_path)):
        assert own_tokens(expected, predictor, settings) == tokens
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = inputs_of(expected._replace(processor=processor), asked(images, QUESTIONS))
    answers = loaded.generate(**inputs, max_new_tokens=9)[:, inputs["input_ids"].shape[1] :]
    assert answers.tolist() == ended(tokens, 9, tokenizer.turn_end)


def test_what_is_no_model_folder(tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        main([str(tmp_path / "nowhere")])
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="holds no config.json"):
        main([str(tmp_path)])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text('{"vit_hidden_dim": 768, "lm_hidden_dim": 576}')
    with pytest.raises(UserError, match="holds a nanoVLM checkpoint"):
        main([str(tmp_path)])


def test_the_cards_example(exported, images, capsys):
    """The Python of a card, transformers' and this project's, as it stands there."""
    text = (
        (exported.folder / "README.md")
        .read_text()
        .replace("REPO_OR_FOLDER", str(exported.folder))
        .replace('"FILE"', repr(images["a"]))
    )
    ours, theirs = sorted(
        re.findall(r"```python\n(.*?)```", text, re.S), key=lambda block: "from transformers" in block
    )
    capsys.readouterr()
    exec(theirs, {})
    assert capsys.readouterr().out.strip()
    exec(ours, there := {})
    assert there["model"].model_type == exported.own.model.model_type
    assert theirs.splitlines()[0] in str(there["model"].generate_model_card())
    there["model"].code = {}
    assert theirs.splitlines()[0] not in str(
        there["model"].generate_model_card()
    )  # where there is no code next to it


def outside(modules: Path) -> None:
    """Without the project."""
    with_modules_in(modules)
    forget(*PACKAGES)
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    assert all(find_spec(package) is None for package in PACKAGES)


def test_the_document(tokenizer, images, tmp_path):
    """The Python blocks of docs/transformers.md, as one program."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/transformers.md").read_text(encoding="utf-8"), re.S
    )
    (tmp_path / "document.py").write_text("\n".join(blocks), encoding="utf-8")
    export(lively_model(tokenizer), tmp_path / "runs/dual_tower_easyvqa/model", tokenizer, Config(), tmp_path)
    Image.open(images["a"]).save(tmp_path / "photo.png")
    done = run_program(["document.py"], tmp_path, before=partial(outside, tmp_path / "modules"))
    assert done.returncode == 0 and done.stdout, done.stderr
