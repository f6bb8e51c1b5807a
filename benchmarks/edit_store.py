"""Results of `quality_edit`, kept between runs as long as weights, prompts, settings and code stay the same."""

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import overpaint
from overpaint import files

__all__ = ["ATTACKING", "MEASURING", "Store", "code_of", "digest", "text_of"]

_PACKAGE = Path(overpaint.__file__).parent
_HERE = Path(__file__).parent
MEASURING = tuple(_HERE / f"edit_{name}.py" for name in ("concepts", "measure", "prompts"))
"""Modules that decide what is drawn and read of an edit."""
ATTACKING = (
    _HERE / "edit_attack.py",
    *(_PACKAGE / "evaluate" / name for name in ("attack.py", "rewordings.py", "soft_token.py", "translations.tsv")),
)  # fmt: skip
"""Modules of the attacks, and the translations that these try."""


class Store:
    """JSON files by name, in one folder.

    Args:
        folder: Created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the stored value of `key`; if there is none, make it and store it."""
        path = self.path(key)
        if path.exists():
            return files.from_json(path.read_bytes())["value"]
        value = make()
        files.write_json(path, {"key": dict(key), "value": value}, indent=None)
        return files.from_json(path.read_bytes())[
            "value"
        ]  # as a stopped and continued run reads it

    def has(self, key: Mapping[str, Any]) -> bool:
        """Return whether the value of `key` is stored."""
        return self.path(key).exists()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return the file of `key`."""
        return self.folder / f"{digest(key)}.json"


def digest(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(files.to_json(value).encode()).hexdigest()[:16]


@functools.cache
def text_of(paths: tuple[Path, ...]) -> str:
    """Return a short hash of the contents of files."""
    return digest([path.read_text("utf-8") for path in paths])


@functools.cache
def code_of(function: Callable[..., Any]) -> str:
    """Return a short hash of the source of `function` and of the modules of `overpaint.edit` that it comes from.

    Functions `op.edit.NAME` that it names are followed, and what their modules import from `overpaint.edit`.
    """
    source = inspect.getsource(function)
    names = [
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "op.edit"
    ]
    methods = [getattr(overpaint.edit, name, None) for name in names]
    paths: set[Path] = set()
    for method in methods:
        if method is not None:
            _follow(Path(inspect.getfile(method)), paths)
    texts = [path.read_text("utf-8") for path in sorted(paths)]
    return digest([source, *texts])


def _follow(path: Path, paths: set[Path]) -> None:
    if path in paths:
        return
    paths.add(path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("overpaint.edit"):
            place = _PACKAGE.parent.joinpath(*str(node.module).split("."))
            for candidate in (place, *(place / alias.name for alias in node.names)):
                if (file := candidate.with_suffix(".py")).is_file():
                    _follow(file, paths)
