"""Selection of the states to trace: sites or groups of sites, single heads, token roles and windows of steps."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overpaint.model import sites
from overpaint.model.sites import KINDS, Kind, Site
from overpaint.trace.states import ROLES, WINDOWS

__all__ = ["TextStates", "UNetStates", "head_numbers", "named_sites", "selected", "site_columns"]


@dataclass(frozen=True)
class TextStates:
    """States of the text encoder that `trace.text_encoder` traces: all of them by default.

    Attributes:
        positions: Token roles to copy at: `subject` (all of the concept's tokens but the last), `last_subject`,
            `after` (the next token, if the prompt goes on), `eos`, `pad`.
        heads: Also trace each head of the attention sublayers, besides whole sublayers.
        groups: Groups of sites to restore together, by a name of your choice, instead of single sites.
        only: (site, role) of the states to trace; all if `None`.
    """

    positions: Sequence[str] = ROLES
    heads: bool = False
    groups: Mapping[str, Sequence[Site]] | None = None
    only: Collection[tuple[str, str]] | None = None


@dataclass(frozen=True)
class UNetStates:
    """States of the UNet that `trace.unet` traces: all sites at every step by default.

    Attributes:
        kinds: Kinds of site.
        heads: Also trace each head of the attention sites, besides whole sites.
        windows: Windows of steps to copy in, each traced separately: `""` is every step; `"early"`, `"middle"` and
            `"late"` are a third of the steps each.
        groups: Groups of sites to restore together, by a name of your choice, instead of single sites.
        only: Names of the sites to trace; all of `kinds` if `None`.

    Raises:
        ValueError: No such kind or window.
    """

    kinds: Sequence[Kind] = KINDS
    heads: bool = False
    windows: Sequence[str] = ("",)
    groups: Mapping[str, Sequence[Site]] | None = None
    only: Collection[str] | None = None

    def __post_init__(self) -> None:
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ValueError(f"`kinds` must be among {', '.join(KINDS)}, got {list(self.kinds)!r}.")
        if not self.windows or any(window not in WINDOWS for window in self.windows):
            raise ValueError(
                f"`windows` must be among {', '.join(map(repr, WINDOWS))}, got {list(self.windows)!r}."
            )


def named_sites(
    traced: Sequence[Site], groups: Mapping[str, Sequence[Site]] | None
) -> list[tuple[str, tuple[Site, ...]]]:
    """Return each site under its own name or, if there are any, the groups.

    Args:
        traced: The sites of the part that is traced.
        groups: Groups of sites by their names.

    Raises:
        ValueError: A group is empty, or holds a site of another part of the model.
    """
    if groups is None:
        return [(site.name, (site,)) for site in traced]
    parts = {site.part for site in traced}
    for name, members in groups.items():
        if not members:
            raise ValueError(
                f"the group {name!r} is empty: name at least one site, for example with `overpaint.model.sites.find`."
            )
        for site in members:
            if site.part not in parts:
                raise ValueError(
                    f"the group {name!r} holds {site.name}, which is not a site of the part that is traced "
                    f"({', '.join(sorted(parts))}): trace it with `trace.unet` or `trace.text_encoder`, whichever it "
                    "belongs to."
                )
    return [(name, tuple(members)) for name, members in groups.items()]


def selected(
    states: Sequence[Any], only: Collection[Any] | None, key: Callable[[Any], Any]
) -> list[Any]:
    """Return the states whose key is in `only`, or all of them.

    Raises:
        ValueError: None is left.
    """
    chosen = [state for state in states if only is None or key(state) in only]
    if not chosen:
        raise ValueError(
            "no states are selected, so there is nothing to trace: name kinds, positions or sites that this model has; "
            "`overpaint sites` lists them."
        )
    return chosen


def head_numbers(model: Any, members: Sequence[Site], heads: bool) -> list[int | None]:
    """Return `None` for the whole site, then with `heads` the number of each head; a group has no heads."""
    if not heads or len(members) != 1:
        return [None]
    return [None, *range(sites.heads(model, members[0]))]


def site_columns(name: str, members: Sequence[Site]) -> dict[str, Any]:
    """Return the columns of the table that identify a site, or a group of sites under a name."""
    site, single = members[0], len(members) == 1
    return {
        "site": name, "part": site.part, "kind": site.kind if single else "group", "index": site.index,
        "path": site.path if single else "",
    }  # fmt: skip
