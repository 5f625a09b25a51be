"""Messages: what is checked, where images stand, and that every program renders a conversation alike."""

import base64
import json
from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from configs.model import GenerationConfig
from configs.serialization import to_dict
from configs.train import DataConfig
from data.collators import collate
from data.conversations import (
    IMAGE_PART,
    ConversationError,
    ask,
    checked,
    collect_images,
    conversations_of,
    placed_conversations,
    placed_page,
    split_at_images,
    text_part,
    with_images,
    without,
)
from data.datasets import Sample, SampleDataset
from data.formats import jsonl
from data.images import Tiles, open_image
from data.mixture import InMemoryRecords, Source
from data.render import IGNORE, Renderer
from eval.lmms_eval_wrapper import user_message
from eval.predictor import Predictor
from hf.image_processing import DualTowerImageProcessor
from hf.processing import DualTowerProcessor
from models.kernels import use_kernels
from tests.conftest import TINY_MODEL, lively_model, random_tiles, tiny_model

RED, BLUE = ({"type": "image", "path": f"{name}.png"} for name in ("red", "blue"))
CHAT = [
    {"role": "system", "content": "is it large or is it small?"},
    {"role": "user", "content": [text_part("a "), IMAGE_PART, text_part(" or "), IMAGE_PART, text_part("?")]},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": [text_part("what is it? "), IMAGE_PART]},
    {"role": "assistant", "content": "a rectangle"},
]


def says(*roles: str) -> list[dict]:
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "expected a list of messages, found str"),
        ([], "expected a list of messages, found list of nothing"),
        (["hello"], "message 1 must have 'role' and 'content', found str"),
        ([{"role": "user"}], r"message 1 must have 'role' and 'content', found \['role'\]"),
        (says("user", "robot"), "message 2 is of role 'robot'; supported are system, user, assistant"),
        (says("user", "tool"), "message 2: tool calls are not supported"),
        ([*says("user"), {"role": "assistant", "content": "", "tool_calls": [{}]}], "tool calls"),
        (says("user", "system"), "message 2 is a system message: it must be the first"),
        (says("system", "assistant"), "no message is the user's"),
        (
            [{"role": "user", "content": {}}],
            "the content must be a text or a list of parts .*dict",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "message 1: audio: not supported"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "message 1: videos: not supported"),
        ([{"role": "user", "content": [{"type": "box"}]}], "message 1: parts of type 'box': not supported"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "NoneType as its text"),
        ([*says("user"), {"role": "assistant", "content": [IMAGE_PART]}], "only the user shows images"),
    ],
)
def test_what_is_no_conversation_is_named(messages, problem):
    with pytest.raises(ConversationError, match=problem):
        checked(messages)


def test_openai_parts_and_an_empty_answer():
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, {"type": "image_url"}]
    messages = checked([{"role": "user", "content": content[:1]}, {"role": "assistant", "content": None}])
    assert messages[1]["content"] == "" and messages[0]["content"] == [
        {"type": "image", "url": "data:image/png;base64,AA"}
    ]


