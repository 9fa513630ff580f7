"""The project as a whole: packaging, the lock, the rules of imports, and the commands that its pages promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("benchmark", "leaderboard", "methods", "metrics")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIGHT = ("benchmark.cli", "benchmark.config", "benchmark.data.settings", "benchmark.errors", "benchmark.execute")
LIGHT += ("benchmark.graph", "benchmark.launch", "benchmark.store", "benchmark.sweep", "benchmark.sweeps")
LIGHT += ("leaderboard", "leaderboard.publish", "leaderboard.site", "leaderboard.table", "metrics.cards")
HEAVY = ("accelerate", "diffusers", "skimage", "sklearn", "timm", "torch", "torchvision", "wandb")


def locked() -> dict[str, tuple[Requirement, list[str]]]:
    """Package name -> what the lock asks for, and its hashes."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if line:
            words, *hashes = re.split(r"\s+--hash=", line)
            requirement = Requirement(words)
            found[canonicalize_name(requirement.name)] = requirement, hashes
    return found


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in modules()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_lock_pins_everything_with_hashes() -> None:
    for name, (requirement, hashes) in locked().items():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version, name
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), name


def test_lock_names_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^\s*-|@|[\s=]/\w", re.sub(r"--hash=\S+", "", text), re.MULTILINE)


def test_lock_satisfies_the_project() -> None:
    lock = locked()
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        pin, _ = lock[canonicalize_name(requirement.name)]
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version, prereleases=True), requirement


def test_installed_packages_are_the_locked_ones() -> None:
    wrong = {}
    for name, (requirement, _) in locked().items():
        (pin,) = requirement.specifier
        if (requirement.marker is None or requirement.marker.evaluate()) and version(name) != pin.version:
            wrong[name] = (version(name), pin.version)
    assert not wrong, "type: make install"


def test_versions_agree() -> None:
    number = PROJECT["project"]["version"]
    assert version(PROJECT["project"]["name"]) == number
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == number
    assert f"## [{number}]" in (ROOT / "CHANGELOG.md").read_text()


def test_data_beside_the_code_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [path for package in (*PACKAGES, "sweeps") for path in (ROOT / package).rglob("*") if path.is_file()]
    data = [path for path in files if path.suffix not in (".py", ".pyc", ".tmp") and "__pycache__" not in path.parts]
    assert [path for path in data if not any(fnmatch(path.name, pattern) for pattern in patterns)] == []
    names = {str(path.relative_to(ROOT)) for path in data}
    assert {"leaderboard/page.css", "leaderboard/page.js", "sweeps/clusters.yaml"} <= names
    assert {f"benchmark/demo_generator/{part}.safetensors" for part in ("tokens", "unet", "vae")} <= names
    weights = [path for path in data if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) < 20e6


def test_contracts_cover_every_package() -> None:
    linter = PROJECT["tool"]["importlinter"]
    assert sorted(linter["root_packages"]) == sorted(PACKAGES)
    contracts = {contract["id"]: contract for contract in linter["contracts"]}
    assert contracts["one-way"]["layers"] == ["benchmark", "leaderboard", "methods | metrics"]
    assert {"leaderboard-cards", "light"} <= contracts.keys()


def test_light_modules_load_no_heavy_library() -> None:
    """What import-linter cannot see: it counts the imports inside functions, which these modules may have."""
    code = f"import sys, {', '.join(LIGHT)}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_pages_name_existing_targets(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / page).read_text()
    code = "\n".join(re.findall(r"`[^`]+`", text) + re.findall(r"^ {4}.*$", text, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert named <= targets
    if page == "README.md":
        assert {"demo", "test"} <= named


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.socket().connect_ex(('192.0.2.1', 80))",
        "urllib.request.urlopen('http://example.org')",
    ],
)
def test_tests_stay_offline(attempt: str, tmp_path: Path) -> None:
    """A test that reaches out fails, even where the code under test survives being offline."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_reaches_out.py").write_text(
        "import contextlib, socket, urllib.request\n"
        f"def test_it():\n    with contextlib.suppress(OSError):\n        {attempt}\n"
        "def test_local():\n    with socket.create_server(('127.0.0.1', 0)) as server:\n"
        "        socket.create_connection(server.getsockname()).close()\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "tests are offline" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
