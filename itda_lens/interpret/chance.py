"""How much of what is seen in groups of values is chance."""

from statistics import NormalDist

import numpy as np


def empirical_z(means: np.ndarray, counts: np.ndarray, deviation: float) -> np.ndarray:
    """How far each group's mean lies above the usual, in units of the usual spread of such groups.

    The mean of `n` values has the variance `deviation^2 / n`, and groups differ by nature by some `t^2` more. The
    centre and `t` are taken from the bulk of the groups, by median and median absolute deviation (an empirical null,
    Efron 2004, doi 10.1198/016214504000000089): it holds where most groups are not of the kind that is looked for.

    Args:
        means: of each group.
        counts: how many values each is the mean of.
        deviation: the standard deviation of values within their group.

    Returns:
        One z for each group; 0 for all where nothing varies.

    Example:
        >>> empirical_z(np.array([1.0, 2.0, 3.0, 4.0, 9.0]), np.array([4, 4, 4, 4, 4]), 1.0).round(2).tolist()
        [-1.35, -0.67, 0.0, 0.67, 4.05]
    """
    away = means - np.median(means)
    spread = np.abs(away).max(initial=0)
    if spread <= 1e-12:
        return np.zeros_like(away)

    def scaled(t: float) -> np.ndarray:
        return away / np.sqrt(t**2 + deviation**2 / counts + 1e-24)

    low, high = 0.0, 10 * float(spread)
    for _ in range(60):
        middle = (low + high) / 2
        bulk = 1.4826 * np.median(np.abs(scaled(middle)))
        low, high = (middle, high) if bulk > 1 else (low, middle)
    return scaled(high)


def adjusted_p(z: np.ndarray) -> np.ndarray:
    """One-sided p-values of standard normal values, adjusted for their number (Benjamini and Hochberg 1995).

    Example:
        >>> adjusted_p(np.array([0.0, 3.0])).round(4).tolist()
        [0.5, 0.0027]
    """
    p = np.array([NormalDist().cdf(-value) for value in z])
    order = np.argsort(p)[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(np.minimum(p[order] * len(p) / np.arange(len(p), 0, -1), 1))
    return adjusted