def test_images_of_parts_become_the_records():
    parts = [
        {"type": "image", "image": {"bytes": b"red", "path": "red.png"}},
        {"type": "image_url", "image_url": {"url": "data:,blue"}},
        {"type": "image", "base64": "AA", "index": 7},
        {"type": "image", "path": "red.png"},
        {"type": "image", "image": {"bytes": b"red", "path": None}},
    ]
    images = [b"red", "data:,blue", "data:;base64,AA", "red.png"]
    one, two = [{"role": "user", "content": parts}], [{"role": "user", "content": [text_part("b"), parts[1]]}]
    answer = {"role": "assistant", "content": "yes"}
    record = collect_images(
        {"images": [], "conversations": [[*one, answer], [*two, answer], [*says("user")]]}
    )
    assert record["images"] == images
    assert [shown(messages) for messages in placed_conversations(record, "branch")] == [
        "[0][1][2][3][0] | yes",
        "b[1] | yes",
        "x",  # it shows no image
    ]
    record = collect_images({"interleaved": [text_part("a"), *parts]})
    assert record["images"] == images
    assert [part.get("index") for part in placed_page(record)] == [None, 0, 1, 2, 3, 0]
    for mixed in (
        {"messages": [{"role": "user", "content": [*parts, IMAGE_PART]}]},
        {"messages": one, "images": ["cat.png"]},
    ):
        with pytest.raises(ConversationError, match="either in 'images' or in all the parts"):
            collect_images(mixed)
    given = {"messages": [{"role": "user", "content": [{"type": "image", "index": 9}]}], "images": ["red"]}
    [messages] = placed_conversations(collect_images(given), "branch")
    assert shown(messages) == "[0]"  # no one else numbers images


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("What?", ["What?"]),
        (" no placeholder\n", [" no placeholder\n"]),
        ("<image>\nWhat?", [0, "What?"]),
        ("What?\n<image>", ["What?", 0]),
        ("<image>\n<image>\nWhat?", [0, 0, "What?"]),
        ("A: <image> B: <image> which?", ["A: ", 0, " B: ", 0, " which?"]),
        ("One.\n<image>\nTwo.", ["One.", 0, "\nTwo."]),
        ("<image>", [0]),
    ],
)
def test_placeholders_mark_places(text, parts):
    assert [part.get("text", 0) for part in split_at_images(text)] == parts


def shown(messages) -> str:
    """The messages as one line, with the number of each image."""
    return " | ".join(
        m["content"]
        if isinstance(m["content"], str)
        else "".join(p["text"] if p["type"] == "text" else f"[{p['index']}]" for p in m["content"])
        for m in messages
    )


def test_images_have_places():
    asked = ask("<image> or <image>?")[0] | {"content": "<image> or <image>?"}
    answered = {"role": "assistant", "content": "<image>"}
    assert shown(with_images([asked, answered], 2)) == "[0] or [1]? | <image>"
    assert shown(with_images(says("system", "user", "user"), 2)) == "x | [0][1]x | x"
    explicit = [{"role": "user", "content": [text_part("<image>"), IMAGE_PART]}]
    assert shown(with_images(explicit, 1)) == "<image>[0]"  # beside parts it is text
    for messages, count in (([asked], 1), ([asked], 3), (explicit, 2), ([asked], 0)):
        with pytest.raises(ConversationError, match="has places for") as error:
            with_images(messages, count)
        assert error.value.reason == "image_count"


def test_images_of_what_is_left_out_move_on():
    messages = with_images([*CHAT, *ask("sure?")], 3)
    assert (
        shown(without(messages, 1, 3))
        == "is it large or is it small? | [0][1]what is it? [2] | a rectangle | sure?"
    )
    assert shown(without(messages, 1, 5)).endswith("| [0][1][2]sure?")
    assert shown(without(messages, 3, 6)).endswith("| no")  # nobody is left to show the image


def test_references_belong_to_a_conversation():
    texts = [{"user": "what?", "assistant": 3}, {"user": "what?", "assistant": "4"}]
    many = conversations_of({"texts": texts, "references": ["three"]}, "branch")
    assert [m[-1]["references"] for m in many] == [["three"]] * 2 and many[0][-1]["content"] == "3"
    with pytest.raises(ConversationError, match="several questions"):
        conversations_of(
            {"texts": [*texts, {"user": "where?", "assistant": "x"}], "references": ["a"]}, "branch"
        )
    own = conversations_of({"texts": [texts[0] | {"references": ["three"]}, texts[1]]}, "branch")
    assert [m[-1].get("references") for m in own] == [["three"], None]


def dataset(records, renderer, **settings) -> SampleDataset:
    data = DataConfig(left_length=64, right_length=200, **settings)
    source = Source("test", InMemoryRecords(records), 0, len(records), 1.0, 0)
    return SampleDataset([source], renderer, TINY_MODEL.vision, data, 2048)


@pytest.fixture
def images(tmp_path):
    paths = {name: str(tmp_path / f"{name}.png") for name in ("red", "blue", "green")}
    for name, path in paths.items():
        Image.new("RGB", (32, 32), name).save(path)
    return paths


