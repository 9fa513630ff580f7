"""The methods that may stand in a BIT's place, by name. Light to import.

They are the files of ``methods/predictors``, and of ``methods/`` in the folder that ``BRAIN_IT_EXTENSIONS`` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import methods as own_methods
from benchmark.errors import UserError
from metrics.added import VARIABLE

if TYPE_CHECKING:
    from methods.predictors import Method

PACKAGE = "methods.predictors"

RESERVED = ("bit", "oracle")
"""What predicts tokens, too, and is no method of that folder: a BIT, and the knowledge of the true ones."""
_OTHERS = " and ".join(RESERVED)

# What else is set beside a method's own settings where its stage keeps them.
_TAKEN = {"predictor", "batch", "seed", "external_fraction", "external_used", "scale", "training"}
_TAKEN |= {"width", "input_size", "layers", "windows", "sampled", "standardise", "centre"}


def folders() -> list[str]:
    """Return where the files lie, the project's own folder first."""
    own = [str(Path(str(own_methods.__file__)).parent / "predictors")]
    return own + ([os.path.abspath(os.path.join(folder, "methods"))] if (folder := os.environ.get(VARIABLE)) else [])


def names() -> list[str]:
    """Return the names of all methods, sorted; reads none of their files, and imports nothing for them."""
    # Folder by folder: of two files with one name iter_modules would tell the first only.
    return sorted(module.name for folder in folders() for module in pkgutil.iter_modules([folder]))


@cache
def methods() -> Mapping[str, type[Method]]:
    """Return name -> class of every method; read once a process, and not to be changed.

    Raises:
        UserError: a file cannot be read, or is not what it should be.
    """
    if (folder := os.environ.get(VARIABLE)) and not os.path.isdir(folder):
        raise UserError(f"{VARIABLE} is {folder}: no such folder; make it, or unset {VARIABLE}")
    found: dict[str, type[Method]] = {}
    for name in names():
        if name in found or name in RESERVED or not name.isidentifier():
            why = "two files define it" if name in found else "expected letters, digits and _, and none of " + _OTHERS
            raise UserError(f"{name}.py in {' or '.join(folders())}: no method can be called that: {why}")
        found[name] = _read(name)
    return MappingProxyType(found)


def method_name(predictor: str) -> str:
    """Return the name of the method that a value of ``predictor`` means: ``mlp`` of ``mlp-infonce``."""
    return predictor.partition("-")[0]


def method_of(config: Mapping[str, Any]) -> Method:
    """Return the method that a stage's configuration names, with its settings.

    Raises:
        UserError: its file is not there.
    """
    name = method_name(config["predictor"])
    if name not in methods():
        raise UserError(f"no method '{name}' in {' or '.join(folders())}; put {name}.py back, with which this was made")
    method = methods()[name]
    return method(**{field: config[field] for field in method.model_fields if field in config})


def _read(name: str) -> type[Method]:
    """Return the class that a file defines."""
    qualified = f"{PACKAGE}.{name}"
    package = importlib.import_module(PACKAGE)
    package.__path__ = folders()
    spec = importlib.util.find_spec(qualified)
    where = spec.origin if spec is not None else qualified
    try:
        module = importlib.import_module(qualified)
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        place = f"{where}, line {line}" if line else where
        raise UserError(f"{place}: the method cannot be read: {type(error).__name__}: {_first(error)}") from error
    found = _classes(module)
    if len(found) != 1:
        raise UserError(
            f"{where}: defines {len(found)} methods; expected one class, a Predictor or a Network of methods.predictors"
        )
    (method,) = found
    if not isinstance(getattr(method, "title", None), str):
        raise UserError(f'{where}: {method.__name__} has no title; add: title: ClassVar[str] = "..."')
    if taken := sorted(_TAKEN & set(method.model_fields)):
        raise UserError(f"{where}: a setting cannot be called {taken[0]}, which the branch has; choose another name")
    if needed := [field for field, about in method.model_fields.items() if about.is_required()]:
        raise UserError(f"{where}: setting {needed[0]} has no default; every setting needs one")
    return method


def _classes(module: ModuleType) -> list[type[Method]]:
    from methods.predictors import Method

    own = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)
    return [value for value in own if issubclass(value, Method)]


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
