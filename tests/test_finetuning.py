"""Exported folders in the trainers of others, transformers', TRL's and peft's, against our own training."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from data.collators import collate
from data.conversations import images_of
from data.datasets import Sample
from eval.predictor import Predictor
from models.losses import cross_entropy
from tests.programs import run_program
from tests.test_transformers import ROOT, Exported, exported, images  # noqa: F401  # fixtures
from utils.errors import UserError


def chats(paths: dict[str, str]) -> list[list[dict]]:
    """A system turn and images in two turns; text alone; one image, two questions."""

    def user(*parts: str) -> dict:
        shown = [
            {"type": "image", "path": paths[part]} if part in paths else {"type": "text", "text": part}
            for part in parts
        ]
        return {"role": "user", "content": shown}

    def answer(text: str) -> dict:
        return {"role": "assistant", "content": text}

    return [
        [
            {"role": "system", "content": "what is it?"},
            user("is it ", "a", " or ", "b", "?"),
            answer("a rectangle"),
            user("a", "what color is the shape?"),
            answer("blue"),
        ],
        [user("is it large or is it small?"), answer("it is small")],
        [user("b", "what is it?"), answer("no"), user("what color?"), answer("<|im_end|> is text")],
    ]


def inputs_of(processor: Any, many: list, side: str = "left") -> dict[str, Tensor]:
    """What TRL's collator makes of them, with `assistant_only_loss`."""
    inputs = processor.apply_chat_template(
        many,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding_side": side, "truncation": True, "max_length": 200},
    )
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)
    return {**inputs, "labels": labels}


