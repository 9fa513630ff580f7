"""The methods that may stand in a BIT's place: found by their files, checked, with settings of their own."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmark import predictors
from benchmark.config import LowLevelConfig, SemanticConfig, demo, paper
from benchmark.errors import UserError
from benchmark.stages import variant_stages
from methods.predictors import Network

ROOT = Path(__file__).parents[2]
HEAD = """
from typing import ClassVar
from methods.predictors import Network, Predictor
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Put a file beside the methods: (name, what follows HEAD)."""
    folders = [*predictors.folders(), str(tmp_path)]
    monkeypatch.setattr(predictors, "folders", lambda: folders)
    known = set(sys.modules)

    def forget() -> None:
        predictors.methods.cache_clear()
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.startswith("methods.predictors.") and name not in known]:
            del sys.modules[name]

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD + textwrap.dedent(text) + "\n")
        forget()
        return path

    yield write
    forget()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a", "x = 1", "a.py: defines 0 methods; expected one class, a Predictor or a Network"),
        ("a", "class A(Predictor):\n    title = 'A'\nclass B(Predictor):\n    title = 'B'", "defines 2 methods"),
        ("a", "class A(Predictor):\n    k: int = 1", "A has no title; add: title: ClassVar[str]"),
        ("a", "1 / 0", "a.py: the method cannot be read: ZeroDivisionError: division by zero"),
        ("a", "def f(:", "a.py, line 4: the method cannot be read: SyntaxError"),
        ("a", "class A(Predictor):\n    title: ClassVar[str] = 'A'\n    batch: int = 3", "cannot be called batch"),
        ("a", "class A(Predictor):\n    title: ClassVar[str] = 'A'\n    k: int", "setting k has no default"),
        ("bit", "", "bit.py in "),
        ("ridge", "", "no method can be called that: two files define it"),
        ("my-own", "", "expected letters, digits and _"),
    ],
)
def test_a_wrong_file_is_named(add: Callable[..., Path], name: str, text: str, message: str) -> None:
    add(name, text)
    with pytest.raises(UserError) as caught:
        predictors.methods()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_predictor_gets_the_nearest() -> None:
    known = "bit, mlp-infonce, mlp-mse, ridge, oracle"
    assert ", ".join(LowLevelConfig.predictors()) == known
    assert SemanticConfig.predictors() == ("bit", "mlp", "ridge", "oracle")
    for setting, wrong, message in (
        ("lowlevel.predictor", "rigde", rf"no predictor 'rigde' \(did you mean 'ridge'\?\); there are {known}"),
        ("semantic.predictor", "mlp-mse", r"no predictor 'mlp-mse' \(did you mean 'mlp'\?\)"),
        ("semantic.mpl.hidden", 8, r"unknown setting 'semantic.mpl.hidden' \(did you mean 'mlp'\?\)"),
        ("semantic.mlp.hiden", 8, r"unknown setting 'semantic.mlp.hiden' \(did you mean 'hidden'\?\)"),
        ("semantic.mlp.hidden", 0, r"setting semantic.mlp.hidden: Input should be greater than 0 \(given 0\)"),
    ):
        with pytest.raises(UserError, match=message):
            demo().with_settings({setting: wrong})


def test_defaults_are_those_of_the_branch_and_the_preset() -> None:
    both = {"lowlevel.predictor": "mlp-mse", "semantic.predictor": "mlp"}
    found = [preset().with_settings(both) for preset in (paper, demo)]
    hidden = [(v.lowlevel.method.model_dump()["hidden"], v.semantic.method.model_dump()["hidden"]) for v in found]  # type: ignore[union-attr]
    assert hidden == [(512, 4096), (256, 256)]


def test_what_a_stage_is_told_of_a_method_is_its_settings(add: Callable[..., Path]) -> None:
    """Of others nothing: another file beside it changes no fingerprint."""
    before = variant_stages(demo().with_settings({"semantic.predictor": "ridge"}), "x")
    script = """
        import sys
        from benchmark import predictors
        folders = [*predictors.folders(), sys.argv[1]]
        predictors.folders = lambda: folders
        from benchmark.config import demo
        from benchmark.stages import variant_stages
        print(variant_stages(demo().with_settings({"semantic.predictor": "ridge"}), "x").score.fingerprint)
        print(variant_stages(demo(), "x").score.fingerprint)
        own = {"semantic.predictor": "own", "lowlevel.predictor": "net-infonce", "semantic.own.k": 7}
        stages = variant_stages(demo().with_settings({**own, "lowlevel.net.lr": 0.5}), "x")
        print(stages.semantic.config, stages.semantic.code_version, sorted(stages.semantic.upstream))
        low = stages.lowlevel
        print(low.config["n"], low.config["scale"], low.config["training"]["optimiser"]["lr"], sorted(low.upstream))
        print("torch" in sys.modules)
    """
    path = add(
        "own", "class A(Predictor):\n    title: ClassVar[str] = 'A'\n    version: ClassVar[int] = 4\n    k: int = 1"
    )
    add("net", "class N(Network):\n    title: ClassVar[str] = 'N'\n    n: int = 2")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path.parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        before.score.fingerprint,
        variant_stages(demo(), "x").score.fingerprint,
        "{'batch': 32, 'k': 7, 'predictor': 'own', 'seed': 0} 4 ['data', 'targets']",
        "2 1.0 0.5 ['data', 'encoder', 'external', 'targets']",
        "False",
    ]


def test_a_network_is_called_as_a_bit_is() -> None:
    method = predictors.methods()["mlp"](hidden=8, blocks=1)
    assert isinstance(method, Network)
    model = method.build([5, 7], 3, 4).eval()
    betas, subject = torch.randn(2, 7), torch.tensor([1, 0])
    assert model(betas, subject).shape == (2, 3, 4)
    queries = torch.tensor([[2], [0]])
    torch.testing.assert_close(model(betas, subject, queries=queries)[0, 0], model(betas, subject)[0, 2])


def test_a_method_whose_file_is_gone_is_named() -> None:
    with pytest.raises(UserError, match=r"no method 'lost' in .*; put lost.py back, with which this was made"):
        predictors.method_of({"predictor": "lost"})


def test_a_folder_that_is_not_there_is_named(add: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(predictors.VARIABLE, "/no/such")
    predictors.methods.cache_clear()
    with pytest.raises(UserError, match="BRAIN_IT_EXTENSIONS is /no/such: no such folder"):
        predictors.methods()