def test_documents_share_a_group_only_with_images_at_equal_positions(renderer, tokenizer, images):
    two = [images["red"], images["blue"]]

    def answered(content):
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]

    head = [IMAGE_PART, IMAGE_PART, text_part("what is it?")]
    between = [IMAGE_PART, text_part(" or "), IMAGE_PART]
    record = {"images": two, "conversations": [answered(c) for c in (head, head, between, between, head)]}
    samples = dataset([record], renderer).samples(0, 0, True)
    assert [len(s.documents) for s in samples] == [2, 2, 1]
    assert all(s.images == two for s in samples)
    for sample in samples:
        assert len({tuple(d.left_positions) for d in sample.documents}) == 1


def test_a_part_of_a_long_conversation_shows_the_images_so_far(renderer, images):
    """Also with a system message, which every part repeats."""
    turns = [
        {"role": "user", "content": [IMAGE_PART, text_part("what is it? " * 3)]},
        {"role": "assistant", "content": "a rectangle"},
        {"role": "user", "content": [text_part("is it large or is it small? "), IMAGE_PART]},
        {"role": "assistant", "content": "it is small"},
    ]
    record = {"images": [images["red"], images["blue"]], "messages": [CHAT[0], *turns]}
    whole = renderer.conversation(with_images(record["messages"], 2), [(1, 1)] * 2)
    data = dataset([record], renderer)
    data.config = DataConfig(left_length=64, right_length=len(whole.right_ids) - 1)
    first, second = data.samples(0, 0, True)
    assert first.images == [images["red"]] and second.images == [images["red"], images["blue"]]
    texts = [renderer.preview(s.documents[0]) for s in (first, second)]
    block = "<|global_image|>[4 image tokens]"
    assert all(text.startswith("<|im_start|>system\nis it large") for text in texts)
    assert f"user\n{block}is it large or is it small? {block}<|im_end|>" in texts[1]


def test_an_interleaved_page_is_supervised_everywhere(renderer, tokenizer, images):
    parts = [text_part("what is it? "), IMAGE_PART, text_part("a rectangle "), IMAGE_PART, text_part("no")]
    record = {"images": [images["red"], images["blue"]], "interleaved": parts}
    [sample] = dataset([record], renderer).samples(0, 0, True)
    [document] = sample.documents
    assert renderer.preview(document).count("[4 image tokens]") == 2
    texts = [tokenizer.encode(p["text"]) for p in parts if p["type"] == "text"]
    labels = [label for label in document.labels if label != IGNORE]
    # The first token of the page, and one behind an image, follow no right token.
    assert labels == [token for ids in texts for token in ids[1:]] + [tokenizer.turn_end]
    vanilla = Renderer(tokenizer, 4, "none").page(parts, [(1, 1)] * 2)
    learnt = [label for label in vanilla.labels if label != IGNORE]
    assert learnt == [*[token for ids in texts for token in ids][1:], tokenizer.turn_end]


def test_of_a_chat_with_too_many_images_the_beginning_trains(renderer, images):
    asked = [{"role": "user", "content": [IMAGE_PART, text_part(f"{n}?")]} for n in range(20)]
    messages = [m for question in asked for m in (question, {"role": "assistant", "content": "no"})]
    data = dataset([{"images": [images["red"]] * 20, "messages": messages}], renderer)
    [sample] = data.samples(0, 0, True)
    row = data.config.left_length
    assert len(sample.images) == row // (1 + 4) < 20  # a block has 4 tokens and a marker
    assert dict(data.dropped) == {("test", "too_many_images"): 1}


def test_a_long_page_is_split_with_few_renderings(renderer, monkeypatch):
    rendered = []
    page = renderer.page
    monkeypatch.setattr(renderer, "page", lambda *given: rendered.append(given) or page(*given))
    parts = [text_part(f"part {n}. ") for n in range(400)]
    data = dataset([{"images": [], "interleaved": parts}], renderer)
    documents = [document for s in data.samples(0, 0, True) for document in s.documents]
    texts = [renderer.preview(document) for document in documents]
    assert "".join(texts).replace("<|im_end|>", "") == "".join(part["text"] for part in parts)
    for first in documents[:-1]:  # none could have been longer by one part
        assert len(first.right_ids) <= data.config.right_length
        assert len(first.right_ids) + 8 * len("part 400. ") > data.config.right_length
    assert len(rendered) <= len(documents) * 10  # 2⁹ > 400


