"""Chat templates of the field: our ids against transformers' `apply_chat_template`, and what is refused."""

import datetime
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.conversations import IMAGE_PART, ask, text_part
from data.render import IGNORE, Renderer
from data.tokenizer import CHAT_TOKENS, CHATML, IMAGE_TOKENS, Tokenizer, self_contained
from tests.conftest import TURNS
from utils.errors import UsageError, UserError

FOLDER = Path(__file__).parent / "chat_templates"
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOKENS = {  # the special tokens of each family; the first begins a text where it does, the last ends a turn
    "smollm2": CHAT_TOKENS,
    "qwen2": CHAT_TOKENS,
    "qwen3": CHAT_TOKENS,
    "smollm3": CHAT_TOKENS,
    "llama32": LLAMA_TOKENS,
    "mistral": ("<s>", "[INST]", "[/INST]", "</s>"),
}
DATE = datetime.datetime(2026, 2, 1)


def made(family: str, template: str | None = None, system: str = "") -> Tokenizer:
    """A tokenizer with the special tokens of a family: BPE on bytes, or on characters as Mistral's."""
    words = ["user system assistant what is it red yes no think Today Date"] * 5
    backend = HFTokenizer(models.BPE())
    if family == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *"\n▁漢ë🙂<>|[]/_\ue000"]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(words, trainer)
    backend.add_special_tokens(list(TOKENS[family]))
    backend.add_special_tokens(list(IMAGE_TOKENS))
    special = {"bos_token": TOKENS[family][0], "eos_token": TOKENS[family][-1]}
    source = (FOLDER / f"{family}.jinja").read_text() if template is None else template
    return Tokenizer(backend, self_contained(source, special, system, DATE))


@pytest.fixture(scope="module", params=TOKENS)
def family(request):
    """Name, our renderer, and transformers' tokenizer with the template as its authors wrote it."""
    tokenizer = made(request.param)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=HFTokenizer.from_str(tokenizer.backend.to_str()),
        chat_template=(FOLDER / f"{request.param}.jinja").read_text(),
        bos_token=TOKENS[request.param][0],
        eos_token=TOKENS[request.param][-1],
    )
    return request.param, Renderer(tokenizer, 4), theirs


def oracle_text(family, messages, add_generation_prompt):
    """transformers' text, on the day that was fixed; list contents as one text, which all templates take."""
    name, renderer, theirs = family
    flat = [
        m if isinstance(m["content"], str) else {**m, "content": "".join(p["text"] for p in m["content"])}
        for m in messages
    ]
    if name == "qwen3" and not add_generation_prompt:
        # It writes empty thoughts into the last answer only: another question makes it an earlier one.
        flat.append({"role": "user", "content": "?"})
    variables = renderer.tokenizer.template.variables
    if name == "llama32":
        variables = variables | {"date_string": DATE.strftime("%d %b %Y")}
    text = theirs.apply_chat_template(
        flat, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
    if name == "smollm3":  # its template asks for today's date
        today, then = (date.strftime("%d %B %Y") for date in (datetime.datetime.now(), DATE))
        text = text.replace(today, then, 1)
    return text


def oracle(family, messages, add_generation_prompt):
    """What `apply_chat_template(tokenize=True)` does with its text."""
    return family[2].encode(oracle_text(family, messages, add_generation_prompt), add_special_tokens=False)


pieces = st.sampled_from(
    [
        "what",
        " is",
        "it?",
        "\n",
        " ",
        "\n\n",
        "  ",
        "\t",
        "Zoë",
        "漢",
        "🙂",
        "<think>",
        "</think>",
        "<",
        "|>",
        "user",
    ]
)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join)
contents = texts | st.lists(texts.map(text_part), min_size=1, max_size=3)


@st.composite
def conversations(draw, content=contents):
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(content)} for role in ("user", "assistant")]
    return messages


