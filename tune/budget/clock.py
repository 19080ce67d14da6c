"""The time there is, and which stage has how much of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

SEARCH_SHARE = 0.62  # of the whole time, by when the search has ended
CONFIRM_SHARE = 0.74  # likewise for running the best few again
RETRAIN_SHARE = 0.88  # likewise for retraining; the rest is the ensemble's
LEAST_MORE = 0.05  # of the time, for which the search goes on where later stages leave it
WHOLE_SHARE = 0.97  # by when a stage has ended that is the last; what it leaves takes time, too
UNCONFIRMED_SHARE = 0.08  # of the time, more for the search where nothing is run again
STOPS_SHARE = 0.10  # of the time, less for the search where its stops are judged_stops
LATE_SHARE = 0.2  # of the retraining's time that trials may take which turn out slower than planned
LATE_RETRAIN_SHARE = 0.3  # likewise of the ensemble's time, for retraining


@dataclass(frozen=True)
class Clock:
    """When the command began and how long it may take."""

    begun: float  # time.time()
    seconds: float = math.inf
    search: float = SEARCH_SHARE  # by what share of the time the search has ended
    confirm: float = CONFIRM_SHARE
    retrain: float = RETRAIN_SHARE
    last: float = 1.0  # by what share of the time the last stage has ended that is asked for

    def at(self, share: float) -> float:
        """The moment, in time.time(), when a stage ends that has so much of the time where all follow."""
        return self.begun + min(1.0, share / self.last) * self.seconds

    def late(self, share: float, until: float, slack: float) -> float:
        """The moment when what should end at `share` is ended: after `slack` of the time up to `until`."""
        end = self.at(share)
        return end + slack * (self.at(until) - end) if math.isfinite(end) else end

    @property
    def left(self) -> float:
        """Seconds."""
        return self.begun + self.seconds - time.time()

    def with_spare_time(
        self, *, confirm: float, retrain: float, ensemble: float, stops: float = 0.0
    ) -> Clock:
        """With a longer search where the later stages take no more seconds than these; itself where not.

        `stops` is the share of the time that auditing them has.
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
    """By what share of the time the search has ended, with so many runs of the other stages asked for."""
    return SEARCH_SHARE + (0 if confirm else UNCONFIRMED_SHARE) - (STOPS_SHARE if check_stops else 0)


def last_share(until: str, *, confirm: int, check_stops: int) -> float:
    """`Clock.last` where nothing follows the stage `until`: it then has the time of those left out."""
    searched = search_share(confirm=confirm, check_stops=check_stops) + (STOPS_SHARE if check_stops else 0)
    ends = {"search": searched, "confirm": CONFIRM_SHARE if confirm else searched, "retrain": RETRAIN_SHARE}
    return ends[until] / WHOLE_SHARE if until in ends else 1.0
