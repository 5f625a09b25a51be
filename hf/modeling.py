"""Both models as models of transformers: `AutoModel` and `AutoModelForImageTextToText`.

The base model's tensors have the names of `model.safetensors`; the other's begin with `model.`, as elsewhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from configs.model import ModelConfig, Vocabulary
from configs.serialization import from_dict
from hf.configuration import DualTowerConfig, InputError, TowerConfig, VanillaConfig
from hf.generation import TowerGenerationMixin
from models.dual_tower.dual_tower import DualTowerVLM
from models.language_model import DecoderBlock
from models.vision_language_model import VisionLanguageModel
from utils.errors import nearest

IGNORE = -100
# Logit of image tokens, which the right tower never predicts; finite, because TRL may have them as labels.
# Where a text logit is 0 or more, all of them add less than 1e-5 to its exponential.
NEVER = -16.0


@dataclass
class Streams:
    """`input_ids` (B, T) routed to the two streams, as the batch of data/collators.py has them."""

    batch: dict[str, Tensor]  # left stream (B, L) and right stream (B, R), without labels
    right: Tensor  # (B, T) bool, True at tokens of the right stream
    columns: Tensor  # (B, R), where in (B, T) the right stream's tokens stand

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, vocabulary: Vocabulary, left_context: str) -> "Streams":
        """Route `ids` (B, T), which count where `mask` (B, T) is True. A row is one document."""
        in_image = mask & (ids >= vocabulary.image_token_id)
        positions = mask.cumsum(1) - 1
        images = (mask & (ids == vocabulary.first_marker_id)).cumsum(1) - 1  # a block begins with this marker
        images = images.masked_fill(~in_image, -1)
        left = {
            "none": torch.zeros_like(in_image),
            "image": in_image,
            "prefix": mask & in_image.flip(1).cummax(1).values.flip(1),  # up to the last image token
        }[left_context]
        right = mask & ~left
        columns, valid = _columns(left, 0)
        batch = {
            "left_ids": ids.gather(1, columns).masked_fill(~valid, vocabulary.first_marker_id),
            "left_positions": positions.gather(1, columns).masked_fill(~valid, 0),
            "left_groups": valid.long() - 1,
            "left_images": images.gather(1, columns).masked_fill(~valid, -1),
        }
        columns, valid = _columns(right, 1)
        batch |= {
            "right_ids": ids.gather(1, columns).masked_fill(~valid, 0),
            "right_positions": positions.gather(1, columns).masked_fill(~valid, 0),
            "right_documents": valid.long() - 1,
            "right_groups": valid.long() - 1,
        }
        return cls(batch, right, columns)

    @property
    def valid(self) -> Tensor:
        """(B, R), False at padding."""
        return self.batch["right_documents"] >= 0

    def labels(self, labels: Tensor, in_text: Tensor) -> Tensor:
        """Labels (B, T) of the tokens themselves → of the next token (B, R), −100 where nobody predicts it.

        `in_text` (B, T): tokens that the right tower can predict.
        """
        following = F.pad(labels.masked_fill(~in_text, IGNORE)[:, 1:], (0, 1), value=IGNORE)
        return following.gather(1, self.columns).masked_fill(~self.valid, IGNORE)

    def spread(self, hidden: Tensor) -> Tensor:
        """The right stream's states (B, R, D) → (B, T, D), zero at tokens that are not in it."""
        out = hidden.new_zeros(*self.right.shape, hidden.shape[-1])
        return out.masked_scatter(self.right[..., None], hidden[self.valid])


def _columns(chosen: Tensor, min_length: int) -> tuple[Tensor, Tensor]:
    """The columns of each row's `chosen` (B, T) tokens in order, and which of them are not padding."""
    counts = chosen.sum(1, keepdim=True)
    length = max(min_length, int(counts.max()))
    columns = chosen.logical_not().int().argsort(dim=1, stable=True)[:, :length]
    return columns, torch.arange(length, device=chosen.device) < counts


class TowerPreTrainedModel(PreTrainedModel):
    """What both models below have in common."""

    config: TowerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("DualTowerModel", "VanillaModel")  # device_map places each on one device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Compute the buffers that no file holds: transformers fills in only the tensors of the file."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise InputError(
            "resize_token_embeddings is not supported: the image tokens stand at the end of the vocabulary"
        )

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        function = getattr(gradient_checkpointing_func, "func", checkpoint)
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if function is not checkpoint or options not in ({}, {"use_reentrant": False}):
            raise InputError(f"gradient checkpointing is not supported with offload or {options}")
        blocks = [block for block in self.modules() if isinstance(block, DecoderBlock)]
        for index, block in enumerate(blocks):
            block.recompute = enable and index % every_n_layers == 0

    def check_device_map(self) -> None:
        """Raise `InputError` where `device_map` spreads the model: its towers read one another's tensors."""
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            raise InputError("device_map must place the whole model on one device")

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(isinstance(block, DecoderBlock) and block.recompute for block in self.modules())

    is_activation_checkpointing = is_gradient_checkpointing


