"""The power law `bpb = c + a * x^-alpha`: the readable baseline of all projections.

For a given alpha the law is linear in c and a, so the fit is a search over one variable (variable
projection, Golub & Pereyra 1973): at every alpha of a grid, c and a >= 0 by iteratively reweighted least
squares, the Huber loss (delta 1e-3) on log residuals as in Hoffmann et al. 2022, appendix D.3. The best
alphas and two far from them then start a joint refinement, so that no single start decides.

The interval is a mixture over alpha: each alpha speaks with the weight of its profile likelihood under
Student-t noise, and with its own spread of c and a, carried to the horizon.

x is measured in units of the last point inside, so that the fit is the same for tokens, steps or seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import stdtr

from agent.decisions.projection.laws import Curve, LawFit, Unfit

Array = NDArray[np.float64]

MIN_POINTS = 4
"""Three parameters and one point to be wrong about."""
ALPHA_LOW, ALPHA_HIGH = 0.02, 3.0
HUBER_DELTA = 1e-3
NOISE_FLOOR = 5e-4
"""Least sd of a log residual: seeds alone differ by about 0.0006 BPB at 1.1 BPB."""
NOISE_DOF = 4.0
QUANTILES = np.array([0.05, 0.25, 0.75, 0.95])

_IRLS_ROUNDS = 8
_MEDIAN_INEFFICIENCY = math.pi / 2
"""Variance of an L1-like fit over least squares under normal noise."""
_MAX_EXPONENT = 150.0
"""exp of it, squared and summed, is still a finite float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLawShape:
    """`c + b * (x / unit)^-alpha`; in plain x the coefficient is `a`."""

    c: float
    b: float
    alpha: float
    unit: float

    @property
    def a(self) -> float:
        """The coefficient for plain x; held finite."""
        if self.b <= 0:
            return 0.0
        return math.exp(min(700.0, math.log(self.b) + self.alpha * math.log(self.unit)))

    def value(self, x: float) -> float:
        return self.c + self.b * math.exp(min(_MAX_EXPONENT, -self.alpha * math.log(x / self.unit)))

    def crossing(self, reference: float) -> float | None:
        gap = reference - self.c
        if self.b <= 0 or gap <= 0:
            return None
        log_x = math.log(self.unit) + (math.log(self.b) - math.log(gap)) / self.alpha
        return math.exp(log_x) if log_x < 700 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """The `Law` of this module."""

    @property
    def name(self) -> str:
        return "power"

    def fit(self, curve: Curve, horizon: float) -> LawFit | Unfit:
        if len(curve) < MIN_POINTS:
            return Unfit(reason=f"{len(curve)} usable validation points; a power law needs at least {MIN_POINTS}")
        horizon = float(horizon)
        if not (math.isfinite(horizon) and horizon > 0):
            return Unfit(reason=f"the end of the run is not known (horizon {horizon})")
        x, y = _settled(np.array(curve.x), np.array(curve.bpb), max(horizon, curve.x[-1]))
        unit = float(x[-1])
        problem = _Problem(log_u=np.log(x / unit), scale=float(np.median(y)), y=y / float(np.median(y)))
        coarse = problem.profile(np.geomspace(ALPHA_LOW, ALPHA_HIGH, 48))
        c, b, alpha = _refine(problem, coarse)
        shape = PowerLawShape(c=c * problem.scale, b=b * problem.scale, alpha=alpha, unit=unit)
        final = float(shape.value(horizon))
        interval = _interval(problem, coarse, (c, b, alpha), math.log(horizon / unit)) * problem.scale
        return LawFit(
            law=self.name,
            shape=shape,
            horizon=horizon,
            n_points=len(y),
            final_bpb=final,
            # The refined fit may lie just outside a very narrow mixture: an interval holds its own centre.
            low90=min(float(interval[0]), final),
            low50=min(float(interval[1]), final),
            high50=max(float(interval[2]), final),
            high90=max(float(interval[3]), final),
            r2=problem.r2(c, b, alpha),
            parameters={"c": shape.c, "a": shape.a, "alpha": alpha},
        )


