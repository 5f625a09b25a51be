"""Answers that follow a JSON schema: llguidance computes which tokens may come next."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import Tokenizer
from serving.requests import Refused

# Spaces and line ends that a schema allows anywhere tempt a small model to write nothing else.
COMPACT: Any = {"whitespace_flexible": False}
Constraint = Callable[[list[int], Tensor], None]


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.guide = lru_cache(1)(self._guide)

    def _guide(self) -> Any:
        try:
            import llguidance.hf
        except ImportError:
            raise Refused(
                400, "unsupported", "'response_format' needs the package llguidance on the server"
            ) from None
        import transformers

        ending = self.tokenizer.template.turn_end
        make: Any = transformers.PreTrainedTokenizerFast
        fast = make(tokenizer_object=self.tokenizer.backend, eos_token=ending)
        return llguidance.hf.from_tokenizer(fast)

    def constraint(self, response_format: dict[str, Any] | None) -> Constraint | None:
        """The constraint of a request's `response_format`; None for plain text. `Refused` for a bad one."""
        kind = (response_format or {"type": "text"}).get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            schema: Any = {"type": "object"}
        elif kind == "json_schema":
            named = (response_format or {}).get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if not isinstance(schema, dict):
                raise Refused(400, "invalid_schema", "'response_format.json_schema.schema' must be an object")
        else:
            raise Refused(
                400, "unsupported", "'response_format.type' must be text, json_object or json_schema"
            )
        guide = self.guide()
        from llguidance import LLMatcher
        from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "invalid_schema", f"the JSON schema is not accepted: {error}") from None
        matcher = LLMatcher(guide, grammar)
        if matcher.is_error():
            raise Refused(400, "invalid_schema", f"the JSON schema is not accepted: {matcher.get_error()}")
        bitmask, consumed = allocate_token_bitmask(1, guide.vocab_size), 0

        def mask(tokens: list[int], logits: Tensor) -> None:
            nonlocal consumed
            for token in tokens[consumed:]:
                matcher.consume_token(token)
            consumed = len(tokens)
            fill_next_token_bitmask(matcher, bitmask)
            allowed = (bitmask[0, :, None] >> torch.arange(32) & 1).flatten().bool()  # bit i of each word
            allowed = F.pad(allowed, (0, max(0, len(logits) - len(allowed))))[: len(logits)]
            logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

        return mask
