"""The choice of how many drafts a decode step verifies."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from configs.model import GenerationConfig

TREE = 11  # drafts of a tree: with the token before them 12 rows (docs/experiments.md)
TREE_ROWS = 32  # a batch's most for trees: `Packed.MOST`
NOMINAL = 0.2  # what a draft costs, in passes, where the clock must not count: in drawn answers, with drawing (docs/benchmarks.md)


class DraftPlan(NamedTuple):
    """Of drafts: a chain of `depth`, or where `width` is above 1 a tree."""

    depth: int
    width: int = 1


class DraftScheduler:
    """What to draft: what gives most tokens a second, by what was accepted and what passes took, as far as it may lose.

    The k-th draft's chance is a running mean, a shape's seconds the median of its last passes, for some are disturbed; before there are any, what
    `stands` says, and a guess. `purse` holds the plain passes that drafts may still lose: `LOSS` of the time so far, and what they gained, at most `PURSE`, of which
    the next answer gets no more than `CARRY`. A shape is made where all its drafts could fall without overdrawing it, as far as its cost is known. What is not tried
    is slowly hoped for again, so that a change in the text is noticed.
    """

    RECOVERY = 0.0003  # of the way back, at each pass
    LOSS, BUDGET, CARRY = (
        0.02,
        2.0,
        0.6,
    )  # 3 % is what answers may lose: plain passes between others take a little longer, too
    GUESS = 0.08  # what a draft costs, in plain passes; in trees twice that (docs/benchmarks.md)
    LAST, AGAIN = (
        5,
        64,
    )  # passes of a shape that are remembered; of all kinds, after which a plain one is timed again

    def __init__(
        self,
        acceptance_rates: Sequence[float],
        mode: str,
        width: int = 1,
        costs: dict[DraftPlan, float] | None = None,
    ) -> None:
        """`stands`: a chain's chance of each draft to stand where those before it do; `width`: of a tree, 1 where only chains are made; `costs`: of passes, in plain ones, where they are not to be measured."""
        self.mode, self.most, self.width = mode, len(acceptance_rates), width
        self.prior_rates = [(1 + stood) / 2 for stood in acceptance_rates]
        self.acceptance_rates = {width: list(self.prior_rates)} | {
            1: list(acceptance_rates)
        }  # only what is made teaches, so a tree is believed to be better than it may be
        self.measured = costs is None
        self.seconds = {shape: deque([cost], self.LAST) for shape, cost in (costs or {}).items()}
        self.loss_budget, self.prompt_s, self.since_plain = 0.0, 0.0, 0
        self.retried: set[DraftPlan] = set()  # whose first pass was forgotten

    def __call__(self) -> DraftPlan:
        best, rate = DraftPlan(0), 1.0
        if self.mode != "auto" or not self.most:
            return best if self.mode == "off" else DraftPlan(self.most, self.width)
        if self.measured and (len(self.seconds.get(best, ())) < 3 or self.since_plain >= self.AGAIN):
            return best
        for width, acceptance_rates in self.acceptance_rates.items():
            tokens, chance = 1.0, 1.0
            for k, stood in enumerate(acceptance_rates, start=1):
                chance *= stood
                tokens += chance
                shape = DraftPlan(k, width)
                if width > 1 and k < self.most and shape not in self.seconds:
                    continue
                cost = self.cost(shape)
                if tokens / cost > 1.02 * rate and cost - 1 <= self.loss_budget:
                    best, rate = shape, tokens / cost
        return best

    def cost(self, shape: DraftPlan) -> float:
        """Of a pass, in plain ones: what is not measured follows from the nearest chain that is."""
        plain = _usual(self.seconds[DraftPlan(0)])
        if shape in self.seconds:
            return _usual(self.seconds[shape]) / plain
        if shape.width > 1:
            return 2 * self.cost(DraftPlan(shape.depth)) - 1
        known = [s.depth for s in self.seconds if s.depth and s.width == 1]
        if not known:
            return 1 + self.GUESS * shape.depth
        near = min(known, key=lambda depth: abs(depth - shape.depth))
        return 1 + (_usual(self.seconds[DraftPlan(near)]) / plain - 1) * shape.depth / near

    def start_answer(self, seconds: float) -> None:
        """An answer begins; its first token took so long."""
        self.loss_budget, self.prompt_s = min(self.loss_budget, self.CARRY), seconds if self.measured else 0.0
        for shape in [
            shape
            for shape, times in self.seconds.items()
            if self.measured and shape.depth and len(times) == 1 and shape not in self.retried
        ]:
            del self.seconds[shape]  # one pass may have been disturbed: it is guessed, and tried, once again
            self.retried.add(shape)

    def record_step(
        self, shape: DraftPlan, counts: Sequence[int], tokens: Sequence[int], seconds: float
    ) -> None:
        """A pass over drafts of a shape: of each row the drafts that stood, and the tokens that its answer got."""
        known = shape in self.seconds
        if self.measured:
            self.seconds.setdefault(shape, deque(maxlen=self.LAST)).append(seconds)
        self.since_plain = self.since_plain + 1 if shape.depth else 0
        mean, gain = sum(tokens) / len(tokens), 0.0
        if DraftPlan(0) in self.seconds:
            plain = _usual(self.seconds[DraftPlan(0)])
            if shape.depth:  # the first pass of a shape, which prepares kernels, costs what it took; later ones may be disturbed
                gain = mean - (
                    min(seconds / plain, 2 * self.cost(shape) if known else 8.0)
                    if self.measured
                    else self.cost(shape)
                )
            gain, self.prompt_s = gain + self.LOSS * self.prompt_s / plain, 0.0
        self.loss_budget = max(-1.0, min(self.loss_budget + gain + self.LOSS * mean, self.BUDGET))
        for acceptance_rates in self.acceptance_rates.values():
            for k, prior in enumerate(self.prior_rates):
                acceptance_rates[k] += self.RECOVERY * max(0.0, prior - acceptance_rates[k])
        for count in counts:
            for k in range(min(shape.depth, count + 1)):
                self.acceptance_rates[shape.width][k] += 0.06 * (
                    (k < count) - self.acceptance_rates[shape.width][k]
                )


def _usual(seconds: Sequence[float]) -> float:
    return sorted(seconds)[(len(seconds) - 1) // 2]


def draft_scheduler(heads: Any, rows: int, settings: GenerationConfig) -> DraftScheduler:
    """For greedy answers one that goes on learning from call to call. Sampled answers must depend on the seed alone: theirs begins anew."""
    most = min(settings.draft_tokens or heads.count, heads.count)
    width = 1 if settings.sampling or rows * (TREE + 1) > TREE_ROWS else settings.draft_width
    nominal = {DraftPlan(k): 1 + NOMINAL * k for k in range(most + 1)} if settings.sampling else None
    new = DraftScheduler(heads.acceptance_rates[:most].tolist(), settings.speculative, width, nominal)
    return (
        new if settings.sampling else heads.shapes.setdefault((rows, most, width, settings.speculative), new)
    )
