"""OpenAI's requests, as far as they are understood here, and how they become settings of `generate`.

Unknown fields are ignored, as other servers do. Fields that ask for something that this server cannot do are
refused by name.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.model import GenerationConfig
from serving.requests import Refused

# Field → values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "prompt_logprobs": (None,),
}

# Each token is compared with all beginnings of a stop string.
Stop = Annotated[str, Field(max_length=256)]


class Sampling(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None  # −1: no limit
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = None  # −1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    response_format: dict[str, Any] | None = None

    @property
    def answer_limit(self) -> int | None:
        """Tokens of the answer; None: the server's default."""
        return None if self.max_tokens in (None, -1) else self.max_tokens

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    def refuse_unsupported(self) -> None:
        for name, neutral in UNSUPPORTED.items():
            if (self.model_extra or {}).get(name) not in neutral:
                raise Refused(400, "unsupported", f"'{name}' is not supported by this server")

    def settings(self, tokens: int) -> list[GenerationConfig]:
        """One for each of the `n` answers of at most `tokens` tokens. Greedy without a temperature."""
        seed = (secrets.randbits(62) if self.seed is None else self.seed) % 2**62
        sampling = bool(self.temperature)
        return [
            GenerationConfig(
                sampling=sampling,
                temperature=max(self.temperature or 1.0, 1e-6),
                top_k=max(0, self.top_k or 0) if sampling else 0,
                top_p=(self.top_p or 1.0) if sampling else 1.0,
                min_p=(self.min_p or 0.0) if sampling else 0.0,
                repetition_penalty=self.repetition_penalty or 1.0,
                max_new_tokens=tokens,
                seed=seed + i,
            )
            for i in range(self.n or 1)
        ]


class ChatRequest(Sampling):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def answer_limit(self) -> int | None:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if limit in (None, -1) else limit


class CompletionRequest(Sampling):
    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class AttentionRequest(BaseModel):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    answer: Annotated[str, Field(min_length=1)]
    token: Annotated[int, Field(ge=0)]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dualtowervlm"
    max_model_len: int
    architecture: str
    system: bool
    handles: bool
    heads: int
