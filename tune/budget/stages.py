"""The stages of a search and how much each of them does, as far as options speak of it.

Needs nothing but the standard library: `--help` reads it.
"""

from __future__ import annotations

STAGES = ("search", "confirm", "retrain", "ensemble", "report")
CPU_HOURS, GPU_HOURS = 0.25, 4.0  # of the whole command, where neither --hours nor --trials says more
WEIGHTS_KEPT = 12  # best trials of the search whose weights stay on disk
RERUNS = 6  # most runs with new seeds in a study
MOST_VIEWS = 4  # of an image that an ensemble averages over, the plain one included
STUDENT_EPOCHS = 4  # times those of the study's trials: distillation goes on gaining (Beyer et al., 2022)
