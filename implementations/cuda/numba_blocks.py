"""The pieces that both numba pages are made of: what one CUDA thread computes of one element or of one token.

None of them holds a barrier: the pages do, between one step and the next. A row is one token's `[D]`, and one thread
does all of it. Numba makes a double of an integer combined with a float, so constants are float32 by name.

Source: `implementations/torch/blocks.py`, whose names these have.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

ZERO, ONE = np.float32(0), np.float32(1)
_THREE, _SIX = np.float32(3), np.float32(6)
_GELU_SCALE = np.float32(2 * math.sqrt(2 / math.pi))
_GELU_CUBIC = np.float32(0.044715)


@cuda.jit(device=True, inline="always")  # what is not inlined may not return part of an array
def tile(shared, scratch, index, fitting):
    """Tile `index`: in shared memory if it is one of the first `fitting`, else in the chain's global scratch."""
    return shared[index] if index < fitting else scratch[index]


@cuda.jit(device=True)
def dot(a, b, i, j, K):
    """(a b)[i, j], a sum of K terms; K is given since a tile is wider than what it holds."""
    total = ZERO
    for k in range(K):
        total += a[i, k] * b[k, j]
    return total


@cuda.jit(device=True)
def dot_rows(a, b, K):
    """The inner product of two rows."""
    total = ZERO
    for k in range(K):
        total += a[k] * b[k]
    return total


@cuda.jit(device=True)
def eta_of(token_eta, i, M, CAUSAL):
    """By how much token i discounts what it reads: its own entry, or the last where all read the updated weights."""
    return token_eta[i] if CAUSAL else token_eta[M - 1]


# --- LayerNorm of one row ---


@cuda.jit(device=True)
def normalise(z, D, EPS):
    """Make z its x_hat = (z - mean) rstd; returns rstd."""
    share = ONE / np.float32(D)
    mean = ZERO
    for d in range(D):
        mean += z[d]
    mean *= share
    variance = ZERO
    for d in range(D):
        z[d] -= mean
        variance += z[d] * z[d]
    rstd = ONE / math.sqrt(variance * share + EPS)
    for d in range(D):
        z[d] *= rstd
    return rstd


@cuda.jit(device=True)
def project(d, x_hat, rstd, D):
    """Make d its rstd (d - mean(d) - x_hat mean(d x_hat)): the derivative of `normalise`."""
    share = ONE / np.float32(D)
    mean = along = ZERO
    for j in range(D):
        mean += d[j]
        along += d[j] * x_hat[j]
    mean *= share
    along *= share
    for j in range(D):
        d[j] = rstd * (d[j] - mean - x_hat[j] * along)


@cuda.jit(device=True)
def inner_gradient(z, target, gamma, beta, g, D, EPS):
    """Make z its x_hat, and g the gradient of 1/2 ||LN(z) - target||^2 with respect to z; returns rstd."""
    rstd = normalise(z, D, EPS)
    for d in range(D):
        g[d] = (gamma[d] * z[d] + beta[d] - target[d]) * gamma[d]
    project(g, z, rstd, D)
    return rstd


@cuda.jit(device=True)
def inner_gradient_backward(d_g, g, x_hat, rstd, target, gamma, beta, d_gamma, D):
    """The second order: d_g becomes d_z, target becomes d_target, and d_gamma is written, this token's alone.

    d_beta of this token is -d_target. See `implementations/torch/blocks.py` for the maths.
    """
    share = ONE / np.float32(D)
    mean = along_d_g = along_p = through_rstd = ZERO
    for d in range(D):
        mean += d_g[d]
        along_d_g += d_g[d] * x_hat[d]
        along_p += gamma[d] * (gamma[d] * x_hat[d] + beta[d] - target[d]) * x_hat[d]
        through_rstd += d_g[d] * g[d]
    mean *= share
    along_d_g *= share
    along_p *= share
    through_rstd *= share
    for d in range(D):
        error = gamma[d] * x_hat[d] + beta[d] - target[d]
        d_p = rstd * (d_g[d] - mean - x_hat[d] * along_d_g)
        d_error = gamma[d] * d_p
        d_gamma[d] = d_p * error + d_error * x_hat[d]
        target[d] = -d_error
        d_g[d] = gamma[d] * d_error - rstd * (along_p * d_g[d] + along_d_g * gamma[d] * error)  # d_x_hat
    project(d_g, x_hat, rstd, D)
    for d in range(D):
        d_g[d] -= rstd * x_hat[d] * through_rstd


# --- gelu of one number: z sigmoid(v) with v = 2 sqrt(2 / pi) (z + 0.044715 z^3) ---


@cuda.jit(device=True)
def sigmoid(v):
    """1 / (1 + exp(-v)), and never the exponential of a positive number."""
    e = math.exp(-abs(v))
    return (ONE if v >= ZERO else e) / (ONE + e)


@cuda.jit(device=True)
def gelu(z):
    """z sigmoid(v)."""
    return z * sigmoid(_GELU_SCALE * (z + _GELU_CUBIC * z * z * z))


@cuda.jit(device=True)
def gelu_first(z):
    """gelu'(z)."""
    v = _GELU_SCALE * (z + _GELU_CUBIC * z * z * z)
    slope = _GELU_SCALE * (ONE + _THREE * _GELU_CUBIC * z * z)
    return sigmoid(v) * (ONE + z * sigmoid(-v) * slope)


@cuda.jit(device=True)
def gelu_second(z):
    """gelu''(z): the outer gradient differentiates the inner one."""
    v = _GELU_SCALE * (z + _GELU_CUBIC * z * z * z)
    slope = _GELU_SCALE * (ONE + _THREE * _GELU_CUBIC * z * z)
    bend = _GELU_SCALE * _SIX * _GELU_CUBIC * z
    s, s_other = sigmoid(v), sigmoid(-v)
    return s * s_other * (slope + slope + z * (bend + (s_other - s) * slope * slope))
