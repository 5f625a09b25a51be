"""Filters: turns by rating and length. Every drop is counted under a reason."""

from typing import Any

from configs.train import FilterConfig

RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")  # FineVision's, 1 to 5


def turn_problem(turn: dict[str, Any], filters: FilterConfig) -> str | None:
    """Return the reason to drop a turn, or None.

    Reasons: a missing half, a rating below its minimum, a length (in characters) out of bounds.
    """
    user, assistant = turn.get("user"), turn.get("assistant")
    if not (isinstance(user, str) and isinstance(assistant, str) and user.strip() and assistant.strip()):
        return "empty_text"
    for name in RATINGS:
        minimum, rating = getattr(filters, f"min_{name}"), (turn.get("ratings") or {}).get(name)
        if minimum and isinstance(rating, int | float) and rating < minimum:
            return f"rating_{name}"
    for text, name in ((user, "question"), (assistant, "answer")):
        if len(text) < getattr(filters, f"min_{name}"):
            return f"short_{name}"
        if len(text) > (getattr(filters, f"max_{name}") or len(text)):
            return f"long_{name}"
    return None
