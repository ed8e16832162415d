"""How a regularizer's weight λ changes over training; `progress` is steps done / all steps, in [0, 1)."""

import math


def constant(weight: float, progress: float) -> float:
    """λ(t) = λ (paper2024)."""
    return weight


def cosine_to_10_percent(weight: float, progress: float) -> float:
    """λ(t) = 0.1 λ + 0.9 λ · ½ (1 + cos(π t / T_total)): from λ down to 0.1 λ (iclr2026's λ1)."""
    return weight * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def two_phase(weight: float, progress: float, *, silent: float = 0.20, ramp: float = 0.05) -> float:
    """λ(t) = 0 for the first 20 % of the steps, a linear ramp over the next 5 %, then λ (iclr2026's λ2, λ3)."""
    return weight * min(max((progress - silent) / ramp, 0.0), 1.0)


# `adaptive` is constant in time: its weights differ by position (regularizers.adaptive_position_weights).
SCHEDULES = {
    "constant": constant,
    "adaptive": constant,
    "cosine_to_10_percent": cosine_to_10_percent,
    "two_phase": two_phase,
}


def scheduled_weight(schedule: str, weight: float, *, step: int, num_steps: int) -> float:
    """Return λ at optimizer step `step` (from 0) of `num_steps`. Raises KeyError for an unknown schedule."""
    return SCHEDULES[schedule](weight, step / max(num_steps, 1))
