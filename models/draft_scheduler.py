"""Speculative decoding's schedule: how many drafts a decode step verifies."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from configs.model import GenerationConfig

TREE = 11  # drafts of a tree: 12 rows with the token before them (docs/log/experiments.md)
TREE_ROWS = 32  # of a batch with trees, at most: `Packed.MAX_ROWS`
# Cost of a draft in plain steps for sampled answers, which must not depend on the clock (docs/benchmarks.md).
NOMINAL = 0.2


class DraftPlan(NamedTuple):
    """The drafts of a decode step: a chain of `depth`, or a tree where `width` is above 1."""

    depth: int
    width: int = 1


class DraftScheduler:
    """Chooses the plan with the most tokens a second, within a loss budget.

    A draft's acceptance rate is a running mean; a plan's seconds are the median of its last steps. Before any
    step, rates are those given and costs are guesses. `loss_budget` counts the plain steps that drafts may
    still lose: `LOSS` of the time so far and what drafts gained, at most `BUDGET`, of which the next answer
    gets at most `CARRY`. A plan is allowed where rejecting all its drafts would not overdraw the budget.
    Rates of plans that are not tried recover slowly, so that a change in the text is noticed.
    """

    RECOVERY = 0.0003  # share of the way back to the prior, at each step
    # Answers may lose 3 %: plain steps between others take a little longer, too.
    LOSS, BUDGET, CARRY = 0.02, 2.0, 0.6
    GUESS = 0.08  # cost of a draft in plain steps; in trees twice that (docs/benchmarks.md)
    LAST = 5  # timed steps of a plan in the median
    AGAIN = 64  # steps after which a plain one is timed again

    def __init__(
        self,
        acceptance_rates: Sequence[float],
        mode: str,
        width: int = 1,
        costs: dict[DraftPlan, float] | None = None,
    ) -> None:
        """Start from a chain's `acceptance_rates`, each given that the drafts before it were accepted.

        `width`: of a tree; 1: chains only. `costs`: of steps, in plain ones; None: measured.
        """
        self.mode, self.max_depth, self.width = mode, len(acceptance_rates), width
        self.prior_rates = [(1 + rate) / 2 for rate in acceptance_rates]
        # Only plans that run are updated, so a tree starts from an optimistic rate.
        self.acceptance_rates = {width: list(self.prior_rates)} | {1: list(acceptance_rates)}
        self.measured = costs is None
        self.seconds = {plan: deque([cost], self.LAST) for plan, cost in (costs or {}).items()}
        self.loss_budget, self.prompt_s, self.since_plain = 0.0, 0.0, 0
        self.retried: set[DraftPlan] = set()  # plans whose first timing was dropped

    def __call__(self) -> DraftPlan:
        """The plan of the next decode step."""
        best, rate = DraftPlan(0), 1.0
        if self.mode != "auto" or not self.max_depth:
            return best if self.mode == "off" else DraftPlan(self.max_depth, self.width)
        if self.measured and (len(self.seconds.get(best, ())) < 3 or self.since_plain >= self.AGAIN):
            return best
        for width, acceptance_rates in self.acceptance_rates.items():
            tokens, chance = 1.0, 1.0
            for k, acceptance_rate in enumerate(acceptance_rates, start=1):
                chance *= acceptance_rate
                tokens += chance
                plan = DraftPlan(k, width)
                if width > 1 and k < self.max_depth and plan not in self.seconds:
                    continue
                cost = self.cost(plan)
                if tokens / cost > 1.02 * rate and cost - 1 <= self.loss_budget:
                    best, rate = plan, tokens / cost
        return best

    def cost(self, plan: DraftPlan) -> float:
        """Cost of a decode step in plain ones; where not measured, extrapolated from the nearest chain."""
        plain = _low_median(self.seconds[DraftPlan(0)])
        if plan in self.seconds:
            return _low_median(self.seconds[plan]) / plain
        if plan.width > 1:
            return 2 * self.cost(DraftPlan(plan.depth)) - 1
        depths = [p.depth for p in self.seconds if p.depth and p.width == 1]
        if not depths:
            return 1 + self.GUESS * plan.depth
        nearest = min(depths, key=lambda depth: abs(depth - plan.depth))
        extra = _low_median(self.seconds[DraftPlan(nearest)]) / plain - 1
        return 1 + extra * plan.depth / nearest

    def start_answer(self, seconds: float) -> None:
        """Start an answer whose first token took `seconds`."""
        self.loss_budget = min(self.loss_budget, self.CARRY)
        self.prompt_s = seconds if self.measured else 0.0
        if not self.measured:
            return
        for plan, times in list(self.seconds.items()):
            if plan.depth and len(times) == 1 and plan not in self.retried:
                del self.seconds[plan]  # a single timing may have been disturbed: try the plan once more
                self.retried.add(plan)

    def record_step(
        self, plan: DraftPlan, counts: Sequence[int], tokens: Sequence[int], seconds: float
    ) -> None:
        """Record a decode step: each row's accepted drafts and the tokens that its answer got."""
        known = plan in self.seconds
        if self.measured:
            self.seconds.setdefault(plan, deque(maxlen=self.LAST)).append(seconds)
        self.since_plain = self.since_plain + 1 if plan.depth else 0
        mean, gain = sum(tokens) / len(tokens), 0.0
        if DraftPlan(0) in self.seconds:
            plain = _low_median(self.seconds[DraftPlan(0)])
            if plan.depth:
                gain = mean - self._charged(plan, seconds / plain, known)
            gain, self.prompt_s = gain + self.LOSS * self.prompt_s / plain, 0.0
        self.loss_budget = max(-1.0, min(self.loss_budget + gain + self.LOSS * mean, self.BUDGET))
        for rates in self.acceptance_rates.values():
            for k, prior in enumerate(self.prior_rates):
                rates[k] += self.RECOVERY * max(0.0, prior - rates[k])
        rates = self.acceptance_rates[plan.width]
        for count in counts:
            for k in range(min(plan.depth, count + 1)):
                rates[k] += 0.06 * ((k < count) - rates[k])

    def _charged(self, plan: DraftPlan, measured: float, known: bool) -> float:
        """What a step costs the budget, in plain steps.

        A plan's first step prepares kernels: its time counts, up to 8. Later ones may be disturbed: twice the
        usual cost at most.
        """
        if not self.measured:
            return self.cost(plan)
        return min(measured, 2 * self.cost(plan) if known else 8.0)


def _low_median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[(len(seconds) - 1) // 2]


def draft_scheduler(heads: Any, rows: int, settings: GenerationConfig) -> DraftScheduler:
    """The scheduler of a call.

    Greedy calls share one that goes on learning. A sampled answer, which must depend on its seed alone,
    gets a new one.
    """
    depth = min(settings.draft_tokens or heads.count, heads.count)
    width = 1 if settings.sampling or rows * (TREE + 1) > TREE_ROWS else settings.draft_width
    costs = {DraftPlan(k): 1 + NOMINAL * k for k in range(depth + 1)} if settings.sampling else None
    new = DraftScheduler(heads.acceptance_rates[:depth].tolist(), settings.speculative, width, costs)
    if settings.sampling:
        return new
    return heads.schedulers.setdefault((rows, depth, width, settings.speculative), new)
