"""The pieces that both inner models are made of, as Triton device functions: one mini-batch of one head.

Blocks are fp32 in registers, but for operands of products, which stay as they were stored. `[M, D]` stands for
`[M, BLOCK_D]`, D rounded up to a power of 2, where every column past D holds zeros: loads put them there, and `inside`
after every mean. `nearest` alone rounds, to the I/O dtype.

The derivatives are those of `implementations/torch/blocks.py`, line for line.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# --- Precision ---


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """The fp32 block `x` in DTYPE, rounded to nearest even; interpreted, in fp32 that DTYPE can hold.

    The interpreter truncates where a GPU rounds to bf16, and its products of bf16 operands are garbage.
    """
    if not INTERPRETED:
        x = x.to(DTYPE)
    else:
        x = x.to(tl.float32)
        if DTYPE.is_bf16():
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
        elif DTYPE.is_fp16():
            x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def to_tf32(x):
    """The fp32 block `x`, rounded to the ten bits that tf32 keeps: a tensor core would cut the others off."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`x` as a product takes it."""
    x = nearest(x, DTYPE)
    if DTYPE.is_fp32() and PRECISION == "tf32":
        x = to_tf32(x)
    return x


@triton.jit
def dot_apart(a, b):
    """a @ b in IEEE fp32, summed by itself, also where it is added to something: c + a @ b rounds c once.

    Triton turns c + dot(a, b) into a dot that starts from c, and so rounds c for every row of b: twice the error in
    sums over a long chain. It leaves a dot alone that asks for partial sums, which a product in fp32 does not have.
    """
    return tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)


