"""What `docs/findings.md` says in words: one `Finding` for each function of `findings_runs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

INTRODUCTION = """\
Places where public TTT code departs from the exact operation, from its own forward, or from what its tests say. They
are written for its maintainers: each has the smallest case that shows it, what was measured and where, and the code
that measured it. "Allowed" is this lab's rule: twice the error of the plain PyTorch dual form in the same dtype, plus a
few ulps, against a float64 oracle ([`harness/rule.py`](../harness/rule.py)). Many of these are small, and some are a
choice rather than a fault; the text says which. This page is generated: `python -m harness findings`."""

NOT_RUN = """\
Nothing is claimed here of ttt-video-dit, ttt-lm-kernels and ttt-rs: this lab has no adapter that runs them yet.

The source of ttt-tk's backward adds to the tensor that it is handed as the forward's output (`store_add_async` to `o`).
With the wheel of 0.9.0 on an H100 that tensor was the same afterwards (`video-5b-small`)."""


@dataclass(frozen=True)
class Finding:
    """One departure: `name` is its function's in `findings_runs`, with dashes; `packages` those that it runs."""

    name: str
    project: str
    title: str
    text: str
    needs: Literal["any", "h100"] = "any"
    packages: tuple[str, ...] = ()


_OFFICIAL_JAX = "ttt-lm-jax"
_OFFICIAL_TORCH = "ttt-lm-pytorch"
_FLA = "flash-linear-attention"
_TK = "ttt-tk (test-time-training)"
_FLA_CORE = ("fla-core",)
_TK_PACKAGE = ("test-time-training",)

