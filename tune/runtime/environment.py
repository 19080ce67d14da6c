"""What Ray and the workers find in their environment; imported before Ray is."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials.jsonl holds every result
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # `Interrupts` ends a run in better order
os.environ.setdefault("RAY_worker_niceness", "0")  # training is what the machine is here for
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Traceback")  # a dying worker's; its record has the reason
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # it would print over our own lines

# The C library gives freed memory back and asks for it anew in every step otherwise, and a page that is
# touched for the first time costs more than what is computed on it: 17 % of the time of mobilenetv2_100 at
# 128 px.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",  # a trial trains in a thread, whose own arena would be given back whole
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}

# Read by the workers as they start; those of a cluster are sent it.
WORKER_ENVIRONMENT = {
    **MALLOC,
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial's loaders end in time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

for _name, _value in WORKER_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
