"""What TTT-MLP's Triton kernels are made of: products, gelu, LayerNorm, and tiles of the fast weights.

A kernel pads `D` to `BD` and `M` to `BM`, powers of two of at least 16: padded columns and rows are loaded as zeros and
stay zero, so sums over them are right, and means divide by the true `D`.

The fast weights of one chain lie in one contiguous record of `record(D)` floats: w1 [D F], b1 [F], w2 [F D], b2 [D],
with `F = 4 D`. Sizes are multiples of 16, so that every part of it is aligned.

Source: `implementations.torch.blocks`, whose names these functions have and whose roundings they follow.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from implementations.triton.blocks import dot_apart, to_tf32

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_EXPONENT = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2))
_EXPONENT_CUBIC = tl.constexpr(-0.08943 * math.sqrt(2 / math.pi) / math.log(2))
_SLOPE = tl.constexpr(3 * 0.044715)
_BEND = tl.constexpr(12 * 0.044715 * math.sqrt(2 / math.pi))


@triton.jit
def _to_bf16(x):
    """`x` rounded to bf16, as fp32: Triton's interpreter truncates where the device rounds to nearest even."""
    x = x.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """`x` in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = _to_bf16(x)
    return x.to(dtype)


@triton.jit
def _operand(x, MATMUL: tl.constexpr):
    """`x` as a product takes it; MATMUL is ieee, tf32, bf16 or fp16."""
    if MATMUL == "bf16":
        x = _to_bf16(x) if INTERPRETED else x.to(tl.bfloat16)  # products of bf16 itself are wrong in the interpreter
    elif MATMUL == "fp16":
        x = x.to(tl.float16)
    else:
        x = x.to(tl.float32)
        if MATMUL == "tf32":
            x = to_tf32(x)
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def dot(a, b, MATMUL: tl.constexpr):
    """Matrix product: operands rounded to the problem's dtype, fp32 sums."""
    if MATMUL == "ieee":
        return dot_apart(_operand(a, MATMUL), _operand(b, MATMUL))
    else:
        PRECISION: tl.constexpr = "tf32" if MATMUL == "tf32" else "ieee"
        return tl.dot(_operand(a, MATMUL), _operand(b, MATMUL), input_precision=PRECISION)