FINDINGS = (
    Finding(
        "official-gelu-torch",
        _OFFICIAL_TORCH,
        "The derivative of gelu has constants of eight digits",
        "`gelu_bwd` writes 0.79788456 for sqrt(2 / pi) and 0.1070322243 for its product with 3 * 0.044715, while the "
        "forward is PyTorch's own gelu with exact ones. So the inner gradient of TTT-MLP is not the derivative of the "
        "inner loss beyond about nine digits: invisible in fp32 and below, visible in fp64 against the primal form. "
        "The JAX code has the same lines. `math.sqrt(2 / math.pi)` costs nothing.",
    ),
    Finding(
        "official-gelu-jax",
        _OFFICIAL_JAX,
        "The derivative of gelu has constants of eight digits",
        "As in the PyTorch code: `diff_gelu` against `nn.gelu`.",
    ),
    Finding(
        "official-jax-variance",
        _OFFICIAL_JAX,
        "The inner LayerNorm takes its variance as a difference of two means",
        "flax's LayerNorm computes the variance as mean(x^2) - mean(x)^2 unless `use_fast_variance=False`. Where the "
        "mean of a row is large beside its spread that cancels; inner outputs start small, and may drift. "
        "In fp32 the variance of a row with mean / std = r loses about r^2 ulps. The PyTorch port computes it in two "
        "passes, so the two official codes differ here.",
    ),
    Finding(
        "official-torch-half-model",
        _OFFICIAL_TORCH,
        "A model moved to bf16 keeps its fast weights in bf16",
        "The fast weights have the dtype of the parameters they start from, so `model.to(torch.bfloat16)` or "
        '`torch_dtype="bfloat16"` rounds them after every mini-batch. The default, fp32, does not. It is a choice of '
        "whoever moves the model. Most of the error is that of the fast weights; none is left where they and the inner "
        "step stay in fp32, whatever the model has.",
    ),
    Finding(
        "fla-ragged-tail-reference",
        _FLA,
        "Padded rows of a ragged tail update the bias: reference",
        "With T not a multiple of the chunk, rows that stand for no token have xk = 0 and xv = 0 but not g = 0: their "
        "inner output is the bias alone, and its gradient is not zero. The weights are safe, since xk = 0; the bias "
        "is not. `chunk_ttt_linear_ref` pads in the same way as the kernels, so the tests compare equal. Masking the "
        "gradient of rows past T, as the backward does, is enough.",
        packages=_FLA_CORE,
    ),
    Finding(
        "fla-ragged-tail-kernels",
        _FLA,
        "Padded rows of a ragged tail update the bias: kernels",
        "The same in `chunk_ttt_linear` and `fused_chunk_ttt_linear`: the forward stores masked rows of `v_new`, and "
        "sums all of them into the bias.",
        "h100",
        _FLA_CORE,
    ),
    Finding(
        "fla-reference-scales-its-input",
        _FLA,
        "The reference multiplies the caller's q by scale",
        "`ttt_linear` in `naive.py` says `q *= scale`. For fp32 inputs without padding nothing before it has made a "
        "copy, so the caller's tensor changes; a second call then scales twice. `q = q * scale` is enough.",
        packages=_FLA_CORE,
    ),
    Finding(
        "fla-continuous-integration",
        _FLA,
        "In continuous integration a failed comparison is a warning",
        "With `FLA_CI_ENV` set, `assert_close` warns, where it would fail, if the relative error is below 0.01 or the "
        "largest difference at most 0.3. With numbers of the kind of the first case of `tests/ops/test_ttt.py` (as "
        "of 0315a70) all of dv is: zeros in its place pass. Cases with T above 1000 are skipped there, in continuous "
        "integration or not, which leaves two of six.",
        packages=_FLA_CORE,
    ),
    Finding(
        "fla-mixed-dtypes",
        _FLA,
        "fp32 LayerNorm parameters beside bf16 views do not compile in the backward",
        "Parameters that stay in fp32 are common in mixed-precision training; the forward takes them.",
        "h100",
        _FLA_CORE,
    ),
    Finding(
        "fla-tf32-backward",
        _FLA,
        "fp32 gradients use tf32, fp32 outputs do not",
        "The forward kernels ask for `allow_tf32=False`; the products of the backward leave it to Triton's default, "
        "which is tf32. So a backward in fp32 has the error of tf32, whatever PyTorch's setting is.",
        "h100",
        _FLA_CORE,
    ),
    Finding(
        "fla-norm-gradients",
        _FLA,
        "The gradients of LayerNorm's parameters are summed over mini-batches in their own dtype",
        "`b_dw` and `b_db` in the backward of `chunk.py` and `fused_chunk.py` have the dtype of `w` and `b`: beside "
        "bf16 views that is bf16, and what a mini-batch adds is rounded to the last place of the sum so far. On "
        "`lm-1.3b-long`, 2048 mini-batches, `d_ln_bias` is off by 0.3 ([results](../results/h100/parity.csv)). "
        "`dtype=tl.float32` in these two lines should mend most of it: the sums live in registers.",
        "h100",
        _FLA_CORE,
    ),
    Finding(
        "fla-sum-in-bf16",
        _FLA,
        "What such a sum in bf16 costs, without a GPU",
        "The same sum, of what this lab's PyTorch page finds in fp32 with four heads of the two cases: the size and "
        "the growth of the error above. That the kernels are right with the sums in fp32 was not run.",
    ),
    Finding(
        "fla-rounded-norm-parameters",
        _FLA,
        "LayerNorm's parameters in bf16 cost as much of the final bias as the rule allows",
        "A choice rather than a fault: beside bf16 views the kernels take `w` and `b` in bf16 alone (above), as its "
        "tests hand them over, and so does this lab's adapter; the spec has them in fp32. `final_b1` is over what is "
        "allowed in four of the five cases; this rounding alone, in fp32 otherwise, is about what is allowed.",
        "h100",
        _FLA_CORE,
    ),
    Finding(
        "ttt-tk-eps",
        _TK,
        "LayerNorm eps: 1e-8 in the repository's backward and tests, 1e-6 in the wheel",
        "The repository (as of 353b6c8) adds 1e-8 in `kernels/ttt_backward/ttt.cu` and in both references of its "
        "tests, 1e-6 in the forward: where the variance of a row is not large beside 1e-6, such a backward is that of "
        "another function. The wheel of 0.9.0 was built from something else: its machine code has 1e-6 in both "
        "kernels. Who builds from the repository gets the mismatch; who installs the wheel does not, and the tests "
        "compare it with another eps.",
        packages=_TK_PACKAGE,
    ),
    Finding(
        "ttt-tk-eps-gradients",
        _TK,
        "The wheel's backward is that of its forward, also where eps matters",
        "No fault: the check behind the line above. Rows whose spread is near sqrt(eps), an inner learning rate above "
        "0. `d_w2`, which that mismatch puts off by several times its size (below), is off by 0.003. `out`, and with "
        "it `d_ln_weight`, is off by a tenth, `torch.eager` by 0.003: the source rounds z2 to bf16 and sums it over "
        "four blocks in bf16 in front of the LayerNorm, and the mean of these rows is far above their spread. The rule "
        "allows for that.",
        "h100",
        _TK_PACKAGE,
    ),
    Finding(
        "ttt-tk-eps-in-our-page",
        _TK,
        "What that mismatch of eps costs, without a GPU",
        "The same mismatch put into this lab's PyTorch page in float64, on rows whose spread is near sqrt(eps): the "
        "error is that of the mismatch alone.",
    ),
    Finding(
        "ttt-tk-determinism",
        _TK,
        "Two runs of the backward differ",
        "Gradients are summed over the blocks of a cluster by asynchronous adds in bf16, whose order is free.",
        "h100",
        _TK_PACKAGE,
    ),
    Finding(
        "ttt-tk-video-gradients",
        _TK,
        "Gradients of 288 mini-batches are further off than those of the plain form in bf16",
        "The case magnifies every rounding, and the rule allows for that; the forward's outputs are within it. Ten of "
        "the eleven gradients are not, all but `d_xq`, and two runs differ (above): `d_token_eta` was within what is "
        "allowed in one check of 2026-11-26, and at 18 to 42 times it in four others; `d_b1` at 1.8 to 18. Why was not "
        "found; the sums above, in bf16 and in any order, may be it.",
        "h100",
        _TK_PACKAGE,
    ),
    Finding(
        "ttt-tk-bundled-driver",
        _TK,
        "The wheel brings a copy of the driver's library",
        "`libcuda` belongs to the installed driver. The wheel has one of its own beside it, which the extension loads "
        "first; seen on an H100 with driver 580, it could not make the tensor maps that the kernels need. This lab's "
        "adapter loads the installed one before it imports the package. `auditwheel repair --exclude libcuda.so.1` "
        "leaves it out.",
        packages=_TK_PACKAGE,
    ),
)
