"""Scripts that a person runs, and the packages they share."""

import tune.runtime.environment  # noqa: F401  # Ray and albumentations read it as they are imported
