"""The model card: README.md of a model folder. Lines whose figures are not known are left out."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from configs.model import DecoderConfig, VisionConfig
from utils.hub import is_hub_id

KINDS = {
    "dual_tower": "a dual-tower vision-language model: its left tower turns an image into a per-layer KV cache, its right tower, a language model, reads text and that cache. "
    "Every token goes through exactly one tower; an image is encoded once and can be asked any number of questions.",
    "vanilla": "a vision-language model with one decoder for image and text tokens, in the manner of nanoVLM: the baseline of the dual tower.",
}
PARTS = {
    "vision": "vision encoder",
    "projector": "modality projector",
    "left": "left decoder",
    "right": "right decoder",
    "heads": "multi-token heads",
}
LIMITS = """It answers in the manner of its training data, in their languages and on their kinds of images, and is confident where it is wrong: check what it says before you rely on it.
Nothing has been done against harmful or biased answers."""
TRANSFORMERS = """With 🤗 transformers alone (and timm), which runs the code that stands beside the weights:

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="REPO_OR_FOLDER", trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "path": "FILE"}, {"type": "text", "text": "What is in the image?"}]}]
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
    """What a card tells of a training run; what stays empty is left out. `data` and `training` are (what, value), `scores` (metric, value, standard error, untrained)."""

    name: str = ""
    licence: str = ""
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    training: tuple[tuple[str, str], ...] = ()
    scores: tuple[tuple[str, str, str, str], ...] = ()
    picture: str = ""  # a file beside the card
    code: bool = False  # whether the code by which transformers loads it will stand beside it, as it does where it was loaded with it


def card_of(model: Any, run: RunFacts) -> ModelCard:
    """The card of a `HubModel`. A front matter that the Hub would not take raises `ValueError`."""
    found = {*run.base_models, *_base_models(model)}
    known: dict[str, Any] = {
        "license": run.licence,
        "base_model": sorted(found),
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
        parts.append(
            "\n\n".join(
                [
                    "## Training",
                    *[_table(("", ""), run.training)] * bool(run.training),
                    *[f"![Loss by step]({run.picture})"] * bool(run.picture),
                ]
            )
        )
    if run.scores:
        parts.append(f"## Scores\n\n{_scores(run.scores)}")
    parts += [
        f"## Limits\n\n{LIMITS}\nAn image and its conversation may take {model.config.right.max_positions:,} tokens together, of which a tile takes {model.config.tokens_per_tile:,}."
    ]
    parts += [
        f"## Licence\n\n{_licence(run.licence)}",
        f"## Use\n\n{_use(model, run.code or bool(model.code))}",
        f"## Citation\n\n{CITATION}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _base_models(model: Any) -> list[str]:
    """Ids of the pretrained parts that come from the Hub."""
    vision: VisionConfig = model.config.vision
    sources = [getattr(model.config, tower).weights for tower in model.config.towers]
    return [f"timm/{vision.name}"] * (vision.weights == "hub") + [
        source.partition("@")[0] for source in sources if is_hub_id(source)
    ]


def _model(model: Any) -> str:
    c, counts = (
        model.config,
        {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()},
    )
    told = {
        "vision": f"{c.vision.name} (timm), tiles of {c.vision.image_size} × {c.vision.image_size} pixels",
        "projector": f"{c.tokens_per_tile} image tokens a tile",
    }
    told |= {tower: _decoder(getattr(c, tower)) for tower in c.towers} | {
        "heads": f"{c.multi_token.heads} tokens drafted for a pass"
    }
    rows = [(PARTS[name], told[name], f"{count:,}") for name, count in counts.items()]
    return _table(
        ("part", "what", "parameters"),
        [*rows, ("all", "", f"{sum(p.numel() for p in model.parameters()):,}")],
    )


def _decoder(c: DecoderConfig) -> str:
    return f"{c.layers} layers of {c.hidden_size}, {c.heads} query and {c.kv_heads} key-value heads"


def _scores(scores: tuple[tuple[str, str, str, str], ...]) -> str:
    shown = [column for column in range(4) if column < 2 or any(row[column] for row in scores)]
    head = ("score", "value", "± standard error", "untrained")
    table = _table([head[column] for column in shown], [[row[column] for column in shown] for row in scores])
    baseline = "\n\nUntrained: the same model with random weights, scored the same way. Compare a score with this baseline."
    return table + baseline * (3 in shown)


def _licence(licence: str) -> str:
    stated = (
        f"The weights are published under {licence}."
        if licence
        else "No licence of the weights has been stated."
    )
    return f"{stated} The code they run with is Apache-2.0. Pretrained parts and training data, named above, have licences of their own."


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
    """Markdown; a cell's text is kept from being read as a table's."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )
