"""A clock that nobody sets."""

from __future__ import annotations

import os
import time

# Between processes of one machine the monotonic clock is the same. Ray's workers inherit the difference, so
# their times can be compared with the driver's, also if the computer's clock was set in between.
_OFFSET = float(os.environ.setdefault("CARMODELS_CLOCK_OFFSET", repr(time.time() - time.monotonic())))


def steady_time() -> float:
    """Seconds as of time.time(), by the computer's clock as it was set when the first process started."""
    return time.monotonic() + _OFFSET