def _settled(x: Array, y: Array, horizon: float) -> tuple[Array, Array]:
    """Without the first points, which follow warm-up and initialisation more than any law; at least 4 stay."""
    share = x / horizon
    start = int(np.searchsorted(share, max(0.03, 0.15 * float(share[-1]))))
    start = min(start, len(x) - MIN_POINTS)
    return x[start:], y[start:]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Profile:
    """Best c and b at each alpha: arrays (alpha,); log residuals (alpha, point)."""

    alphas: Array
    c: Array
    b: Array
    residuals: Array

    @property
    def huber(self) -> Array:
        """Cost at each alpha: (alpha,)."""
        size = np.abs(self.residuals)
        cost: Array = np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum(axis=1)
        return cost


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The points: log of x in units of the last x, and y in units of its median, both (point,)."""

    log_u: Array
    y: Array
    scale: float

    def basis(self, alphas: Array) -> Array:
        """u^-alpha: (alpha, point)."""
        power: Array = np.exp(np.minimum(-alphas[:, None] * self.log_u[None, :], _MAX_EXPONENT))
        return power

    def profile(self, alphas: Array) -> _Profile:
        """Huber fit of c, b >= 0 at every alpha at once."""
        power, y, log_y = self.basis(alphas), self.y[None, :], np.log(self.y)[None, :]
        weights = np.broadcast_to(1 / y**2, power.shape)
        c = b = np.zeros(len(alphas))
        residuals = np.zeros(power.shape)
        for _ in range(_IRLS_ROUNDS):
            c, b = _nonnegative_line(power, y, weights)
            predicted = np.maximum(c[:, None] + b[:, None] * power, 1e-12)
            residuals = np.log(predicted) - log_y
            # Of the linear problem around the last prediction: d log(p) = dp / p.
            weights = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residuals), 1e-12)) / y**2
        return _Profile(alphas=alphas, c=c, b=b, residuals=residuals)

    def r2(self, c: float, b: float, alpha: float) -> float:
        """Explained share of the variance of log bpb; a flat curve that is met exactly counts as explained."""
        log_y = np.log(self.y)
        residuals = np.log(np.maximum(c + b * self.basis(np.array([alpha]))[0], 1e-12)) - log_y
        unexplained, total = float(np.sum(residuals**2)), float(np.sum((log_y - log_y.mean()) ** 2))
        if total < 1e-18:
            return 1.0 if unexplained < 1e-12 else 0.0
        return max(-1.0, 1 - unexplained / total)


def _nonnegative_line(power: Array, y: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least squares of y = c + b * power with c, b >= 0, one per row: (alpha,) each."""
    s, sp, spp = weights.sum(axis=1), (weights * power).sum(axis=1), (weights * power**2).sum(axis=1)
    sy, spy = (weights * y).sum(axis=1), (weights * power * y).sum(axis=1)
    det = s * spp - sp**2
    regular = det > 1e-13 * s * spp
    safe = np.where(regular, det, 1.0)
    c = np.where(regular, (spp * sy - sp * spy) / safe, sy / s)
    b = np.where(regular, (s * spy - sp * sy) / safe, 0.0)
    # With two variables the bounded optimum lies on the violated axis.
    c, b = np.where(b < 0, sy / s, c), np.maximum(b, 0.0)
    b, c = np.where(c < 0, spy / spp, b), np.maximum(c, 0.0)
    return c, b


def _refine(problem: _Problem, coarse: _Profile) -> tuple[float, float, float]:
    """c, b, alpha of the least Huber cost, from the best alpha of the grid and the best far below and above it."""
    cost, log_y = coarse.huber, np.log(problem.y)
    best = int(np.argmin(cost))
    starts = {best}
    for far in (coarse.alphas < coarse.alphas[best] / 2, coarse.alphas > coarse.alphas[best] * 2):
        if far.any():
            starts.add(int(np.flatnonzero(far)[np.argmin(cost[far])]))

    def residuals(theta: Array) -> Array:
        c, b, alpha = theta
        power = np.exp(np.minimum(-alpha * problem.log_u, _MAX_EXPONENT))
        errors: Array = np.log(np.maximum(c + b * power, 1e-12)) - log_y
        return errors

    def jacobian(theta: Array) -> Array:
        c, b, alpha = theta
        power = np.exp(np.minimum(-alpha * problem.log_u, _MAX_EXPONENT))
        predicted = np.maximum(c + b * power, 1e-12)
        return np.stack([1 / predicted, power / predicted, -b * problem.log_u * power / predicted], axis=1)

    found = (float(cost[best]), (float(coarse.c[best]), float(coarse.b[best]), float(coarse.alphas[best])))
    for start in sorted(starts):
        guess = np.array([coarse.c[start] + 1e-6, coarse.b[start] + 1e-6, coarse.alphas[start]])
        guess[2] = np.clip(guess[2], ALPHA_LOW * 1.001, ALPHA_HIGH * 0.999)
        fit = least_squares(
            residuals,
            guess,
            jac=jacobian,
            bounds=([0, 0, ALPHA_LOW], [np.inf, np.inf, ALPHA_HIGH]),
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale=np.array([1.0, 1.0, 0.3]),
            max_nfev=25,
        )
        if np.all(np.isfinite(fit.x)) and float(fit.cost) < found[0]:
            found = (float(fit.cost), (float(fit.x[0]), float(fit.x[1]), float(fit.x[2])))
    return found[1]