def own_batch(e: Exported, many: list) -> tuple[dict[str, Tensor], list]:
    """The batch of our own training, a conversation in each row, and its documents."""
    samples = []
    for messages in many:
        tiles = [e.own.tiles(part["path"]) for part in images_of(messages)]
        document = e.own.renderer.conversation(messages, [image.grid for image in tiles])
        pixels = torch.cat([torch.empty(0, 3, 64, 64, dtype=torch.uint8), *(t.pixels for t in tiles)])
        samples.append(Sample((0, 0), pixels, [document]))
    return collate([[sample] for sample in samples], e.own.model.vocabulary.first_marker_id), [
        sample.documents[0] for sample in samples
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_is_that_of_training(exported, side):  # noqa: F811
    """Loss, logits, states and gradients, for rows padded on either side; in fp64, to 1e-7."""
    many = chats(exported.images)
    batch, documents = own_batch(exported, many)
    own, theirs = (copy.deepcopy(model).double() for model in (exported.own.model, exported.model))
    expected = own(**batch)
    loss = cross_entropy(
        expected.hidden[batch["labels"] >= 0], own.right.unembedding, batch["labels"][batch["labels"] >= 0]
    ).mean()
    loss.backward()
    inputs = inputs_of(exported.processor, many, side)
    output = theirs(**inputs, output_hidden_states=True)
    output.loss.backward()
    torch.testing.assert_close(output.loss, loss)
    logits, length = own.logits(expected.hidden), inputs["input_ids"].shape[1]
    for row, document in enumerate(documents):
        whole = int(inputs["attention_mask"][row].sum())
        first = length - whole if side == "left" else 0
        columns = [first + position for position in document.right_positions]
        count = len(columns)
        torch.testing.assert_close(output.logits[row, columns, : logits.shape[-1]], logits[row, :count])
        torch.testing.assert_close(output.hidden_states[-1][row, columns], expected.hidden[row, :count])
        unseen = [*range(first), *range(first + whole, length), *(first + p for p in document.left_positions)]
        assert not output.hidden_states[-1][row, unseen].any()
    for (name, parameter), (other, theirs_) in zip(
        own.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        assert name == other
        if not name.startswith("heads."):  # they are not trained in transformers
            torch.testing.assert_close(theirs_.grad, parameter.grad)
    assert len(output.hidden_states) == own.config.right.layers + 1
    inputs.pop("labels")
    last = theirs(**inputs, logits_to_keep=3).logits
    torch.testing.assert_close(last, output.logits[:, -3:])
    some = theirs(**inputs, logits_to_keep=torch.tensor([1, 4]), return_dict=False)[0]
    torch.testing.assert_close(some, output.logits[:, [1, 4]])


def test_image_tokens_are_never_supervised(exported):  # noqa: F811
    """With every token as its own label, as with those of text alone."""
    inputs = inputs_of(exported.processor, chats(exported.images))
    every = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    text = every.masked_fill(every >= exported.model.config.image_token_id, -100)
    assert not torch.equal(every, text)
    losses = [exported.model(**{**inputs, "labels": labels}).loss for labels in (every, text)]
    assert torch.equal(*losses) and losses[0].isfinite()


def test_the_base_model(exported):  # noqa: F811
    """`AutoModel` gives the states that the output layer reads; none where no text token is predicted."""
    base = AutoModel.from_pretrained(exported.folder, trust_remote_code=True)
    inputs = inputs_of(exported.processor, chats(exported.images))
    labels = inputs.pop("labels")
    whole = exported.model(**inputs, output_hidden_states=True)
    states = base(**inputs).last_hidden_state
    assert torch.equal(states, exported.model.base_model(**inputs).last_hidden_state)
    head = exported.model.get_output_embeddings()
    logits = states @ head.weight.T + head.bias
    image_next = inputs["input_ids"].roll(-1, 1) >= exported.model.config.image_token_id
    image_next[:, -1] = False
    torch.testing.assert_close(logits[~image_next], whole.logits[~image_next])
    assert not states[image_next].any()
    assert head.weight.shape == (exported.model.config.vocab_size, states.shape[-1])
    assert exported.model.config.hidden_size == states.shape[-1]
    # All tokens as labels, TRL's default: what no text token predicts leaves no gradient.
    chosen = (labels != -100) | (inputs["input_ids"] >= exported.model.config.image_token_id)
    following = inputs["input_ids"].masked_fill(~chosen, -100)[:, 1:]
    grads = []
    for targets in (following, labels[:, 1:]):
        base.zero_grad()
        states = base(**inputs).last_hidden_state
        logits = states[:, :-1] @ head.weight.detach().T + head.bias
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        grads.append([p.grad.clone() for p in base.parameters() if p.grad is not None])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def loaded(e: Exported, folder: Path | None = None) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder or e.folder, trust_remote_code=True)


def rows_of(e: Exported) -> list[dict]:
    """The chats with images as TRL takes them: images apart, in the order of their parts."""
    rows = []
    for messages in chats(e.images):
        paths = [part["path"] for part in images_of(messages)]
        bare = json.loads(json.dumps(messages))
        for message in bare:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        for part in images_of(bare):
            del part["path"]
        rows.append({"images": [Image.open(path) for path in paths], "messages": bare})
    return [row for row in rows if row["images"]]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """What a test must set; everything else is the trainer's default."""
    small = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    quiet = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return small | quiet | more


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def same_as_ours(e: Exported, folder: Path, model: Any) -> None:
    """A folder that another trainer saved from `model`: this project computes what transformers does."""
    own, batch = Predictor.from_pretrained(folder).model, own_batch(e, chats(e.images))[0]
    again, inputs = loaded(e, folder), inputs_of(e.processor, chats(e.images))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    with torch.no_grad():
        torch.testing.assert_close(own(**batch).losses.mean(), again(**inputs).loss, atol=1e-4, rtol=1e-4)


def test_sft_with_the_defaults_of_trl(exported, tmp_path):  # noqa: F811
    """On messages; what it saves is one of our folders: it answers and trains on."""
    model = loaded(exported)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**options(tmp_path / "run", learning_rate=1e-3, max_steps=3)),
        train_dataset=Dataset.from_list(rows_of(exported)),
        processing_class=exported.processor,
    )
    trainer.train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (".heads." in name), name
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    same_as_ours(exported, tmp_path / "saved", model)
    if exported.own.model.config.left_context == "prefix":
        return
    vanilla = exported.own.model.config.left_context == "none"
    done = run_program(
        [
            str(ROOT / "generate.py"),
            *("--checkpoint", str(tmp_path / "saved"), "--image", exported.images["a"]),
            *("--prompt", "what is it?", "--max_new_tokens", "3"),
        ],
        tmp_path,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = run_program(
        [
            str(ROOT / ("train_vanilla.py" if vanilla else "train_dual_tower.py")),
            *(("--config", "vanilla_easyvqa") if vanilla else ()),
            *(
                "--init_from",
                str(tmp_path / "saved"),
                "--max_steps",
                "1",
                "--output_dir",
                str(tmp_path / "on"),
            ),
            *("--train.global_batch_size", "2", "--train.local_batch_size", "2", "--train.lr_right", "0"),
        ],
        tmp_path,
    )
    assert done.returncode == 0 and f"all weights from {tmp_path / 'saved'}" in done.stdout, done.stderr
    ours, theirs = Predictor.from_pretrained(tmp_path / "on/model").model.right, model.model.right
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name  # frozen there


def test_assistant_only_loss_is_ours(exported, tmp_path):  # noqa: F811
    """Tiles, images in two turns, LoRA without effect yet: the first loss is the loss of our training."""
    rows, many = rows_of(exported), [chat for chat in chats(exported.images) if images_of(chat)]
    if exported.own.model.config.left_context == "prefix":  # TRL counts answers before an image, we do not
        rows, many = rows[1:], many[1:]
    trainer = SFTTrainer(
        loaded(exported),
        args=SFTConfig(**options(tmp_path, assistant_only_loss=True, bf16=False)),
        train_dataset=Dataset.from_list(rows),
        processing_class=exported.processor,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    expected = exported.own.model(**own_batch(exported, many)[0]).losses.mean().item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-3)  # it logs four digits
    assert losses(trainer)[1] < losses(trainer)[0]


def test_lora_of_peft(exported, tmp_path):  # noqa: F811
    """Trains, is saved, loaded and merged; the merged folder is one of ours."""
    model = get_peft_model(
        loaded(exported),
        LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["modality_projector"]
        ),
    )
    inputs = inputs_of(exported.processor, chats(exported.images))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = None
    for _ in range(3):
        loss = model(**inputs).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**inputs).loss.item() < first
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(exported), tmp_path / "adapter")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logits = model(**prompt).logits
    assert torch.equal(again(**prompt).logits, logits)
    assert torch.equal(
        again.generate(**prompt, max_new_tokens=4), model.eval().generate(**prompt, max_new_tokens=4)
    )
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**prompt).logits, logits, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    exported.processor.save_pretrained(tmp_path / "merged")
    same_as_ours(exported, tmp_path / "merged", merged)


@pytest.mark.parametrize("trainer_class", [DPOTrainer, GRPOTrainer])
def test_preferences_and_rewards(exported, trainer_class, tmp_path):  # noqa: F811
    """DPO and GRPO run with their defaults, on images of one and of several tiles."""
    rows = [
        {
            "images": [Image.open(exported.images[name])],
            "prompt": [{"role": "user", "content": "what is it?"}],
            "chosen": [{"role": "assistant", "content": "a rectangle"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for name in "abab"
    ]
    if trainer_class is DPOTrainer:
        arguments = {"args": DPOConfig(**options(tmp_path, learning_rate=1e-4, trust_remote_code=True))}
    else:
        rows = [{name: row[name] for name in ("images", "prompt")} for row in rows]
        arguments = {
            "args": GRPOConfig(**options(tmp_path, num_generations=2, max_completion_length=6)),
            "reward_funcs": lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
        }
    model = loaded(exported)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_class(
        model=model,
        train_dataset=Dataset.from_list(rows),
        processing_class=exported.processor,
        **arguments,
    )
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))
    assert sum(not torch.equal(p, before[name]) for name, p in model.named_parameters()) > 50


def test_rows_of_text_alone(exported, tmp_path):  # noqa: F811
    turns = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "it is small"}]
    rows = [{"messages": turns}] * 2
    trainer = SFTTrainer(
        loaded(exported),
        args=SFTConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=exported.processor,
    )
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]


def test_adapters_that_cannot_work_say_so(exported, tmp_path):  # noqa: F811
    """On the output layer, which has no weights, and on embeddings that it shares; an adapter is no model."""
    with pytest.raises(ValueError, match="leave it out of modules_to_save"):
        get_peft_model(loaded(exported), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model = get_peft_model(loaded(exported), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="LoRA on embed_tokens is not supported"):
        model(**inputs_of(exported.processor, chats(exported.images)))
    get_peft_model(loaded(exported), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it holds an adapter: save the merged model"):
        Predictor.from_pretrained(tmp_path)


def test_the_trainer_of_transformers_resumes(exported, tmp_path):  # noqa: F811
    """Four steps, and two with two more from their checkpoint: the same weights."""
    many = chats(exported.images)

    def trained(folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        arguments = options(folder, max_steps=steps, save_strategy="steps", save_steps=2, learning_rate=1e-3)
        trainer = Trainer(
            loaded(exported),
            TrainingArguments(**arguments, remove_unused_columns=False, lr_scheduler_type="constant"),
            train_dataset=many,
            data_collator=lambda rows: inputs_of(exported.processor, rows),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "parts", 2)
    resumed = trained(tmp_path / "parts", 4, resume=True)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name


def test_gradient_checkpointing_changes_nothing(exported):  # noqa: F811
    inputs = inputs_of(exported.processor, chats(exported.images))
    gradients = []
    for checkpointing in (False, True):
        model = loaded(exported).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**inputs).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="'use_reentrant': True"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