def test_an_image_alone_is_a_question(renderer, images):
    answer = {"role": "assistant", "content": "a rectangle"}
    alone = {"images": [images["red"]], "messages": [{"role": "user", "content": [IMAGE_PART]}, answer]}
    llava = {"images": [images["red"]], "messages": [{"role": "user", "content": "<image>\n"}, answer]}
    data = dataset([alone, llava], renderer)
    one, two = (data.samples(0, number, True) for number in (0, 1))
    assert one[0].documents == two[0].documents and not data.dropped


def test_unusable_records_are_counted_by_their_reason(renderer, images):
    answer = {"role": "assistant", "content": "no"}
    records = [
        {"images": [], "messages": [*says("user"), {"role": "tool", "content": "7"}]},
        {"images": [images["red"]], "messages": [{"role": "user", "content": "<image><image>?"}, answer]},
        {"images": [], "texts": [{"user": "a <image>?", "assistant": "b"}]},
        {"images": [], "messages": says("user")},
        {"images": [], "interleaved": [IMAGE_PART]},
        {
            "images": [],
            "texts": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": 3}],
            "references": ["d"],
        },
    ]
    data = dataset(records, renderer)
    assert [s for i in range(len(records)) for s in data.samples(0, i, True)] == []
    assert Counter(dict(data.dropped)) == {
        ("test", "malformed"): 1,
        ("test", "image_count"): 3,
        ("test", "empty_text"): 1,
        ("test", "references"): 1,
    }


def in_order(document) -> tuple[list[int], list[int]]:
    """Tokens of both streams by their positions."""
    pairs = sorted(
        [
            *zip(document.left_positions, document.left_ids, strict=True),
            *zip(document.right_positions, document.right_ids, strict=True),
        ]
    )
    return [p for p, _ in pairs], [i for _, i in pairs]


