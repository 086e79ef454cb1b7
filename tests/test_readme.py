"""What the README says of the code is what the code says of itself."""

from __future__ import annotations

import re
from pathlib import Path

from implementations.registry import implementations
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, tensor_specs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_tensors_is_that_of_the_annotations():
    rows = re.findall(r"^\| `(\w+)` \| (?:`([A-Z ]+)`)? \| (?:`([A-Z ]+)`)? \|", README, re.MULTILINE)
    for column, inner_model in ((1, "linear"), (2, "mlp")):
        problem = Problem(inner_model, 1, 16, 1, 16, 16)
        written = {row[0]: row[column] for row in rows if row[column]}
        specs = [*tensor_specs(INPUTS[inner_model], problem), *tensor_specs(OUTPUTS[inner_model], problem)]
        assert written == {spec.name: " ".join(spec.axes) for spec in specs}


def test_every_implementation_of_this_repository_is_named():
    for key in implementations():
        if key.partition(".")[0] in ("torch", "jax", "triton", "cuda"):
            assert f"`{key}`" in README


def test_every_file_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