class TowerModel(TowerPreTrainedModel):
    """The model without its output layer. `vlm` is this project's own model, with the same children."""

    model_class: type[nn.Module]

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        vlm = self.model_class(
            from_dict(ModelConfig, config.model, "config.json: model"),
            from_dict(Vocabulary, config.vocabulary, "config.json: vocabulary"),
        )
        self.__dict__["vlm"] = vlm  # not a child: its children are, under their own names
        self._modules = vlm._modules
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.right.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise InputError("set_input_embeddings is not supported: embeddings are shared with the output layer")

    def streams(self, input_ids: Any, attention_mask: Any, pixel_values: Any) -> Streams:
        """Check the arguments of `forward` and route the tokens. Errors: `InputError`."""
        mask = checked_mask(input_ids, attention_mask)
        self._check_ids(input_ids, mask, pixel_values)
        return Streams.of(input_ids, mask, self.vlm.vocabulary, self.vlm.config.left_context)

    def _check_ids(self, ids: Tensor, mask: Tensor, pixel_values: Tensor | None) -> None:
        vocabulary, config = self.vlm.vocabulary, self.vlm.config
        seen = ids[mask]
        if len(wrong := seen[(seen < 0) | (seen >= vocabulary.size)]):
            raise InputError(
                f"input_ids hold {int(wrong[0])}, this model's vocabulary has {vocabulary.size:,} tokens: "
                "they come from another tokenizer"
            )
        if (length := int(mask.sum(1).max())) > (limit := config.right.max_positions):
            raise InputError(f"a row has {length} tokens, this model takes {limit}")
        markers = (seen > vocabulary.image_token_id).sum()
        image_tokens = int((seen == vocabulary.image_token_id).sum())
        tiles = 0 if pixel_values is None else len(pixel_values)
        if image_tokens != markers * config.tokens_per_tile or markers != tiles:
            raise InputError(
                f"Image features and image tokens do not match: input_ids have {markers} image tiles with "
                f"{image_tokens} image tokens, {config.tokens_per_tile} for each, and pixel_values holds "
                f"{tiles} tiles: give both as the processor makes them"
            )
        side = config.vision.image_size
        if tiles and (pixel_values.dtype != torch.uint8 or pixel_values.shape[1:] != (3, side, side)):
            raise InputError(
                f"pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}, expected torch.uint8 "
                f"(N, 3, {side}, {side}), as the processor makes them"
            )

    def run(
        self, streams: Streams, pixel_values: Tensor | None, all_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """States of the right stream (B, R, D), normed; with `all_states` also of every layer (B, T, D).

        Those are the states before each block, and the normed ones.
        """
        right = self.vlm.right
        if right.config.tied_embeddings and hasattr(right.embed_tokens, "lora_embedding_A"):
            raise InputError(
                "LoRA on embed_tokens is not supported: the output layer shares its weight; "
                "use modules_to_save=['embed_tokens']"
            )
        side, ids = self.vlm.config.vision.image_size, streams.batch["right_ids"]
        tiles = ids.new_empty(0, 3, side, side, dtype=torch.uint8) if pixel_values is None else pixel_values
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, inputs, output: states.append(streams.spread(inputs[0])))
            for block in right.layers
            if all_states
        ]
        try:
            hidden = self.vlm(tiles=tiles.to(ids.device), **streams.batch).hidden
        finally:
            for hook in hooks:
                hook.remove()
        return hidden, (*states, streams.spread(hidden)) if all_states else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple:
        """Token ids (B, T) with their images → `last_hidden_state` (B, T, D).

        Arguments as the processor makes them: rows are padded on either side, where `attention_mask` (B, T)
        is 0; `pixel_values` (N, 3, h, w) uint8 holds the tiles of all images, in the order of their blocks.

        States are zero where no text token is predicted: at padding, at tokens of the left tower, and before
        an image. So they have no gradient there, whatever the labels. Errors: `InputError`, also for
        arguments that are not supported.
        """
        refuse(kwargs, type(self).__name__)
        self.check_device_map()
        streams = self.streams(input_ids, attention_mask, pixel_values)
        hidden, states = self.run(streams, pixel_values, bool(output_hidden_states))
        before_image = F.pad(input_ids[:, 1:] >= self.config.image_token_id, (0, 1))
        last = streams.spread(hidden).masked_fill(before_image[..., None], 0)
        output = BaseModelOutput(last_hidden_state=last, hidden_states=states)
        return output if return_dict is not False else output.to_tuple()


