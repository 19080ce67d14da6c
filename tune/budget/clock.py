"""The time budget of a command and when each of its stages must end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from carmodels.steady_clock import steady_time

# Stages end at these shares of the whole time; the ensemble gets the rest.
SEARCH_SHARE = 0.62
CONFIRM_SHARE = 0.74
RETRAIN_SHARE = 0.88
WHOLE_SHARE = 0.97  # with --until, the last stage's end; writing its results takes the rest
# Shares of the whole time that move between stages.
LEAST_MORE = 0.05  # the least by which a search is extended
UNCONFIRMED_SHARE = 0.08  # added to the search without confirmation
STOPS_SHARE = 0.10  # taken from the search for the stop check
# Shares of a later stage's time that trials may use when they are slower than planned.
LATE_SHARE = 0.2  # of retraining's time, for search and confirmation
LATE_RETRAIN_SHARE = 0.3  # of the ensemble's time, for retraining


@dataclass(frozen=True)
class Clock:
    """When a command began, how long it may take, and the share of that time at which each stage ends."""

    begun: float  # steady_time()
    seconds: float = math.inf
    search: float = SEARCH_SHARE
    confirm: float = CONFIRM_SHARE
    retrain: float = RETRAIN_SHARE
    last: float = 1.0  # the share at which the last requested stage ends, if all stages ran

    def at(self, share: float) -> float:
        """When a stage with this share ends, steady_time(); later if the last stages are not requested."""
        return self.begun + min(1.0, share / self.last) * self.seconds

    def late(self, share: float, until: float, slack: float) -> float:
        """When trials that should end at `share` are stopped: after `slack` of the time up to `until`."""
        end = self.at(share)
        return end + slack * (self.at(until) - end) if math.isfinite(end) else end

    @property
    def left(self) -> float:
        """Seconds left, negative once the time is up."""
        return self.begun + self.seconds - steady_time()

    def with_spare_time(
        self, *, confirm: float, retrain: float, ensemble: float, stops: float = 0.0
    ) -> Clock:
        """Gives the search what the later stages leave of their time; itself if that is too little.

        `confirm`, `retrain` and `ensemble` are the most seconds they need, `stops` the stop check's share.
        """
        if math.isinf(self.seconds) or self.last < 1:
            return self
        ends_retrain = max(self.retrain, 1 - ensemble / self.seconds)
        ends_confirm = max(self.confirm, ends_retrain - retrain / self.seconds)
        ends_search = ends_confirm - confirm / self.seconds - stops
        if ends_search < self.search + LEAST_MORE:
            return self
        return replace(self, search=ends_search, confirm=ends_confirm, retrain=ends_retrain)


def search_share(*, confirm: int, check_stops: int) -> float:
    """The share of the time at which the search ends, given the requested runs of the next two stages."""
    return SEARCH_SHARE + (0 if confirm else UNCONFIRMED_SHARE) - (STOPS_SHARE if check_stops else 0)


def last_share(until: str, *, confirm: int, check_stops: int) -> float:
    """`Clock.last` for --until: the last stage takes over the time of the stages left out."""
    searched = search_share(confirm=confirm, check_stops=check_stops) + (STOPS_SHARE if check_stops else 0)
    ends = {"search": searched, "confirm": CONFIRM_SHARE if confirm else searched, "retrain": RETRAIN_SHARE}
    return ends[until] / WHOLE_SHARE if until in ends else 1.0