def _interval(problem: _Problem, coarse: _Profile, best: tuple[float, float, float], log_h: float) -> Array:
    """QUANTILES of the final, in units of the problem's scale: (4,)."""
    n = len(problem.y)
    centre = np.log(np.maximum(best[0] + best[1] * problem.basis(np.array([best[2]]))[0], 1e-12)) - np.log(problem.y)
    # An L1-like fit of three parameters passes through three points: their residuals say nothing of the noise.
    sigma = max(NOISE_FLOOR, 1.4826 * float(np.median(np.sort(np.abs(centre))[3:])))
    grid, weights = coarse, _weights(coarse, sigma)
    for _ in range(3):
        # A grid coarser than the likelihood is narrow would report the spread of the grid: look closer.
        near = np.flatnonzero(weights > 1e-4 * weights.max())
        low = grid.alphas[max(0, near[0] - 1)]
        high = grid.alphas[min(len(grid.alphas) - 1, near[-1] + 1)]
        grid = problem.profile(np.unique(np.append(np.geomspace(low, high, 28), best[2])))
        weights = _weights(grid, sigma)
        if weights.max() < 0.25:
            break
    means, sds = _at_horizon(problem, grid, sigma, log_h)
    return _mixture_quantiles(means, sds, weights, min(NOISE_DOF, float(max(3, n - 3))))


def _weights(profile: _Profile, sigma: float) -> Array:
    """Share of each alpha: Student-t profile likelihood times its stretch of log alpha (a flat prior there)."""
    likelihood = -(NOISE_DOF + 1) / 2 * np.log1p((profile.residuals / sigma) ** 2 / NOISE_DOF).sum(axis=1)
    stretch = np.gradient(np.log(profile.alphas))
    weights = np.exp(likelihood - likelihood.max()) * stretch
    return np.asarray(weights / weights.sum())


def _at_horizon(problem: _Problem, profile: _Profile, sigma: float, log_h: float) -> tuple[Array, Array]:
    """Mean and sd of the final's measurement at each alpha, (alpha,) each."""
    power = problem.basis(profile.alphas)
    reach = np.exp(np.minimum(-profile.alphas * log_h, _MAX_EXPONENT))
    weights = np.broadcast_to(1 / problem.y[None, :] ** 2, power.shape)
    s, sp, spp = weights.sum(axis=1), (weights * power).sum(axis=1), (weights * power**2).sum(axis=1)
    det = np.maximum(s * spp - sp**2, 1e-13 * s * spp)
    # g' (X'WX)^-1 g for g = (1, reach); on a bound only the free coefficient has a spread.
    both = (spp - 2 * reach * sp + reach**2 * s) / det
    spread = np.where(profile.b <= 0, 1 / s, np.where(profile.c <= 0, reach**2 / spp, both))
    means = profile.c + profile.b * reach
    return means, sigma * np.sqrt(np.maximum(spread, 0) * _MEDIAN_INEFFICIENCY + means**2)


def _mixture_quantiles(means: Array, sds: Array, weights: Array, dof: float) -> Array:
    """Quantiles of a mixture of Student-t's by bisection; never below zero."""
    low = np.full(len(QUANTILES), float(np.min(means - 60 * sds)))
    high = np.full(len(QUANTILES), float(np.max(means + 60 * sds)))
    for _ in range(40):
        middle = (low + high) / 2
        below = stdtr(dof, (middle[:, None] - means[None, :]) / sds[None, :]) @ weights < QUANTILES
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    middles: Array = np.maximum((low + high) / 2, 0.0)
    return middles