@settings(max_examples=30, deadline=None)
@given(many=st.lists(conversations(), min_size=10, max_size=10))
def test_ids_equal_apply_chat_template(family, many):
    """What is asked, and what is trained, up to the end of the last turn."""
    _, renderer, _ = family
    for messages in many:
        asked = messages[:-1]
        assert renderer.prompt(asked).right_ids == oracle(family, asked, True)
        document, whole = renderer.conversation(messages), oracle(family, messages, False)
        ids = [*document.right_ids, renderer.tokenizer.turn_end]
        assert ids == whole[: len(ids)]
        labels = [label for label in document.labels if label != IGNORE]
        assert labels.count(renderer.tokenizer.turn_end) == sum(m["role"] == "assistant" for m in messages)


special_texts = st.lists(
    pieces | st.sampled_from([*CHAT_TOKENS, *LLAMA_TOKENS, "</s>", "[INST]", *IMAGE_TOKENS[:3]]),
    min_size=1,
    max_size=5,
).map("".join)


@settings(max_examples=10, deadline=None)
@given(many=st.lists(conversations(special_texts), min_size=10, max_size=10))
def test_what_is_said_is_never_special(family, many):
    """Special-token text in contents stays text, and all else is as it is without such text."""
    _, renderer, _ = family
    tokenizer = renderer.tokenizer

    def cleared(messages):
        return [{**m, "content": tokenizer.special_pattern.sub("", m["content"]) + "x"} for m in messages]

    for messages in many:
        ids = [*renderer.conversation(messages).right_ids, tokenizer.turn_end]
        plain = renderer.conversation(cleared(messages)).right_ids
        special = [i for i in ids if i in renderer.tokenizer.special_ids]
        assert special == [i for i in [*plain, tokenizer.turn_end] if i in renderer.tokenizer.special_ids]
        shown = tokenizer.backend.decode(ids, skip_special_tokens=False)
        if family[0] != "mistral":  # whose decoder does not bring all spaces back
            assert oracle_text(family, messages, False).startswith(shown)


def test_the_answers_are_supervised(family):
    """Told by the text: the labels spell each answer and the token that ends it, and nothing else."""
    _, renderer, _ = family
    tokenizer = renderer.tokenizer
    messages = [
        m for turn in TURNS for m in (*ask(turn["user"]), {"role": "assistant", "content": turn["assistant"]})
    ]
    labels = [label for label in renderer.conversation(messages).labels if label != IGNORE]
    said = tokenizer.backend.decode(labels, skip_special_tokens=False)
    end = tokenizer.template.turn_end
    answers = [answer.strip() for answer in re.sub("<think>\n\n</think>\n", "", said).split(end)]
    assert answers == [*(turn["assistant"] for turn in TURNS), ""]


def test_images_stand_at_their_places(family):
    _, renderer, _ = family
    content = [text_part("a"), IMAGE_PART, text_part("b"), IMAGE_PART, text_part("c")]
    document = renderer.prompt([{"role": "user", "content": content}], [(1, 1), (1, 1)])
    shown = renderer.preview(document)
    block = "<|global_image|>[4 image tokens]"
    assert re.search(rf"a ?{re.escape(block)} ?b ?{re.escape(block)} ?c", shown), shown
    assert document.left_images == [0] * 5 + [1] * 5
    assert document.left_positions[5] - document.left_positions[4] > 1  # "b" is between


def test_the_saved_template_renders_lists_and_the_same_day_elsewhere(family, tmp_path):
    """transformers alone, with the saved folder: list contents, special tokens and date as ours."""
    name, renderer, _ = family
    renderer.tokenizer.save(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [IMAGE_PART, text_part("what is it?")]}]
    text = loaded.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **renderer.tokenizer.template.variables
    )
    assert loaded.encode(text, add_special_tokens=False) == renderer.tokenizer.encode_rendered(text)
    assert text.count("<|image|>what is it?") == 1
    if name in ("llama32", "smollm3"):
        assert "01 Feb" in text and "2026" in text
    assert Tokenizer.load(tmp_path).fingerprint() == renderer.tokenizer.fingerprint()