@triton.jit
def load(p, mask, MASKED: tl.constexpr):
    """What `p` points to, zero outside of `mask`, which is left out where it is all true."""
    if MASKED:
        return tl.load(p, mask=mask, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def store(p, x, mask, MASKED: tl.constexpr):
    """Store `x` inside of `mask`, which is left out where it is all true."""
    if MASKED:
        tl.store(p, x, mask=mask)
    else:
        tl.store(p, x)


@triton.jit
def tokens(p_x, first, stride, M: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows `first` to `first + M` of one head's tokens, [BM BD], and where they are."""
    m, d = tl.arange(0, BM)[:, None], tl.arange(0, BD)[None, :]
    p_rows = p_x + (first + m.to(tl.int64)) * stride + d
    return load(p_rows, (m < M) & (d < D), M != BM or D != BD)


@triton.jit
def store_tokens(p_x, x, first, stride, M: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Store [BM BD] in rows `first` to `first + M` of one head's tokens."""
    m, d = tl.arange(0, BM)[:, None], tl.arange(0, BD)[None, :]
    p_rows = p_x + (first + m.to(tl.int64)) * stride + d
    store(p_rows, cast(x, p_x.dtype.element_ty), (m < M) & (d < D), M != BM or D != BD)


# --- One block of the hidden axis: w1[:, f] [BD BF], b1[f] [BF], w2[f, :] [BF BD] ---


@triton.jit
def load_block(p_w, f, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr):
    """Block `f` of the record at `p_w`: w1 [BD BF], b1 [BF], w2 [BF BD]."""
    at, d = f + tl.arange(0, BF), tl.arange(0, BD)
    b_w1 = load(p_w + d[:, None] * (4 * D) + at[None, :], d[:, None] < D, D != BD)
    b_b1 = tl.load(p_w + 4 * D * D + at)
    b_w2 = load(p_w + 4 * D * D + 4 * D + at[:, None] * D + d[None, :], d[None, :] < D, D != BD)
    return b_w1, b_b1, b_w2


@triton.jit
def store_block(p_w, f, b_w1, b_b1, b_w2, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr):
    """Store block `f` of the record at `p_w`."""
    at, d = f + tl.arange(0, BF), tl.arange(0, BD)
    store(p_w + d[:, None] * (4 * D) + at[None, :], b_w1, d[:, None] < D, D != BD)
    tl.store(p_w + 4 * D * D + at, b_b1)
    store(p_w + 4 * D * D + 4 * D + at[:, None] * D + d[None, :], b_w2, d[None, :] < D, D != BD)


@triton.jit
def load_b2(p_w, D: tl.constexpr, BD: tl.constexpr):
    """b2 [BD] of the record at `p_w`."""
    d = tl.arange(0, BD)
    return load(p_w + 8 * D * D + 4 * D + d, d < D, D != BD)


@triton.jit
def store_b2(p_w, b_b2, D: tl.constexpr, BD: tl.constexpr):
    """Store b2 of the record at `p_w`."""
    d = tl.arange(0, BD)
    store(p_w + 8 * D * D + 4 * D + d, b_b2, d < D, D != BD)


def record(head_dim: int) -> int:
    """The floats of one chain's fast weights: w1 [D F], b1 [F], w2 [F D], b2 [D]."""
    return 8 * head_dim * head_dim + 5 * head_dim


@triton.jit
def copy_record(
    p_w1, p_b1, p_w2, p_b2, p_records, stride, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, PACK: tl.constexpr
):
    """Copy block `program_id(1)` of chain `program_id(0)` from the four tensors into a record, or back."""
    chain, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BF
    at, d = f + tl.arange(0, BF), tl.arange(0, BD)
    p_w = p_records + chain * stride
    p_w1 += chain * 4 * D * D + d[:, None] * (4 * D) + at[None, :]
    p_w2 += chain * 4 * D * D + at[:, None] * D + d[None, :]
    p_b1 += chain * 4 * D + at
    p_b2 += chain * D + d
    if PACK:
        b_w1 = load(p_w1, d[:, None] < D, D != BD)
        b_w2 = load(p_w2, d[None, :] < D, D != BD)
        store_block(p_w, f, b_w1, tl.load(p_b1), b_w2, D, BD, BF)
        if f == 0:
            store_b2(p_w, load(p_b2, d < D, D != BD), D, BD)
    else:
        b_w1, b_b1, b_w2 = load_block(p_w, f, D, BD, BF)
        store(p_w1, b_w1, d[:, None] < D, D != BD)
        store(p_w2, b_w2, d[None, :] < D, D != BD)
        tl.store(p_b1, b_b1)
        if f == 0:
            store(p_b2, load_b2(p_w, D, BD), d < D, D != BD)


# --- gelu, tanh form; with v = 2 sqrt(2 / pi) (z + 0.044715 z^3) it is z sigmoid(v) ---


@triton.jit
def _exp2(x):
    """2^x, two ulps off, in one instruction."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    """1 / x, one ulp off, in one instruction."""
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoids(z):
    """sigmoid(v), sigmoid(-v): one exponential, and neither cancels nor overflows."""
    e = _exp2(tl.minimum((z * z * _EXPONENT_CUBIC + _EXPONENT) * z, 120.0))  # exp(-v)
    s = _reciprocal(1 + e)
    return s, e * s


@triton.jit
def gelu(z):
    """Of [M F], element by element."""
    s, _ = _sigmoids(z)
    return z * s


@triton.jit
def gelu_first(z):
    """gelu(z) and gelu'(z)."""
    s, s_other = _sigmoids(z)
    slope = (z * z * _SLOPE + 1) * _SCALE  # dv/dz
    return z * s, s * (1 + z * s_other * slope)


@triton.jit
def gelu_second(z):
    """gelu(z), gelu'(z) and gelu''(z)."""
    s, s_other = _sigmoids(z)
    slope = (z * z * _SLOPE + 1) * _SCALE
    bend = z * _BEND  # d2v/dz2
    second = s * s_other * (2 * slope + z * (bend + (s_other - s) * slope * slope))
    return z * s, s * (1 + z * s_other * slope), second


# --- LayerNorm over D, of [BM BD] ---


@triton.jit
def _keep(x, D: tl.constexpr, BD: tl.constexpr):
    """`x` with zeros in the padded columns."""
    return x if D == BD else tl.where(tl.arange(0, BD)[None, :] < D, x, 0.0)


@triton.jit
def normalise(z, EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """x_hat [BM BD] = (z - mean) rstd, and rstd [BM 1]."""
    centred = _keep(z - tl.sum(z, 1, keep_dims=True) / D, D, BD)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / D + EPS)
    return centred * rstd, rstd


@triton.jit
def project(d_x_hat, x_hat, rstd, D: tl.constexpr, BD: tl.constexpr):
    """The derivative of `normalise`, which is symmetric: rstd (d - mean(d) - x_hat mean(d x_hat))."""
    mean = tl.sum(d_x_hat, 1, keep_dims=True) / D
    along = tl.sum(d_x_hat * x_hat, 1, keep_dims=True) / D
    return _keep(rstd * (d_x_hat - mean - x_hat * along), D, BD)


@triton.jit
def inner_gradient_backward(d_g, g, x_hat, rstd, target, gamma, beta, D: tl.constexpr, BD: tl.constexpr):
    """d_z [BM BD], d_error [BM BD] = -d_target, and the rows [BM BD] that d_ln_weight sums, of d_g [BM BD]."""
    error = gamma * x_hat + beta - target
    p = gamma * error
    d_p = project(d_g, x_hat, rstd, D, BD)
    d_error = gamma * d_p
    along_p = tl.sum(p * x_hat, 1, keep_dims=True) / D
    along_d_g = tl.sum(d_g * x_hat, 1, keep_dims=True) / D
    d_x_hat = gamma * d_error - rstd * (along_p * d_g + along_d_g * p)
    through_rstd = tl.sum(d_g * g, 1, keep_dims=True) / D
    d_z = project(d_x_hat, x_hat, rstd, D, BD) - rstd * x_hat * through_rstd
    return d_z, d_error, d_p * error + d_error * x_hat
