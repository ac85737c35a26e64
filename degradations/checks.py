"""What a recipe's settings may be: checks that name the field, as in `blur.probability`."""

import math

Range = tuple[float, float]


def check_probability(name: str, value: float) -> None:
    """ValueError unless `value` is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value} is not a probability (0 to 1)")


def check_distribution(name: str, weights: dict[str, float], allowed: tuple[str, ...]) -> None:
    """ValueError unless `weights` are probabilities of some of `allowed` that sum to 1."""
    unknown = sorted(set(weights) - set(allowed))
    if unknown:
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; known: {', '.join(allowed)}")
    if min(weights.values(), default=-1.0) < 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"{name}: probabilities must be 0 or more and sum to 1, not {weights}")


def check_range(name: str, values: Range, low: float, high: float) -> None:
    """ValueError unless `values` are two rising numbers within [low, high]."""
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ValueError(f"{name}: {list(values)} must be two rising numbers from {low:g} to {high:g}")


def check_step(name: str, value: float) -> None:
    """ValueError unless `value` is a finite number of 0 or more."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: {value} must be 0 or more")
