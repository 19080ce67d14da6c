"""Whose fault a failed trial is, by the error that Ray reports."""

from __future__ import annotations

import re

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from carmodels.records import Cause

_NO_MEMORY = re.compile(
    r"CUDA error: out of memory|CUDA out of memory|_ALLOC_FAILED|not enough memory|can't allocate memory",
    re.IGNORECASE,
)  # of torch and its libraries, where the error has no type of its own
_LOADER_LOST = re.compile(
    r"DataLoader (worker .*(exited unexpectedly|killed by signal)|timed out)|a loader process was lost",
    re.DOTALL,
)


def cause_of(error: Exception | None) -> Cause:
    """The cause of a trial's failure: an exception in its worker, or else a lost worker.

    An OSError is the machine's: a full disk, a network or a folder that is gone.
    """
    if isinstance(error, OutOfMemoryError):  # Ray's, for a node without memory
        return Cause.OUT_OF_MEMORY
    if not isinstance(error, RayTaskError):
        return Cause.MACHINE
    raised = error.cause
    if _out_of_memory(raised):
        return Cause.OUT_OF_MEMORY
    lost = isinstance(raised, RuntimeError) and _LOADER_LOST.match(str(raised))
    return Cause.MACHINE if lost or isinstance(raised, OSError | RayError) else Cause.ERROR


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, or Ray's
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