class OutputEmbeddings(nn.Module):
    """The output layer over the whole vocabulary. It has no parameters of its own.

    A right tower that never reads image tokens has no rows for them: their logit is `NEVER`.
    """

    def __init__(self, vlm: nn.Module) -> None:
        super().__init__()
        self.__dict__["vlm"] = vlm

    @property
    def weight(self) -> Tensor:
        """(V, D)"""
        weight = self.vlm.right.unembedding
        return F.pad(weight, (0, 0, 0, self.vlm.vocabulary.size - len(weight)))

    @property
    def bias(self) -> Tensor:
        """(V,)"""
        weight = self.vlm.right.unembedding
        bias = weight.new_zeros(len(weight))
        return F.pad(bias, (0, self.vlm.vocabulary.size - len(weight)), value=NEVER)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)"""
        return F.linear(hidden, self.weight, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OutputEmbeddings":
        if id(self.vlm) not in memo:
            raise InputError("lm_head has no weights of its own: leave it out of modules_to_save")
        return OutputEmbeddings(memo[id(self.vlm)])


class TowerForConditionalGeneration(TowerPreTrainedModel, TowerGenerationMixin):
    """The model with logits, loss and this project's own `generate`. Its base model is `model`."""

    base_class: type[TowerModel]

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.model = self.base_class(config)
        self.lm_head = OutputEmbeddings(self.model.vlm)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        raise InputError("set_output_embeddings is not supported: lm_head has no weights of its own")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Token ids (B, T) with their images → `logits` (B, T, V), and with `labels` the `loss`.

        Arguments as in the base model. `labels` (B, T): the tokens themselves where they are supervised, else
        −100; image tokens, and text that goes through the left tower, are never supervised. The loss is the
        mean over supervised tokens, or their sum ÷ `num_items_in_batch`. Multi-token heads are not trained.
        `logits_to_keep`: logits of this many last positions (0: all), or of these positions.
        """
        refuse(kwargs, type(self).__name__)
        self.check_device_map()
        model = self.model
        streams = model.streams(input_ids, attention_mask, pixel_values)
        hidden, states = model.run(streams, pixel_values, bool(output_hidden_states))
        loss = None
        if labels is not None:
            next_labels = streams.labels(labels, input_ids < self.config.image_token_id)
            count = (next_labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
            loss_sum = model.vlm.right.loss(hidden, next_labels).sum()
            loss = loss_sum / torch.as_tensor(count, device=loss_sum.device).clamp(min=1)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(streams.spread(hidden)[:, positions])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states)
        return output if return_dict is not False else output.to_tuple()


def checked_mask(input_ids: Any, attention_mask: Any) -> Tensor:
    """Check prompts and their mask → the mask (B, T), bool."""
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.is_floating_point()
        or not isinstance(attention_mask, Tensor | None)
    ):
        raise InputError(
            "input_ids and attention_mask must be tensors of integers, as the processor makes them with "
            "return_tensors='pt'"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool()
    if input_ids.ndim != 2 or mask.shape != input_ids.shape or not input_ids.numel() or not mask.any(1).all():
        raise InputError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)} must be (B, T), "
            "with at least one token a row"
        )
    return mask


def refuse(kwargs: dict[str, Any], name: str) -> None:
    """Raise `InputError` for arguments that ask for something that is not supported."""
    known = [
        "input_ids",
        "attention_mask",
        "pixel_values",
        "labels",
        "logits_to_keep",
        "output_hidden_states",
    ]
    neutral = ("output_attentions", "output_router_logits")
    for argument, value in kwargs.items():
        if value is not None and (value is not False or argument not in neutral):
            raise InputError(f"{name}: the argument {argument} is not supported{nearest(argument, known)}")


class DualTowerModel(TowerModel):
    config_class = DualTowerConfig
    model_class = DualTowerVLM


class VanillaModel(TowerModel):
    config_class = VanillaConfig
    model_class = VisionLanguageModel


class DualTowerForConditionalGeneration(TowerForConditionalGeneration):
    config_class = DualTowerConfig
    base_class = DualTowerModel


class VanillaForConditionalGeneration(TowerForConditionalGeneration):
    config_class = VanillaConfig
    base_class = VanillaModel
