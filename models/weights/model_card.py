"""The model card: README.md of a model folder. Lines with unknown figures are left out."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from configs.model import DecoderConfig, VisionConfig
from utils.hub import is_hub_id

KINDS = {
    "dual_tower": "a dual-tower vision-language model: its left tower turns an image into a per-layer "
    "KV cache, its right tower, a language model, reads text and that cache. Every token goes through "
    "exactly one tower; an image is encoded once and can be asked any number of questions.",
    "vanilla": "a vision-language model with one decoder for image and text tokens, in the manner of "
    "nanoVLM: the baseline of the dual tower.",
}
PARTS = {
    "vision": "vision encoder",
    "projector": "modality projector",
    "left": "left decoder",
    "right": "right decoder",
    "heads": "multi-token heads",
}
LIMITS = """It answers in the style of its training data, in their languages and on their kinds of images.
It is confident even when it is wrong: check an answer before you rely on it.
Nothing has been done against harmful or biased answers."""
TRANSFORMERS = """With 🤗 transformers alone (and timm), which runs the code next to the weights:

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="REPO_OR_FOLDER", trust_remote_code=True)
question = {"type": "text", "text": "What is in the image?"}
chat = [{"role": "user", "content": [{"type": "image", "path": "FILE"}, question]}]
print(pipe(chat, max_new_tokens=32, return_full_text=False)[0]["generated_text"])
```

"""
CITATION = r"""The training recipe descends from nanoVLM:

```bibtex
@misc{wiedmann2025nanovlm,
  author = {Luis Wiedmann and Aritra Roy Gosthipaty and Andrés Marafioti},
  title = {nanoVLM},
  year = {2025},
  publisher = {GitHub},
  journal = {GitHub repository},
  howpublished = {\url{https://github.com/huggingface/nanoVLM}}
}
```"""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a training run that a card states; empty ones are left out.

    Rows of `data` and `training` are (name, value), of `scores` (metric, value, standard error, untrained).
    """

    name: str = ""
    licence: str = ""
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    training: tuple[tuple[str, str], ...] = ()
    scores: tuple[tuple[str, str, str, str], ...] = ()
    picture: str = ""  # a file in the card's folder
    code: bool = False  # whether the code for transformers will be added to the folder


def card_of(model: Any, run: RunFacts) -> ModelCard:
    """Write the card of a `HubModel`. A front matter that the Hub would refuse raises `ValueError`."""
    base_models = {*run.base_models, *_base_models(model)}
    known: dict[str, Any] = {
        "license": run.licence,
        "base_model": sorted(base_models),
        "datasets": list(run.datasets),
    }
    data = ModelCardData(
        **model._hub_mixin_info.model_card_data.to_dict(),
        **{key: value for key, value in known.items() if value},
    )
    parts = [
        f"# {run.name or 'A model of DualTowerVLM'}",
        f"This is {KINDS[model.model_type]}",
        f"## Model\n\n{_model(model)}",
    ]
    if run.data:
        parts.append(f"## Data\n\n{_table(('', ''), run.data)}")
    if run.training or run.picture:
        parts.append("## Training")
        if run.training:
            parts.append(_table(("", ""), run.training))
        if run.picture:
            parts.append(f"![Loss by step]({run.picture})")
    if run.scores:
        parts.append(f"## Scores\n\n{_scores(run.scores)}")
    parts += [
        f"## Limits\n\n{LIMITS}\nAn image and its conversation may take {model.config.right.max_positions:,} "
        f"tokens together, of which a tile takes {model.config.tokens_per_tile:,}.",
        f"## Licence\n\n{_licence(run.licence)}",
        f"## Use\n\n{_use(model, run.code or bool(model.code))}",
        f"## Citation\n\n{CITATION}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _base_models(model: Any) -> list[str]:
    """List the Hub ids of the pretrained parts."""
    vision: VisionConfig = model.config.vision
    sources = [getattr(model.config, tower).weights for tower in model.config.towers]
    return [f"timm/{vision.name}"] * (vision.weights == "hub") + [
        source.partition("@")[0] for source in sources if is_hub_id(source)
    ]


def _model(model: Any) -> str:
    """Write the table of parts and their parameters."""
    c = model.config
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    descriptions = {
        "vision": f"{c.vision.name} (timm), tiles of {c.vision.image_size} × {c.vision.image_size} pixels",
        "projector": f"{c.tokens_per_tile} image tokens a tile",
    }
    descriptions |= {tower: _decoder(getattr(c, tower)) for tower in c.towers} | {
        "heads": f"{c.multi_token.heads} tokens drafted per decode step"
    }
    if c.has_shallower_left:
        read = ", ".join(map(str, c.left_layer_of))
        descriptions["left"] += f"; the right decoder's layers read its layers {read}"
    rows = [(PARTS[name], descriptions[name], f"{count:,}") for name, count in counts.items()]
    return _table(
        ("part", "description", "parameters"),
        [*rows, ("all", "", f"{sum(p.numel() for p in model.parameters()):,}")],
    )


def _decoder(c: DecoderConfig) -> str:
    return f"{c.layers} layers of {c.hidden_size}, {c.heads} query and {c.kv_heads} key-value heads"


def _scores(scores: tuple[tuple[str, str, str, str], ...]) -> str:
    """Write the table of scores. A column after the first two is left out where all its cells are empty."""
    columns = [column for column in range(4) if column < 2 or any(row[column] for row in scores)]
    names = ("score", "value", "± standard error", "untrained")
    table = _table(
        [names[column] for column in columns], [[row[column] for column in columns] for row in scores]
    )
    if 3 not in columns:
        return table
    return (
        f"{table}\n\nUntrained: the same model with random weights, scored the same way. "
        "Compare a score with this baseline."
    )


def _licence(licence: str) -> str:
    stated = (
        f"The weights are published under {licence}."
        if licence
        else "No licence of the weights has been stated."
    )
    return (
        f"{stated} The code they run with is Apache-2.0. "
        "Pretrained parts and training data, named above, have licences of their own."
    )


def _use(model: Any, code: bool) -> str:
    return f"""{TRANSFORMERS * code}With the code of DualTowerVLM, from its root:

```bash
python generate.py --checkpoint REPO_OR_FOLDER --image FILE --prompt "What is in the image?"
```

```python
from {type(model).__module__} import {type(model).__name__}

model = {type(model).__name__}.from_pretrained("REPO_OR_FOLDER")
```"""


def _table(head: Any, rows: Any) -> str:
    """Write a Markdown table; newlines and `|` in a cell are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )
