"""Command-line scripts and their packages."""

import tune.runtime.environment  # noqa: F401  # set before Ray and albumentations are imported