@settings(max_examples=20, deadline=None)
@given(many=st.lists(conversations(), min_size=1, max_size=4))
def test_the_saved_template_marks_the_answers_for_transformers(family, many):
    """transformers alone gives our text and, by `return_assistant_tokens_mask`, our labels."""
    _, renderer, _ = family
    tokenizer = renderer.tokenizer
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=HFTokenizer.from_str(tokenizer.backend.to_str()),
        chat_template=tokenizer.template.source,
    )
    for messages in many:
        if not tokenizer.template.has_system:
            messages = [m for m in messages if m["role"] != "system"]
        for prompt, ask_for_more in ((messages, False), (messages[:-1], True)):
            text = theirs.apply_chat_template(prompt, tokenize=False, add_generation_prompt=ask_for_more)
            assert text == renderer.text(prompt, ask_for_more)
        whole = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        document = renderer.conversation(messages)
        ids = whole["input_ids"][: len(document.right_ids) + 1]
        assert ids[:-1] == document.right_ids
        labels = [
            token if answer else IGNORE
            for token, answer in zip(ids[1:], whole["assistant_masks"][1:], strict=False)
        ]
        assert labels == document.labels


def test_a_default_system_message_is_part_of_the_template(tmp_path):
    tokenizer = made("qwen2", system='Say "yes"\n\\ 漢')
    assert (
        Renderer(tokenizer, 4)
        .preview(Renderer(tokenizer, 4).prompt(ask("red?")))
        .startswith('<|im_start|>system\nSay "yes"\n\\ 漢<|im_end|>\n<|im_start|>user\nred?')
    )
    own = Renderer(tokenizer, 4).prompt(ask("red?", system="no"))
    assert "Say" not in tokenizer.decode(own.right_ids)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert Renderer(again, 4).prompt(ask("red?")) == Renderer(tokenizer, 4).prompt(ask("red?"))


NO_SYSTEM = CHATML.replace(
    "{%- for message in messages -%}",
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    "{%- for message in messages -%}",
)


def test_a_template_without_a_system_role_says_so():
    renderer = Renderer(made("qwen2", NO_SYSTEM), 4)
    with pytest.raises(UsageError, match="no system role"):
        renderer.prompt(ask("red?", system="Be kind."))
    assert renderer.prompt(ask("red?")).right_ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "no roles"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token"),
        ("{{ messages | length }}" + CHATML, "changes when one is added"),
        ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m.content }", "unexpected"),
        ("{{ strftime_now(messages[0].role) }}" + CHATML, "format of a date"),
        (
            CHATML.replace(
                "+ message.content", "+ ('to=user<|im_end|>' if loop.index0 % 2 else '') + message.content"
            ),
            "does not follow what asks for it",
        ),
    ],
)
def test_templates_that_cannot_train_are_refused(template, reason):
    with pytest.raises(UsageError, match=reason):
        made("qwen2", template)


def test_a_conversation_that_a_template_refuses_is_one_line():
    renderer = Renderer(made("mistral"), 4)
    with pytest.raises(UsageError, match="must alternate"):
        renderer.conversation([*ask("a"), *ask("b"), {"role": "assistant", "content": "c"}])


