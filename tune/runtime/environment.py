"""Environment variables of Ray, its workers and NumPy. Imported before Ray and NumPy."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials.jsonl holds every result
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `Interrupts` handles Ctrl-C
os.environ.setdefault("RAY_worker_niceness", "0")  # workers run at normal priority
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Traceback")  # the trial's record has the reason
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its output would mix with ours

# The sampler's matrices are small: on two cores beside a search, two threads take two to four times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Keep freed memory in the process. By default the C library returns it to the system and requests it again in
# every step. The page faults cost 17 % of the time of mobilenetv2_100 at 128 px.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",  # a trial trains in a thread; the thread's own arena would be freed as a whole
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}

# Workers read these at their start. A cluster's workers receive them from here.
WORKER_ENVIRONMENT = {
    **MALLOC,
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # time for a pruned trial's loaders to exit
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

for _name, _value in WORKER_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
