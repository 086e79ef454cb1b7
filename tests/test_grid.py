"""Grids: what a TOML file and the command line make of each other, and one clear line for each mistake."""

from __future__ import annotations

from importlib.resources import files

import pytest

from harness.grid import load
from implementations.registry import implementations
from spec.cases import CASES
from spec.problem import DTYPES, INNER_MODELS, PASSES

SHIPPED = sorted(path.name.removesuffix(".toml") for path in (files("harness") / "grids").iterdir())


@pytest.fixture
def grid(tmp_path):
    """Write a grid file and load it."""

    def grid(text: str, **overrides):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return load(str(path), overrides)

    return grid


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_grids_load_each_cell_once(name):
    cells = load(name, {})
    assert len({(cell.entry.key, cell.case.name, cell.problem) for cell in cells}) == len(cells) > 0
    assert all(cell.problem.dtype in cell.case.dtypes and cell.passes for cell in cells)
    assert ("torch.eager" in {cell.entry.key for cell in cells}) == (name != "peer-times")


def test_the_parity_grid_has_every_case_for_a_laptop():
    cells = load("parity", {})
    names = {cell.case.name.partition(":")[0] for cell in cells}
    assert names == {case.name for case in CASES.values() if case.group != "named"}
    assert {cell.entry.key for cell in cells} == {key for key in implementations() if not key.startswith("peer.")}


def test_a_block_is_a_product_of_its_axes(grid):
    cells = grid('[[block]]\ncases = ["size-d16"]\nimplementations = ["torch.eager"]')
    assert [(cell.problem.inner_model, cell.problem.dtype) for cell in cells] == [
        (inner_model, dtype) for inner_model in INNER_MODELS for dtype in DTYPES
    ]
    assert all(cell.passes == PASSES and cell.case is CASES["size-d16"] for cell in cells)


def test_all_but_leaves_out_and_the_command_line_brings_back(grid):
    text = '[[block]]\ncases = ["size-d16"]\nall_but = ["torch"]'
    left = {cell.entry.key for cell in grid(text)}
    assert left == {key for key in implementations() if not key.startswith("torch.")}
    assert {cell.entry.key for cell in grid(text, implementations=["torch.eager"])} == {"torch.eager"}


def test_overrides_replace_an_axis_in_every_block(grid):
    text = """
        [[block]]
        cases = ["size-d16"]
        dtypes = ["fp64"]
        [[block]]
        cases = ["group:small"]
        passes = ["backward"]
    """
    overrides = {"cases": ["stress-tiny"], "inner_models": ["mlp"], "dtypes": ["bf16"], "implementations": ["jax"]}
    cells = grid(text, **overrides, passes=["forward"], matmul_precisions=None)
    assert {cell.entry.key.partition(".")[0] for cell in cells} == {"jax"}
    found = {(cell.case.name, cell.problem.inner_model, cell.problem.dtype, cell.passes) for cell in cells}
    assert found == {("stress-tiny", "mlp", "bf16", ("forward",))}


