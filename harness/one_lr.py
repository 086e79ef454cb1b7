"""Cases with one learning rate for each mini-batch: `lm-1.3b:one-lr` on the command line and in grids.

There eta[i, j] = token_eta[i] lr[j] depends on i alone, which is where dialects with a learning rate of the reading
token meet this spec. The gradient of lr is then that of the mini-batch: the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from spec.cases import Case, Values
from spec.problem import Dtype, InnerModel, MatmulPrecision, Problem

SUFFIX = ":one-lr"


@dataclass(frozen=True)
class OneLrProblem(Problem):
    """A problem whose lr has one value in each mini-batch of each head."""

    one_lr: bool = True


@dataclass(frozen=True)
class OneLrCase(Case):
    """A case whose problems are `OneLrProblem`s."""

    def problem(self, inner_model: InnerModel, dtype: Dtype, matmul_precision: MatmulPrecision = "ieee") -> Problem:
        """The problem that this case poses to `inner_model` in `dtype`."""
        problem = super().problem(inner_model, dtype, matmul_precision)
        return OneLrProblem(**{field.name: getattr(problem, field.name) for field in fields(problem)})


@dataclass(frozen=True)
class _OneLr:
    """Changes values as `before` does, then gives every token the lr of the first in its mini-batch."""

    before: Callable[[Values], None] | None

    def __call__(self, values: Values) -> None:
        if self.before:
            self.before(values)
        lr, size = values["lr"], values["token_eta"].size
        lr[...] = lr[:, ::size].repeat(size, 1)


def with_one_lr(case: Case) -> OneLrCase:
    """The same case with one lr for each mini-batch, under a name that says so."""
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return OneLrCase(**values | {"name": case.name + SUFFIX, "adjust": _OneLr(case.adjust)})