@triton.jit
def matmul(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b: operands rounded to DTYPE or tf32, sums in fp32."""
    if DTYPE.is_fp32() and PRECISION == "ieee":
        return dot_apart(nearest(a, DTYPE), nearest(b, DTYPE))
    else:
        return tl.dot(operand(a, DTYPE, PRECISION), operand(b, DTYPE, PRECISION), input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, c, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """c + a @ b, summed where c is, but in IEEE fp32."""
    if DTYPE.is_fp32() and PRECISION == "ieee":
        c += dot_apart(a, b)
    else:
        c = tl.dot(operand(a, DTYPE, PRECISION), operand(b, DTYPE, PRECISION), c, input_precision=PRECISION)
    return c


# --- Memory: mini-batch `n` of one head of a `View`, and the fast weights of one layer ---


@triton.jit
def wide(index):
    """`index` in 64 bits: offsets into a large tensor pass 2^31."""
    return tl.full([], 1, tl.int64) * index


@triton.jit
def token_pointers(view, batch, head, n, M: tl.constexpr):
    """[M] pointers to the tokens of a mini-batch."""
    start = wide(batch) * view.stride_b + wide(head) * view.stride_h + wide(n * M) * view.stride_t
    return view.p + start + tl.arange(0, M) * view.stride_t


@triton.jit
def load_tokens(view, batch, head, n, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[M, D], as stored: a product takes it without a conversion."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = token_pointers(view, batch, head, n, M)[:, None] + columns
    return tl.load(at) if D == BLOCK_D else tl.load(at, columns < D, 0.0)


@triton.jit
def store_tokens(view, x, batch, head, n, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[M, D], rounded to what is stored there."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = token_pointers(view, batch, head, n, M)[:, None] + columns
    x = nearest(x, view.p.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x)
    else:
        tl.store(at, x, columns < D)


@triton.jit
def load_lr(view, batch, head, n, M: tl.constexpr):
    """[M, 1], in fp32."""
    return tl.load(token_pointers(view, batch, head, n, M)).to(tl.float32)[:, None]


@triton.jit
def load_lr_paired(view, batch, head, n, M: tl.constexpr, PAIRED: tl.constexpr):
    """[M], in fp32; if PAIRED by way of the four bytes of two heads, the least that an asynchronous copy takes."""
    DTYPE: tl.constexpr = view.p.dtype.element_ty
    if PAIRED:
        at = token_pointers(view, batch, head // 2 * 2, n, M).to(tl.pointer_type(tl.int32), bitcast=True)
        lr = (tl.load(at) >> (head % 2 * 16)).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        lr = tl.load(token_pointers(view, batch, head, n, M))
    return lr.to(tl.float32)


@triton.jit
def load_row(p, index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[D], row `index` of contiguous `... D`."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(p + wide(index) * D + columns, columns < D, 0.0)


@triton.jit
def store_row(p, x, index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[D], into row `index` of contiguous `... D`."""
    columns = tl.arange(0, BLOCK_D)
    tl.store(p + wide(index) * D + columns, x, columns < D)


@triton.jit
def load_matrix(p, index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[D, D], matrix `index` of contiguous `... D D`, as stored."""
    rows, columns = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = p + wide(index) * D * D + rows * D + columns
    return tl.load(at) if D == BLOCK_D else tl.load(at, (rows < D) & (columns < D), 0.0)


@triton.jit
def store_matrix(p, x, index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[D, D], rounded to what is stored there."""
    rows, columns = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = p + wide(index) * D * D + rows * D + columns
    x = nearest(x, p.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x)
    else:
        tl.store(at, x, (rows < D) & (columns < D))


# --- LayerNorm ---


@triton.jit
def mean(x, D: tl.constexpr):
    """[M, D] -> [M, 1]."""
    return tl.sum(x, 1, keep_dims=True) * (1.0 / D)


@triton.jit
def inside(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`x` with zeros past column D."""
    if D != BLOCK_D:
        x = tl.where(tl.arange(0, BLOCK_D)[None, :] < D, x, 0.0)
    return x


@triton.jit
def normalise(z, EPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(x_hat [M, D], rstd [M, 1]) over the last axis, biased variance."""
    centred = inside(z - mean(z, D), D, BLOCK_D)
    rstd = tl.rsqrt(mean(centred * centred, D) + EPS)
    return centred * rstd, rstd


@triton.jit
def project(d_x_hat, x_hat, rstd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The derivative of `normalise`, which is symmetric: rstd (d - mean(d) - x_hat mean(d x_hat))."""
    d_z = rstd * (d_x_hat - mean(d_x_hat, D) - x_hat * mean(d_x_hat * x_hat, D))
    return inside(d_z, D, BLOCK_D)


# --- The inner gradient: LayerNorm backward fused with the L2 loss ---


@triton.jit
def inner_gradient(z, target, ln_weight, ln_bias, EPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(g_z, x_hat [M, D], rstd [M, 1]), g_z = d(1/2 ||LN(z) - target||^2) / dz; ln_weight, ln_bias [1, D]."""
    x_hat, rstd = normalise(z, EPS, D, BLOCK_D)
    error = ln_weight * x_hat + ln_bias - target
    return project(error * ln_weight, x_hat, rstd, D, BLOCK_D), x_hat, rstd


@triton.jit
def inner_gradient_backward(
    d_g, g, x_hat, rstd, target, ln_weight, ln_bias, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The second order: (d_z, -d_target [M, D], d_ln_weight, d_ln_bias [D]) of d_g [M, D]."""
    error = ln_weight * x_hat + ln_bias - target
    p = ln_weight * error
    along_d_g = mean(d_g * x_hat, D)
    d_p = inside(rstd * (d_g - mean(d_g, D) - x_hat * along_d_g), D, BLOCK_D)
    d_error = ln_weight * d_p
    d_x_hat = ln_weight * d_error - rstd * (mean(p * x_hat, D) * d_g + along_d_g * p)
    d_z = project(d_x_hat, x_hat, rstd, D, BLOCK_D) - rstd * x_hat * mean(d_g * g, D)
    return d_z, d_error, tl.sum(d_p * error + d_error * x_hat, 0), tl.sum(d_error, 0)
