"""Looks at the test concepts of `quality_edit`: each is written into the result file before the first picture is drawn.

A look is one run of a test list. It has a date, the digests of the list, of the weights and of all settings, the
commit, and whether it was forced with `--again`; when the run ends, its flat figures are added. A file keeps the looks
of all lists for ever. A run that was stopped and is started again with the same list, weights and settings goes on
with its look.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overpaint import files

__all__ = ["AlreadyRun", "begin", "finish", "read_looks"]

Look = dict[str, Any]
_SAME = ("list", "weights", "settings")


class AlreadyRun(ValueError):
    """The test list was run before."""


def read_looks(path: Path) -> list[Look]:
    """Return all looks that a result file holds, of any list and any weights; none if there is no file.

    A result of the benchmark before the contest has no looks.
    """
    if not path.is_file():
        return []
    return [dict(look) for look in files.from_json(path.read_bytes()).get("test", {}).get("looks", [])]  # fmt: skip


def begin(
    path: Path,
    *,
    concepts: Mapping[str, Mapping[str, str]],
    list_digest: str,
    weights: str,
    settings: str,
    commit: str,
    again: bool,
) -> list[Look]:
    """Write the look of a run that begins into the result file, and return all looks, this one last.

    Until `finish` the file has no figures and says that the run is unfinished. The unfinished look of the same list,
    weights and settings is continued: it counts once.

    Args:
        path: The result file; what it holds beside looks is replaced.
        concepts: The test list.
        list_digest: Digest of the list.
        weights: Digest of the model's weights.
        settings: Digest of everything else that the figures depend on.
        commit: The commit of the code.
        again: Run a list that was run before.

    Raises:
        AlreadyRun: The list was run before, on any weights, or with other settings without an end, and `again` is
            false.
    """
    looks = read_looks(path)
    now = {"list": list_digest, "weights": weights, "settings": settings}
    same = [look for look in looks if not _ended(look) and all(look.get(k) == now[k] for k in _SAME)]  # fmt: skip
    if same:
        look = same[-1]
        looks = [*(other for other in looks if other is not look), look]
    else:
        _refuse_second(looks, now, path, again)
        looks.append(
            {"date": _today(), **now, "commit": commit, "again": again, "unfinished": True}
        )
    content = {
        "unfinished": f"A run of the test concepts was begun on {looks[-1]['date']} and has not ended, so there are no "
                      "figures. The same command continues it.",
        "result": {}, "tables": {}, "test": {"concepts": concepts, "list": list_digest, "looks": looks},
    }  # fmt: skip
    files.write_json(path, content)
    return looks


def finish(path: Path, looks: Sequence[Look], content: Mapping[str, Any]) -> None:
    """Write the result of the last of `looks`, which is then finished and holds its flat figures.

    Args:
        path: The result file.
        looks: What `begin` returned.
        content: `result`, `tables` and whatever else the file shall hold; `test` gets the looks.
    """
    look = {k: v for k, v in looks[-1].items() if k != "unfinished"}
    look |= {"ended": _today(), "result": content["result"]}
    test = {**content["test"], "list": look["list"], "looks": [*looks[:-1], look]}
    files.write_json(path, {**content, "test": test})


def _ended(look: Mapping[str, Any]) -> bool:
    return not look.get("unfinished", False)


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _refuse_second(looks: Sequence[Look], now: Mapping[str, str], path: Path, again: bool) -> None:
    earlier = [look for look in looks if look["list"] == now["list"]]
    if not earlier or again:
        return
    last = earlier[-1]
    weights = "these" if last["weights"] == now["weights"] else "other"
    state = "a run" if _ended(last) else "an unfinished run with other settings or other code"
    raise AlreadyRun(
        f"{path.name} holds {state} of these test concepts on {weights} weights, of {last['date']}: a test is run "
        "once. Draw other concepts with another seed in edit_concepts.py, or pass --again, which is recorded."
    )
