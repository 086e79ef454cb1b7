"""spec <- implementations <- harness, and nothing that only one machine has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_NOT_IMPORT = {"spec": {"implementations", "harness"}, "implementations": {"harness"}}
MACHINE_PATH = re.compile(rb"(?<![\w.-])/(?:home|root|Users|work)/")


def imported_packages(source: str) -> set[str]:
    """Top-level names of every absolute import in `source`, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_no_import_points_back(package):
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported_packages(path.read_text(encoding="utf-8")) & MAY_NOT_IMPORT[package]
    }
    assert not wrong


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h as i\n"
    assert imported_packages(source) == {"a", "c", "h"}


def test_the_registry_imports_no_framework():
    code = (
        "import sys; from implementations.registry import implementations; found = implementations(); "
        "print(len(found), *sorted({'torch', 'jax', 'triton', 'cupy', 'numba'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    count, *frameworks = run.stdout.split()
    assert int(count) > 0
    assert not frameworks


def test_every_implementation_folder_is_a_package():
    folders = {path.parent for path in (ROOT / "implementations").rglob("*.py")}
    assert ROOT / "implementations" in folders
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").is_file()}


def test_no_file_names_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    assert names
    assert not [name for name in names if MACHINE_PATH.search((ROOT / name).read_bytes())]


@pytest.mark.parametrize("top", ["home", "root", "Users", "work"])
def test_a_machine_path_is_recognised(top):
    assert MACHINE_PATH.search(f"/{top}/x".encode())
    assert MACHINE_PATH.search(f'open("/{top}/ada/x")'.encode())


@pytest.mark.parametrize(
    "text", [b"https://example.org/%b/ada" % b"home", b"frame/%b/x" % b"work", b"homework", b"a / work / b"]
)
def test_other_text_is_no_machine_path(text):
    assert not MACHINE_PATH.search(text)
