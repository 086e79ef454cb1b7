"""What is registered, what is not and why: names, reasons, third parties and source hashes."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from implementations import registry
from implementations.registry import ENTRY_POINT_GROUP, Implementation, implementations, select, unknown
from spec.problem import Problem

PROBLEM = Problem("linear", 1, 16, 1, 16, 16)
PAGES = {"linear": "some.page"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package `name` with this source and one entry point, in a folder of its own."""

    def install(name: str, source: str, entry_point: str) -> Path:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry_point}\n")
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    return install


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError) as error:
        select(["torch.eagre"])
    message = str(error.value)
    assert message.startswith("unknown implementation 'torch.eagre' (did you mean torch.eager?): expected one of ")
    assert all(key in message for key in implementations())


def test_unknown_name_near_to_nothing_has_no_hint():
    assert unknown("case", "zzz", ["size-d16", "lm-125m"]) == "unknown case 'zzz': expected one of size-d16, lm-125m"


def test_folder_name_selects_all_of_a_folder():
    chosen = [entry.key for entry in select(["torch"])]
    assert chosen == [key for key in implementations() if key.startswith("torch.")]
    assert {"torch.eager", "torch.autograd", "torch.compile"} <= set(chosen)


def test_names_select_in_their_order_and_once():
    assert [entry.key for entry in select(["torch.autograd", "torch.eager", "torch.autograd"])] == [
        "torch.autograd",
        "torch.eager",
    ]
    assert select(None) == list(implementations().values())


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"framework": "no_such_framework"}, "no_such_framework is not installed"),
        ({"requires": ("no_such_package",)}, "no_such_package is not installed"),
        ({"pages": {"mlp": "some.page"}}, "has no linear inner model"),
        ({"dtypes": ("bf16",)}, "has no fp32"),
        ({"devices": ("cuda",)}, "does not run on cpu"),
        ({"supports": lambda problem: f"no head of {problem.head_dim}"}, "no head of 16"),
        ({"supports_on_cpu": lambda problem: "minutes"}, "minutes"),
        ({"supports_on_cpu": lambda problem: "minutes", "requires": ("no_such",)}, "no_such is not installed"),
        ({}, None),
    ],
)
def test_what_cannot_run_is_a_reason_and_not_a_crash(change, reason):
    entry = replace(Implementation("some.thing", "torch", PAGES), **change)
    assert entry.unsupported(PROBLEM, "cpu") == reason


def test_limits_on_a_cpu_are_none_on_a_gpu():
    entry = Implementation("some.thing", "torch", PAGES, supports_on_cpu=lambda problem: "minutes")
    assert entry.unsupported(PROBLEM, "cuda") is None


def test_tf32_does_not_run_on_a_cpu():
    entry = Implementation("some.thing", "torch", PAGES)
    assert (
        entry.unsupported(replace(PROBLEM, matmul_precision="tf32"), "cpu") == "tf32 is a mode of NVIDIA tensor cores"
    )
    assert entry.unsupported(replace(PROBLEM, matmul_precision="tf32"), "cuda") is None


def test_page_of_a_problem_has_forward_and_backward():
    for inner_model in ("linear", "mlp"):
        page = implementations()["torch.eager"].page(replace(PROBLEM, inner_model=inner_model))
        assert page.__name__ == f"implementations.torch.ttt_{inner_model}"
        assert callable(page.forward) and callable(page.backward)


def test_third_party_entry_point_shows_up_after_ours(install):
    source = """
        from implementations.registry import Implementation
        ENTRIES = [Implementation(f"ours.{name}", "torch", {"linear": "third_party"}) for name in ("fast", "slow")]
    """
    install("third_party", "\n".join(line.strip() for line in source.splitlines()), "ours = third_party:ENTRIES")
    assert list(implementations())[-2:] == ["ours.fast", "ours.slow"]
    assert [entry.key for entry in select(["ours"])] == ["ours.fast", "ours.slow"]
    assert implementations()["ours.fast"].unsupported(PROBLEM, "cpu") is None