def test_only_cases_leave_the_blocks_as_they_are(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("""
        [[block]]
        cases = ["size-d16", "stress-tiny"]
        implementations = ["jax.scan"]
        [[block]]
        cases = ["stress-tiny"]
        implementations = ["torch.eager"]
    """)
    for name, keys in (("size-d16", {"jax.scan"}), ("stress-tiny", {"jax.scan", "torch.eager"})):
        cells = load(str(path), {}, [name])
        assert {(cell.case.name, cell.entry.key) for cell in cells} == {(name, key) for key in keys}
    with pytest.raises(ValueError, match=r"^mine.toml: unknown case 'stress-tony' \(did you mean stress-tiny\?\)"):
        load(str(path), {}, ["stress-tony"])


def test_tf32_is_of_fp32_only(grid):
    text = '[[block]]\ncases = ["size-d16"]\nimplementations = ["torch.eager"]\ninner_models = ["linear"]\n'
    cells = grid(text + 'matmul_precisions = ["ieee", "tf32"]')
    modes = [(cell.problem.dtype, cell.problem.matmul_precision) for cell in cells]
    assert modes == [("fp64", "ieee"), ("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")]


def test_a_case_keeps_to_its_dtypes(grid):
    cells = grid('[[block]]\ncases = ["stress-near-constant-rows"]\ndtypes = ["bf16", "fp16"]')
    assert {cell.problem.dtype for cell in cells} == {"bf16"}


def test_other_sizes_are_another_case(grid):
    cells = grid('[[block]]\ncases = ["size-d16"]\nimplementations = ["torch.eager"]\ntokens = [32, 64]\n'
                 'mini_batches = [8]\ndtypes = ["fp32"]\ninner_models = ["linear"]')  # fmt: skip
    sizes = [(cell.case.name, cell.problem.tokens, cell.problem.mini_batch) for cell in cells]
    assert sizes == [("size-d16:T=32,M=8", 32, 8), ("size-d16:M=8", 64, 8)]
    assert all(cell.case.tokens == cell.problem.tokens for cell in cells)


SCALING = '[[block]]\ncases = ["size-d32-m32"]\nimplementations = ["torch.eager"]\ntokens = [32, 64]\n'
SCALING += 'mini_batches = [16, 32]\ndtypes = ["fp32"]\ninner_models = ["linear"]\n'


@pytest.mark.parametrize(
    "overrides, names",
    [
        ({"cases": ["size-d16"]}, ["size-d16"]),
        ({"cases": ["size-d16"], "tokens": [32], "mini_batches": None}, ["size-d16:T=32"]),
        ({"tokens": [96]}, ["size-d32-m32:T=96,M=16", "size-d32-m32:T=96"]),
        ({"mini_batches": [8]}, ["size-d32-m32:T=32,M=8", "size-d32-m32:T=64,M=8"]),
    ],
)
def test_cases_of_the_command_line_come_in_their_own_sizes(grid, overrides, names):
    assert [cell.case.name for cell in grid(SCALING + SCALING, **overrides)] == names


def test_duplicates_are_merged_with_the_passes_of_both(grid):
    block = '[[block]]\ncases = ["size-d16", "size-d16"]\nimplementations = ["torch.eager", "torch.eager"]\n'
    block += 'dtypes = ["fp32"]\ninner_models = ["linear"]\n'
    cells = grid(block + 'passes = ["backward"]\n' + block + 'passes = ["forward"]')
    assert [cell.passes for cell in cells] == [("forward", "backward")]


BLOCK = '[[block]]\ncases = ["size-d16"]\n'


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '[[block]]\ncases = ["size-d61"]',
            "unknown case 'size-d61' (did you mean size-d16?): expected one of lm-125m,",
        ),
        (
            '[[block]]\ncases = ["group:smal"]',
            "unknown case group 'smal' (did you mean small?): expected one of named,",
        ),
        ("[[block]]\ncases = [3]", "unknown case 3: expected one of lm-125m,"),
        ('[[block]]\ncases = "size-d16"', "cases: expected a list, got 'size-d16'"),
        ('[[block]]\ndtypes = ["fp32"]', "cases: expected a list of case names, got nothing"),
        (
            BLOCK + 'implementations = ["torch.eagre"]',
            "unknown implementation 'torch.eagre' (did you mean torch.eager?)",
        ),
        (BLOCK + 'all_but = ["tosch"]', "unknown implementation 'tosch'"),
        (BLOCK + "implementations = [3]", "unknown implementation 3: expected one of torch.eager,"),
        (BLOCK + 'dtypes = ["fp8"]', "unknown dtype 'fp8'"),
        (BLOCK + "dtypes = true", "dtypes: expected a list, got True"),
        (BLOCK + 'inner_models = ["conv"]', "unknown inner model 'conv': expected one of linear, mlp"),
        (BLOCK + 'passes = ["both"]', "unknown pass 'both': expected one of forward, backward, forward_backward"),
        (BLOCK + 'matmul_precisions = ["tf64"]', "matmul_precision: expected one of ieee, tf32, got 'tf64'"),
        (
            BLOCK + 'dtype = ["fp32"]',
            "unknown key 'dtype' (did you mean dtypes?): expected one of cases, inner_models,",
        ),
        (BLOCK + "tokens = [40]", "tokens: expected a multiple of mini_batch = 16, got 40"),
        (BLOCK + "tokens = [0]", "tokens: expected a positive integer, got 0"),
        (BLOCK + 'mini_batches = ["16"]', "mini_batch: expected a positive integer, got '16'"),
    ],
)
def test_a_mistake_in_a_block_is_one_line_with_file_and_block(grid, text, message):
    with pytest.raises(ValueError) as error:
        grid('[[block]]\ncases = ["size-d32-m32"]\n' + text)
    assert str(error.value).startswith(f"mine.toml, block 2: {message}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[block", "mine.toml: not a TOML file: "),
        ("", "mine.toml: expected at least one [[block]]"),
        ("block = 3", "mine.toml: expected at least one [[block]]"),
        ('[block]\ncases = ["size-d16"]', "mine.toml: expected at least one [[block]]"),
        ("[[block]]\ncases = []", "mine.toml: expected at least one cell, none is left of its blocks"),
    ],
)
def test_a_file_that_is_no_grid_is_one_line(grid, text, message):
    with pytest.raises(ValueError) as error:
        grid(text)
    assert str(error.value).startswith(message) and len(str(error.value).splitlines()) == 1


def test_overrides_that_leave_nothing_are_said(grid):
    with pytest.raises(ValueError, match=r"^mine.toml: .* none is left of dtypes = bf16, matmul_precisions = tf32$"):
        grid(BLOCK, dtypes=["bf16"], matmul_precisions=["tf32"])


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"^mine.toml: not a TOML file: "):
        load(str(tmp_path / "mine.toml"), {})


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=rf"^unknown grid 'defautl' \(did you mean default\?\): .* {', '.join(SHIPPED)}$"
    ):
        load("defautl", {})
    with pytest.raises(ValueError, match=r"^no such grid: .*mine.toml$"):
        load(str(tmp_path / "mine.toml"), {})
