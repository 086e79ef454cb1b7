"""Implementations that are wrong on purpose: what the parity check must reject, or it checks nothing.

A fault is the PyTorch pages with one or a few lines of source replaced, so that each reads as a short diff. Most
are defects of public code bases, named in `about`; the rest are mistakes that a kernel author makes. A fault whose
`old` text is no longer in the pages, or is there another number of times, raises: it can not rot into a no-op.

Some of them give the right numbers, and only writing where they must not, or differing from run to run, gives
them away; others show in one dtype alone. `cases` and `dtypes` say where each must be rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from types import ModuleType
from typing import Literal

from spec.problem import Dtype, InnerModel

File = Literal["blocks", "scan", "ttt_linear", "ttt_mlp"]
_PACKAGE = "implementations.torch"


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which `file` has exactly `count` times, by `new`."""

    file: File
    old: str
    new: str
    count: int = 1

    def apply(self, source: str) -> str:
        """`source` with the edit made.

        Raises:
            ValueError: `old` is in `source` more or fewer than `count` times.
        """
        if (found := source.count(self.old)) != self.count:
            raise ValueError(f"{self.file}.py: expected {self.old!r} {self.count} times, found {found}")
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        about: what is wrong, after the name of the public code base that has it, if one does.
        edits: what makes it of the pages.
        inner_models: the pages that it is planted in.
        cases: names from `spec.cases.CASES`, small ones, on each of which it must show.
        dtypes: in each of which it must show.
    """

    name: str
    about: str
    edits: tuple[Edit, ...]
    inner_models: tuple[InnerModel, ...] = ("linear", "mlp")
    cases: tuple[str, ...] = ("size-d16",)
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")


def load(fault: Fault | None, inner_model: InnerModel) -> ModuleType:
    """The page of `inner_model` with `fault` in it, as a module with `forward` and `backward`; genuine for None.

    The page and the two modules that it stands on are executed anew from edited source and wired to each other:
    `sys.modules` and the genuine modules are left as they are.

    Raises:
        ValueError: the fault is not planted in this inner model, or the pages have changed under one of its edits.
    """
    name = fault.name if fault else "genuine"
    if fault and inner_model not in fault.inner_models:
        raise ValueError(f"fault {name}: expected an inner model of {', '.join(fault.inner_models)}, got {inner_model}")
    edits = fault.edits if fault else ()
    blocks, scan, page = (_execute(file, name, edits) for file in ("blocks", "scan", f"ttt_{inner_model}"))
    shared = {key: getattr(scan, key) for key in ("MiniBatch", "Parameters", "Residuals", "State")}
    vars(page).update(shared, blocks=blocks, scan=scan)
    return page


def _execute(file: str, name: str, edits: tuple[Edit, ...]) -> ModuleType:
    source = resources.files(_PACKAGE).joinpath(f"{file}.py").read_text()
    for edit in edits:
        if edit.file == file:
            source = edit.apply(source)
    module = ModuleType(f"planted.{name}.{file}")
    exec(compile(source, f"<planted {name}>/{file}.py", "exec"), vars(module))  # our own source
    return module


def _blocks(old: str, new: str, count: int = 1) -> tuple[Edit, ...]:
    return (Edit("blocks", old, new, count),)


def _scan(old: str, new: str, count: int = 1) -> tuple[Edit, ...]:
    return (Edit("scan", old, new, count),)


def _pages(old: str, new: str, count: int = 1) -> tuple[Edit, ...]:
    """The same edit of both pages; `#` stands for the number of the last layer, 1 or 2."""
    layers: dict[File, str] = {"ttt_linear": "1", "ttt_mlp": "2"}
    return tuple(
        Edit(file, old.replace("#", layer), new.replace("#", layer), count) for file, layer in layers.items()
    )


# Lines that more than one fault changes.
_APPEND = "            outs.append(out)"
_ATTN = "attn = (dot(x_bar, x.mT, problem) + 1).tril()"
_B_UPDATE = "b - eta_last * (lr * g).sum(-2, keepdim=True),"
_D_LN_WEIGHT = "(d_y * norm.x_hat).sum(-2, keepdim=True),"
_D_STATE = "d_state = _cut_state(cotangents[1:])"
_D_TOKEN_ETA = "(d_eta * lr.mT).sum(-1, keepdim=True),"
_D_Z = "d_z = project(d_x_hat, norm) - rstd * x_hat * through_rstd"
_ETA = "token_eta * lr.mT"
_RSTD = "rstd = ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()"
_SHUFFLED = "(d_y * norm.x_hat)[..., torch.randperm(d_y.shape[-2]), :]"
_TARGET = "xv - xk, ln_weight, ln_bias"

FAULTS: tuple[Fault, ...] = (
    # --- Gradients: dropped, cut short, or never written ---
    Fault(
        "eps-differs",
        "ttt-tk: LayerNorm eps is 1e-6 in the forward and 1e-8 in the backward",
        _pages(
            "norm# = blocks.inner_gradient(z#, xv - xk, ln_weight, ln_bias, problem.eps)",
            "norm# = blocks.inner_gradient(z#, xv - xk, ln_weight, ln_bias, 1e-8)",
        )
        + _pages("norm#_bar = blocks.normalise(z#_bar, problem.eps)", "norm#_bar = blocks.normalise(z#_bar, 1e-8)"),
        cases=("stress-near-constant-rows",),
    ),
    Fault(
        "token-eta-last-row",
        "ttt-video-dit: gradient of token_eta computed for the last row of eta only",
        _blocks(
            _D_TOKEN_ETA, "torch.cat([0 * lr[..., 1:, :], (d_eta * lr.mT).sum(-1, keepdim=True)[..., -1:, :]], -2),"
        ),
    ),
    Fault(
        "token-eta-uninitialised",
        "ttt-rs: gradient of token_eta is memory that nobody wrote",
        _scan("d_parameters.token_eta.squeeze(-1),", "torch.empty_like(residuals.inputs.token_eta),"),
    ),
    Fault(
        "token-eta-wrong-axis",
        "gradient of token_eta summed over the rows of eta, not its columns",
        _blocks(_D_TOKEN_ETA, "(d_eta * lr.mT).sum(-2, keepdim=True).mT,"),
    ),
    Fault(
        "final-cotangents-dropped",
        "ttt-video-dit: upstream gradients of the final state dropped",
        _scan(_D_STATE, "d_state = _cut_state(tuple(0 * d for d in cotangents[1:]))"),
        cases=("size-d16", "stress-not-causal"),
    ),
    Fault(
        "final-bias-cotangent-dropped",
        "upstream gradients of the final biases dropped, those of the matrices kept",
        _scan(_D_STATE, "d_state = _cut_state(tuple(d if d.dim() == 4 else 0 * d for d in cotangents[1:]))"),
    ),
    Fault(
        "d-state-not-carried",
        "backpropagation truncated at the mini-batch: cotangents of the state are not carried on",
        _scan("d_state, d_batch, d_shared = step(", "_, d_batch, d_shared = step("),
    ),
    Fault(
        "d-w-misses-z1",
        "ttt-rs: gradient of w1 misses the path through z1 = xk w1 + b1",
        _pages(" + blocks.dot(xk.mT, d_z1, problem)", ""),
        cases=("size-d16", "stress-not-causal"),
    ),
    Fault(
        "d-lr-misses-update",
        "gradient of lr misses the path through the update",
        _blocks("-eta_last * along,", "0 * along,"),
    ),
    Fault(
        "d-ln-bias-misses-inner",
        "gradient of ln_bias misses the path through the inner gradient",
        _pages("d_ln_bias + d_ln_bias_in", "d_ln_bias"),
    ),
    Fault(
        "parameters-of-one-sequence",
        "gradients of shared parameters taken from the first sequence of the batch",
        _scan("s.sum_to_size(d.shape)", "s[:1].sum_to_size(d.shape)"),
    ),
    # --- Second order: the inner gradient differentiated in part ---
    Fault(
        "second-order-without-rstd",
        "second order of the LayerNorm without the path through rstd",
        _blocks(_D_Z, "d_z = project(d_x_hat, norm)"),
    ),
    Fault(
        "second-order-without-x-hat",
        "second order of the LayerNorm without the x_hat of its projection",
        _blocks(
            "d_x_hat = ln_weight * d_error - rstd * (along_p * d_g + along_d_g * p)", "d_x_hat = ln_weight * d_error"
        ),
    ),
    Fault(
        "first-order-only",
        "inner gradient treated as constant in z",
        _blocks(_D_Z, "d_z = 0 * g"),
        cases=("size-d16", "stress-not-causal"),
    ),
    # --- The read-out: mask, eta, output stage ---
    Fault(
        "no-tril",
        "every token reads the whole mini-batch",
        _blocks(".tril()", "", 3),
    ),
    Fault(
        "no-tril-of-ones",
        "causal read-out without the bias term tril(1)",
        _blocks(_ATTN, "attn = dot(x_bar, x.mT, problem).tril()", 2),
    ),
    Fault(
        "eta-transposed",
        "lr and token_eta swapped: eta[i, j] = lr[i] token_eta[j]",
        _blocks(_ETA, "lr * token_eta.mT", 2),
    ),
    Fault(
        "eta-rows-permuted",
        "ttt-video-dit (multi-scene input): rows of eta permuted, columns not",
        _blocks(_ETA, "token_eta.flip(-2) * lr.mT", 2),
    ),
    Fault(
        "reads-updated-weights",
        "causal read-out computed as the other one: every token reads the updated weights",
        _pages("if problem.causal:", "if not problem.causal:", 3),
    ),
    Fault(
        "out-adds-z",
        "flash-linear-attention: output is z + LN(z), not xq + LN(z)",
        _pages("out = xq + ln_weight", "out = z#_bar + ln_weight"),
    ),
    Fault(
        "q-scaled",
        "flash-linear-attention: xq scaled by D^-1/2 unless told",
        _scan("for x in (inputs.xq, ", "for x in (inputs.xq * problem.head_dim**-0.5, "),
    ),
    Fault(
        "heads-permuted",
        "output of head h written to head h + 1",
        _scan(_APPEND, "            outs.append(out.roll(1, 1))"),
        cases=("size-d16", "stress-not-causal"),
    ),
    Fault(
        "target-without-xk",
        "inner loss reconstructs xv, not xv - xk",
        _pages(_TARGET, "xv, ln_weight, ln_bias", 3),
    ),
    # --- The update of the fast weights ---
    Fault(
        "state-from-first-row",
        "state updated with row 0 of eta, not its last",
        _blocks("eta_last = token_eta[-1:]", "eta_last = token_eta[:1]", 2),
        cases=("size-d16", "stress-not-causal"),
    ),
    Fault(
        "bias-not-updated",
        "fast biases never move",
        _blocks(_B_UPDATE, "b,"),
        cases=("size-d16", "stress-not-causal"),
    ),
    Fault(
        "bias-counts-token-twice",
        "flash-linear-attention (padded rows): bias update counts one token too many",
        _blocks(_B_UPDATE, "b - eta_last * ((lr * g).sum(-2, keepdim=True) + (lr * g)[..., -1:, :]),"),
    ),
    Fault(
        "state-in-bf16",
        "ttt-rs (I/O-dtype state): fast weights rounded to bf16 between mini-batches",
        _scan(_APPEND, _APPEND + "\n            state = tuple(x.bfloat16().to(x.dtype) for x in state)"),
        cases=("stress-tiny", "stress-zero-lr"),
    ),
    Fault(
        "last-mini-batch-not-in-state",
        "final state is the one before the last mini-batch",
        _scan("*_join_state(state))", "*_join_state(states[-1]))"),
    ),
    # --- LayerNorm and gelu ---
    Fault(
        "variance-unbiased",
        "variance divided by D - 1",
        _blocks(_RSTD, "rstd = (z.var(-1, keepdim=True) + eps).rsqrt()"),
    ),
    Fault(
        "eps-outside-sqrt",
        "rstd is 1 / (sqrt(var) + eps), not 1 / sqrt(var + eps)",
        _blocks(_RSTD, "rstd = 1 / ((centred * centred).mean(-1, keepdim=True).sqrt() + eps)"),
        cases=("stress-near-constant-rows",),
    ),
    Fault(
        "gelu-exact",
        "forward computes the exact gelu, its derivatives are of the tanh form",
        _blocks(
            "return z * torch.sigmoid(_GELU_SCALE * (z + _GELU_CUBIC * z**3))",
            "return torch.nn.functional.gelu(z)",
        ),
        inner_models=("mlp",),
        dtypes=("fp64", "fp32"),
    ),
    Fault(
        "gelu-constants-truncated",
        "the official code and its ports: truncated constants in gelu', 4e-10 off",
        _blocks(
            "slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * z**2)  # dv/dz",
            "slope = 2 * (0.79788456 + 0.1070322243 * z**2)",
        ),
        inner_models=("mlp",),
        dtypes=("fp64",),
    ),
    # --- Overflow, NaN, memory that nobody wrote ---
    Fault(
        "scores-overflow-fp16",
        "ttt-lm-kernels (there it is D * dl): a product past 65504 in fp16, here the unscaled scores",
        _blocks(_ATTN, _ATTN + ".half().to(x.dtype)", 2),
        inner_models=("mlp",),
        cases=("stress-outlier-token",),
        dtypes=("fp16",),
    ),
    Fault(
        "one-nan",
        "one element of the output is NaN, which a check of the form `difference > limit` lets pass",
        _scan("    outputs = OUTPUTS", "    outs[-1][-1, -1, -1, -1] = torch.nan\n    outputs = OUTPUTS"),
        cases=("size-d16", "stress-not-causal"),
    ),
    Fault(
        "tail-unwritten",
        "output of the last mini-batch is memory that nobody wrote",
        _scan(_APPEND, "            outs.append(out if len(states) < len(batches) else torch.empty_like(out))"),
        cases=("size-d16", "stress-not-causal"),
    ),
    # --- Right numbers, wrong manners ---
    Fault(
        "input-overwritten",
        "flash-linear-attention (naive `q *= scale`): forward changes the caller's tensor",
        _pages(_TARGET, "xv, ln_weight, ln_bias", 3)
        + _pages(
            "(forward_step, inputs, problem)", "(forward_step, inputs._replace(xv=inputs.xv.sub_(inputs.xk)), problem)"
        ),
        cases=("size-d16", "stress-not-causal"),
        dtypes=("fp32",),
    ),
    Fault(
        "residual-overwritten",
        "ttt-tk: backward writes into what the forward saved, here the caller's xv",
        _pages("norm# = blocks.inner_gradient(z#, xv - xk,", "norm# = blocks.inner_gradient(z#, xv.sub_(xk),")
        + _pages("norm#, xv - xk, ln_weight", "norm#, xv, ln_weight"),
        cases=("size-d16", "stress-not-causal"),
        dtypes=("fp32",),
    ),
    Fault(
        "output-overwritten",
        "ttt-tk: backward writes into the saved forward output",
        _scan(
            "    return outputs, Residuals(inputs, states)",
            "    states[0][0].saved = outputs.out\n    return outputs, Residuals(inputs, states)",
        )
        + _scan(
            "    validate(cotangents, OUTPUTS, problem)",
            "    validate(cotangents, OUTPUTS, problem)\n    residuals.states[0][0].saved.mul_(2)",
        ),
    ),
    Fault(
        "cotangent-overwritten",
        "backward sums the gradient of xq in the caller's cotangent of the output",
        _pages("d_xq = d_xq + d_xq_read", "d_xq += d_xq_read"),
        dtypes=("fp32",),
    ),
    Fault(
        "bf16-adds-in-no-order",
        "ttt-tk: bf16 reduce-adds into a parameter's gradient, in no fixed order",
        _blocks(_D_LN_WEIGHT, f"sum({_SHUFFLED}.bfloat16().unbind(-2))[..., None, :].to(d_y.dtype),"),
    ),
    Fault(
        "fp32-adds-in-no-order",
        "atomic fp32 adds: as right as any order, and another result in each run",
        _blocks(_D_LN_WEIGHT, f"sum({_SHUFFLED}.unbind(-2))[..., None, :],"),
    ),
)
