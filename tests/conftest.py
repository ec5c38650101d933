"""What holds for every test."""

from hypothesis import HealthCheck, settings

# No rule of a property test is about time: a slow machine must not make one fail.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