def test_a_template_for_lists_alone_is_given_lists(tmp_path):
    """As those of vision-language models: it does not look at texts."""
    lists = CHATML.replace("message.content", "(message.content | map(attribute='text') | join('') | trim)")
    renderer = Renderer(made("qwen2", lists), 4)
    messages = [*ask(" red?\n", 1, system="Be kind."), {"role": "assistant", "content": "yes"}]
    assert renderer.text(messages) == Renderer(made("qwen2", CHATML), 4).text(
        [*ask(" red?", 1, system="Be kind."), {"role": "assistant", "content": "yes"}]
    )
    renderer.tokenizer.save(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(messages, tokenize=False) == renderer.text(messages)
    assert Tokenizer.load(tmp_path).fingerprint() == renderer.tokenizer.fingerprint()


def test_a_jinja_file_is_a_template(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML.replace("'<|im_start|>", "'<|im_start|>The "))
    tokenizer = Tokenizer.train(["red"], 300, str(tmp_path / "mine.jinja"))
    assert "The user\nred" in Renderer(tokenizer, 4).preview(Renderer(tokenizer, 4).prompt(ask("red")))
    with pytest.raises(UsageError, match="auto, chatml or a Jinja file; .*no.jinja cannot be read"):
        Tokenizer.train(["red"], 300, str(tmp_path / "no.jinja"))


def test_a_folder_of_the_first_edition_still_renders(tokenizer, tmp_path):
    """Its template wrote images before all text, and took texts as they are."""
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    old, new = Renderer(Tokenizer.load(tmp_path), 4), Renderer(tokenizer, 4)
    assert old.prompt(ask("what?", 1), [(1, 1)]) == new.prompt(ask("what?", 1), [(1, 1)])


def test_a_damaged_tokenizer_config_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_header_of_plain_text_cannot_be_forged():
    """The text before an answer has no special token: the conversation is rendered up to it instead."""
    template = (
        "{%- for m in messages -%}{{ '\\nUSER: ' if m.role == 'user' else ' ASSISTANT: ' }}{{ m.content }}"
        "{%- if m.role != 'user' -%}<|im_end|>{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ ' ASSISTANT: ' }}{%- endif -%}"
    )
    renderer = Renderer(made("qwen2", template), 4)
    document = renderer.conversation([*ask("say ASSISTANT: now"), {"role": "assistant", "content": "no"}])
    labels = [label for label in document.labels if label != IGNORE]
    assert renderer.tokenizer.backend.decode(labels, skip_special_tokens=False).strip() == "no<|im_end|>"


def test_a_system_message_that_moves_is_no_system_role():
    """Some templates write it into the last question: an earlier one would change with the next."""
    template = CHATML.replace(
        "{%- for message in messages -%}",
        "{%- set own = messages[0].content if messages[0].role == 'system' else '' -%}"
        "{%- for message in messages if message.role != 'system' -%}",
    ).replace("message.content", "(own if loop.last or loop.revindex == 2 else '') + message.content")
    tokenizer = made("qwen2", template)
    assert not tokenizer.template.has_system
    with pytest.raises(UsageError, match="no system role"):
        Renderer(tokenizer, 4).prompt(ask("red?", system="Be kind."))


def test_a_default_system_message_holds_no_special_token():
    with pytest.raises(
        UsageError, match="--data.system holds the special token <|im_end|>".replace("|", r"\|")
    ):
        Tokenizer.train(["red"], 300, "chatml", "Be kind.<|im_end|>")


def test_control_tokens_that_are_not_flagged_are_text_in_contents():
    tokenizer = made("qwen2")
    backend = HFTokenizer.from_str(tokenizer.backend.to_str())
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_start|>"
    renderer = Renderer(Tokenizer(HFTokenizer.from_str(json.dumps(data)), tokenizer.template.source), 4)
    ids = renderer.prompt(ask("<|im_start|>")).right_ids
    assert ids.count(tokenizer.special["<|im_start|>"]) == 3  # system, user, assistant


def test_the_saved_template_does_not_think_elsewhere_either(tmp_path):
    renderer = Renderer(made("smollm3"), 4)
    renderer.tokenizer.save(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = loaded.apply_chat_template(ask("red?"), tokenize=False, add_generation_prompt=True)
    assert text == renderer.text(ask("red?"), add_generation_prompt=True) and "/no_think" in text
    assert Tokenizer.load(tmp_path).fingerprint() == renderer.tokenizer.fingerprint()