@pytest.mark.parametrize(
    "source, why",
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("ENTRY = ['text']", "TypeError: broken_party:ENTRY is not an Implementation"),
        ("ENTRY = 3", "TypeError: 'int' object is not iterable"),
        ("", "AttributeError: module 'broken_party' has no attribute 'ENTRY'"),
    ],
)
def test_broken_third_party_becomes_a_reason(install, monkeypatch, source, why):
    monkeypatch.delitem(sys.modules, "broken_party", raising=False)
    install("broken_party", source, "broken.entry = broken_party:ENTRY")
    entry = implementations()["broken.entry"]
    for inner_model in ("linear", "mlp"):
        reason = entry.unsupported(replace(PROBLEM, inner_model=inner_model), "cpu")
        assert reason == f"entry point broken_party:ENTRY failed: {why}"
    with pytest.raises(ValueError, match=f"^unknown implementation 'broken.fast'.*; {re.escape(reason)}$"):
        select(["broken.fast"])


def test_duplicate_key_raises(install):
    source = "from implementations.registry import Implementation\nENTRY = Implementation('torch.eager', 'torch', {})"
    install("twin_party", source, "twin = twin_party:ENTRY")
    with pytest.raises(ValueError, match=r"^implementation 'torch.eager' is registered twice$"):
        implementations()


def fresh_hash(entry: Implementation) -> str:
    """As a new process would find it."""
    registry._hash_of_pages.cache_clear()
    return entry.source_hash()


def test_source_hash_changes_with_what_a_page_is_made_of_alone(tmp_path, monkeypatch):
    package = tmp_path / "hashed_party"
    (package / "csrc").mkdir(parents=True)
    for name in ("__init__.py", "deep.py", "near.py", "other_variant.py", "csrc/kernel.cu"):
        (package / name).write_text("")
    (package / "page.py").write_text("import sys\nfrom hashed_party import near\n")
    (package / "near.py").write_text("from . import deep\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = Implementation("hashed.party", "torch", {"linear": "hashed_party.page"})
    hashes = [fresh_hash(entry)]
    assert fresh_hash(entry) == hashes[0] and len(hashes[0]) == 12
    (package / "other_variant.py").write_text("# changed")
    assert fresh_hash(entry) == hashes[0]
    for name in ("deep.py", "near.py", "csrc/kernel.cu", "page.py"):
        (package / name).write_text("# changed")
        hashes.append(fresh_hash(entry))
    assert len(set(hashes)) == len(hashes)


def test_source_hash_of_a_script_is_that_of_its_file(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    entry = Implementation("a.script", "torch", {"linear": "__main__"})
    hashes = [fresh_hash(entry)]  # a notebook's: there is no file
    main.__file__ = str(path)
    for source in ("", "# changed"):
        path.write_text(source)
        hashes.append(fresh_hash(entry))
    assert len(set(hashes)) == 3


def test_source_hash_of_what_is_not_there_is_no_crash():
    assert Implementation("some.thing", "torch", {"linear": "no_such_package.page"}).source_hash()


def test_a_simulator_is_not_timed_and_what_is_unsupported_says_that_first():
    entry = Implementation("a.b", "torch", PAGES, timed_on=("cuda",))
    assert entry.untimed(PROBLEM, "cuda") is None and entry.unsupported(PROBLEM, "cpu") is None
    assert entry.untimed(PROBLEM, "cpu") == "runs on a cpu in a simulator, which is not timed"
    assert replace(entry, requires=("no_such_package",)).untimed(PROBLEM, "cpu") == "no_such_package is not installed"


def test_an_entry_reaches_another_process_by_key_or_by_value():
    unregistered = Implementation("a.b", "torch", PAGES, timed_on=("cuda",))
    for entry in (*implementations().values(), unregistered):
        assert pickle.loads(pickle.dumps(entry)) == entry
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(replace(unregistered, supports=lambda problem: None))