def test_every_program_renders_a_conversation_alike(tokenizer, renderer, images, tmp_path):
    """Training, generate.py, chat turn by turn, the adapter and the processor: the same ids and positions."""
    predictor = Predictor(lively_model(tokenizer), renderer)
    tiles = [predictor.tiles(images[name]) for name in ("red", "blue", "green")]
    trained = renderer.conversation(CHAT, [t.grid for t in tiles])
    positions, ids = in_order(trained)
    asked = predictor.prompt(tiles, CHAT[:-1])
    assert in_order(asked) == (positions[: asked.length], ids[: asked.length])
    # The processor has all tokens in one stream, as transformers' generate takes them.
    tokenizer.save(tmp_path)
    vision = to_dict(TINY_MODEL.vision)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    processor = DualTowerProcessor(DualTowerImageProcessor(vision), loaded, TINY_MODEL.tokens_per_tile)
    names = iter(("red", "blue", "green"))
    carrying = json.loads(json.dumps(CHAT[:-1]))
    for message in carrying:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["path"] = images[next(names)]
    batch = processor.apply_chat_template(
        carrying, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert batch["input_ids"][0] == ids[: asked.length]
    text = processor.apply_chat_template(CHAT[:-1], add_generation_prompt=True)
    again = processor(text=text, images=[images[n] for n in ("red", "blue", "green")])
    assert again["input_ids"] == batch["input_ids"]
    # A chat goes on from its cache, which holds all of an answer but its last token.
    first = renderer.prompt(CHAT[:2], [t.grid for t in tiles[:2]])
    answer = tokenizer.encode("no")
    follow = renderer.follow_up(CHAT[:4], [tiles[2].grid], answer[-1:], first.length + len(answer) - 1)
    chained = sorted(
        [
            *zip(*in_order(first), strict=True),
            *zip(range(first.length, first.length + len(answer) - 1), answer[:-1], strict=True),
            *zip(*in_order(follow), strict=True),
        ]
    )
    assert chained == list(zip(positions[: asked.length], ids[: asked.length], strict=True))


def test_prompts_of_tasks_hold_images_at_their_places():
    tiles = [Tiles((1, 1), random_tiles(1, seed)) for seed in range(2)]
    assert user_message("what?", tiles) == (tiles, ask("what?", 2)[0])
    order, message = user_message("which: <image 2> or <image 1>?", tiles)
    assert order == tiles[::-1]
    assert [p.get("text", 0) for p in message["content"]] == ["which: ", 0, " or ", 0, "?"]
    order, message = user_message("<image> and <image>", tiles)
    assert order == tiles and [p.get("text", 0) for p in message["content"]] == [0, " and ", 0]
    assert user_message("<image>\nwhat?", tiles[:1])[1] == ask("<image>\nwhat?", 1)[0] == ask("what?", 1)[0]
    assert user_message("<image 1> alone", tiles)[1] == ask("<image 1> alone", 2)[0]  # text, as it stands
    assert user_message("<image>", [])[1] == ask("<image>")[0]


def test_jsonl_reads_messages(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    path = tmp_path / "mine.jsonl"
    lines = [
        {
            "image": "red.png",
            "messages": CHAT[:1] + ask("what?", 1) + [{"role": "assistant", "content": "a"}],
        },
        {"messages": [{"role": "user", "content": [RED, text_part("or"), BLUE]}, *says("assistant")]},
        {"images": ["red.png"], "conversations": [says("user", "assistant"), says("user", "assistant")]},
        {"images": ["red.png"], "interleaved": [text_part("a"), IMAGE_PART]},
        {"image": "", "messages": says("user", "assistant")},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, _ = jsonl(path)
    assert [len(r["images"]) for r in records] == [1, 2, 1, 1, 0]
    assert records[1]["images"] == [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]
    encoded = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    for part in ({"image_url": {"url": f"data:image/png;base64,{encoded}"}}, {"base64": encoded}):
        kind = {"type": "image_url" if "image_url" in part else "image"}
        lines = [{"role": "user", "content": [kind | part]}, *says("assistant")]
        path.write_text(json.dumps({"messages": lines}))
        [record], _ = jsonl(path)
        assert [open_image(image).getpixel((0, 0)) for image in record["images"]] == [(255, 0, 0)]
    path.write_text(json.dumps({"messages": says("user", "tool")}))
    with pytest.raises(Exception, match="mine.jsonl:1: .*message 2: tool calls are not supported"):
        jsonl(path)


def test_the_places_of_images_mean_something(tokenizer, restored_kernels):
    """Two images and a question which is red: swapped, a trained model gives the other answer."""
    use_kernels("plain")
    model, renderer = tiny_model(tokenizer), Renderer(tokenizer, TINY_MODEL.tokens_per_tile)
    side = TINY_MODEL.vision.image_size
    colour = {
        name: torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, side, side)
        for name, rgb in (("red", [255, 0, 0]), ("blue", [0, 0, 255]))
    }
    content = [text_part("a "), IMAGE_PART, text_part("; no "), IMAGE_PART, text_part(" is it red?")]

    def sample(first: str):
        second = "blue" if first == "red" else "red"
        answer = {"role": "assistant", "content": "a" if first == "red" else "no"}
        document = renderer.conversation([{"role": "user", "content": content}, answer], [(1, 1)] * 2)
        return Sample((0, 0, 0), torch.stack([colour[first], colour[second]]), [document])

    batch = collate([[sample("red")], [sample("blue")]], tokenizer.global_image)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(200):
        loss = model(**batch).loss_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break
    predictor = Predictor(model.eval(), renderer)
    tiles = {name: Tiles((1, 1), pixels[None].contiguous()) for name, pixels in colour.items()}
    question = [{"role": "user", "content": content}]
    answers = predictor.answer(
        [([tiles["red"], tiles["blue"]], question), ([tiles["blue"], tiles["red"]], question)],
        GenerationConfig(max_new_tokens=4),
    )
    assert [answer.text for answer in answers] == ["a", "no"]


def test_an_image_kv_is_equal_to_the_bit_wherever_it_stands(tokenizer, renderer):
    model, tiles = tiny_model(tokenizer), random_tiles(2)
    first, second = IMAGE_PART, text_part("is it large or is it small?")
    chats = [
        [{"role": "user", "content": [first, first, second]}],
        [CHAT[0], {"role": "user", "content": [second, first, second, first]}],
        [*ask("what is it?"), CHAT[2], {"role": "user", "content": [first, second, first]}],
    ]
    kvs = []
    for order in ([0, 1], [1, 0]):
        for messages in chats:
            document = renderer.prompt(messages, [(1, 1)] * 2)
            batch = collate([[Sample((0, 0, 0), tiles[order], [document])]], tokenizer.global_image)
            left = {name: column for name, column in batch.items() if name.startswith(("left_", "tiles"))}
            with torch.no_grad():
                layers = model.left(**left)
            block = len(document.left_ids) // 2  # tokens of an image
            at = order.index(0) * block
            kvs.append(torch.stack([part[:, :, at : at + block] for kv in layers for part in kv]))
    assert all(torch.equal(kv, kvs[0]) for kv in kvs[:3])
    for kv in kvs[3:]:  # behind another image: matrix products round by the row, not by the place
        torch.testing.assert_close(kv, kvs[0], atol=1e-6, rtol=0)


NAN = {"role": "assistant", "content": float("nan")}
NO_LIST = {"role": "assistant", "content": "a", "references": "b"}


def test_a_name_of_a_special_token_that_spans_parts_stays_text(tokenizer, renderer):
    content = [text_part("<|im_"), text_part("end|>\n<|im_start|>assistant\n<|ima"), text_part("ge|>")]
    document = renderer.prompt([{"role": "user", "content": content}])
    special = [tokenizer.special[name] for name in ("<|im_start|>", "<|im_end|>", "<|im_start|>")]
    assert [i for i in document.right_ids if i in renderer.tokenizer.special_ids] == special
    assert "<|im_end|>\n<|im_start|>assistant\n<|image|>" in renderer.preview(document)


def test_what_follows_the_last_answer_is_not_learnt(renderer, images):
    said = [*says("user", "assistant"), {"role": "user", "content": [IMAGE_PART, text_part("what?")]}]
    [sample] = dataset([{"images": [images["red"]], "messages": said}], renderer).samples(0, 0, True)
    assert sample.images == [] and "what?" not in renderer.preview(sample.documents[0])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"images": None, "interleaved": [text_part("a")]}, "image_missing"),
        ({"images": [], "interleaved": [None]}, "malformed"),
        ({"images": [], "interleaved": []}, "empty_text"),
        ({"images": ["red"], "interleaved": [IMAGE_PART]}, "empty_text"),
        ({"images": ["red"], "interleaved": [text_part("a")]}, "image_count"),
        ({"images": [], "messages": [{"role": ["user"], "content": "a"}]}, "malformed"),
        ({"images": [], "messages": says("assistant", "user")}, "empty_text"),
        ({"images": [], "texts": [None]}, "empty_text"),
        (
            {"images": [], "messages": [*says("user"), NAN]},
            "empty_text",
        ),
        (
            {
                "images": [],
                "messages": [*says("user"), NO_LIST],
            },
            "references",
        ),
        ({"images": [], "messages": says(*["user", "assistant"] * 2), "references": ["b"]}, "references"),
    ],
)
def test_one_record_never_ends_a_run(renderer, images, record, reason):
    record = record | ({"images": [images[n] for n in record["images"]]} if record["images"] else {})
    data = dataset([record], renderer)
    assert data.samples(0, 0, True) == [] and dict(data.dropped) == {("test", reason): 1}


def test_references_belong_to_the_last_answer_behind_which_nothing_counts():
    record = {"messages": says("user", "assistant", "user"), "references": ["b", None, 3]}
    [messages] = conversations_of(record, "branch")
    assert messages[1]["references"] == ["b", "3"] and "references" not in messages[2]


def test_numbers_and_placeholders_in_parts_are_read():
    assert checked([{"role": "user", "content": 3}])[0]["content"] == "3"
    asked = [{"role": "user", "content": [text_part("A: <image> B: <image>?")]}]
    assert shown(with_images(asked, 2)) == "A: [0] B: [1]?"
