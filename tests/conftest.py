"""Before any test module: Ray's bounds, which it reads when it is imported, and no time limits of hypothesis."""

import hypothesis

from dcpo_openrlhf import local_ray

local_ray.raise_bounds()
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
