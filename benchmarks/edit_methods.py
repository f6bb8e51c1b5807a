"""The methods of `quality_edit`, and the settings of each that are tried on validation concepts.

`METHODS` is the one table of them. Every method that takes a preserve list gets the same one. A method whose keys are
last tokens gets the bare word of a style or a color ("openmoji", not "openmoji style"), since every style ends in the
same word; the others are tried with both. A method that refuses a pair counts as no edit for it.

One rule for the grids: every method with a number to choose has 6 to 15 settings, with at least three values of each
pull (ridge, weight, rate) in steps of a factor of 3 to 10 around the usual one, which stands first; whole and bare
words come on top. A chosen number at the edge of its grid is reported (`edit_tune.edges`), so that the grid can be
widened. A method without numbers has as many settings as it has forms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import overpaint as op
from overpaint.edit import Change

__all__ = ["METHODS", "OURS", "PLAIN", "TOKEN_ROWS", "Given", "Method", "settings_text"]

OURS, PLAIN, TOKEN_ROWS = "auto", "no edit", "token rows"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What a method is given beside the pairs, spelled as its settings say.

    Attributes:
        model: The model.
        pairs: Old concept to new.
        preserve: The preserve list.
        without: Objects of the evaluated prompts, whose names `auto` does not put into captions.
        layers: Cross-attention layers that `trace.prompt_swap` found on a validation concept of the kind.
    """

    model: op.TextToImage
    pairs: Mapping[str, str]
    preserve: Sequence[str] = ()
    without: Sequence[str] = ()
    layers: Sequence[int] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the contest.

    Attributes:
        role: `"ours"`, `"rival"` or `"control"`, which costs nothing.
        make: Returns the change for what is given and keyword arguments; `None` for a row without a change.
        grid: Keyword arguments that are tried on validation concepts; the first are those of a quick run.
        subject: `"whole"`, `"bare"`, or `"either"` to try the best settings with the bare words too.
        many: Whether it is run with several concepts at once.
        attacked: Whether attacks are run.
        rewrites: Whether the words are replaced in the prompt, not in the model.
        local: Whether pictures of prompts without the concept stay as they are.
    """

    role: str
    make: Callable[..., Change | None]
    grid: Sequence[Settings] = field(default_factory=lambda: [{}])
    subject: str = "either"
    many: bool = False
    attacked: bool = False
    rewrites: bool = False
    local: bool = False


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as a short text."""
    parts = [f"{k.replace('_', ' ')} {_value(v)}" for k, v in settings.items() if k != "subject"]
    if settings.get("subject") == "bare":
        parts.append("bare words")
    return ", ".join(parts) or "defaults"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    if value is None:
        return "all"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def _grid(**values: Sequence[Any]) -> list[Settings]:
    return [dict(zip(values, row, strict=True)) for row in product(*values.values())]


def _nothing(given: Given) -> None:
    """Return no change."""


def _auto(given: Given, **settings: Any) -> Change:
    return op.edit.auto(
        given.model, given.pairs, vocabulary=given.preserve, without=given.without,
        collateral=False, **settings,
    )  # fmt: skip


def _quickfix(given: Given, **settings: Any) -> Change:
    return op.edit.quickfix(given.model, given.pairs, **settings)


def _quickfix_list(given: Given, **settings: Any) -> Change:
    return op.edit.quickfix(given.model, given.pairs, preserve=given.preserve, **settings)


def _quickfix_last(given: Given, **settings: Any) -> Change:
    return op.edit.quickfix(given.model, given.pairs, positions="last_subject", **settings)


def _random_site(given: Given, **settings: Any) -> Change:
    return op.edit.random_site(given.model, given.pairs, preserve=given.preserve, **settings)


def _uce(given: Given, **settings: Any) -> Change:
    return op.edit.uce(given.model, given.pairs, preserve=given.preserve, keys="last", **settings)


def _uce_pads(given: Given, **settings: Any) -> Change:
    return op.edit.uce(
        given.model, given.pairs, preserve=given.preserve, keys="last_to_pads", **settings
    )


def _time(given: Given, **settings: Any) -> Change:
    return op.edit.time(given.model, given.pairs, **settings)


def _loco(given: Given, **settings: Any) -> Change:
    return op.edit.loco(given.model, given.pairs, layers=given.layers, **settings)


def _finetune(given: Given, **settings: Any) -> Change:
    return op.edit.finetune(
        given.model, given.pairs, preserve=given.preserve, pictures=1, picture_steps=4, **settings
    )


def _oce(given: Given, **settings: Any) -> Change:
    captions = op.probes.everyday("validation")[::10]  # 500: reading takes most of the time
    return op.edit.oce(
        given.model, given.pairs, preserve=given.preserve, captions=captions, **settings
    )


def _dp(given: Given, **settings: Any) -> Change:
    return op.edit.dp(given.model, given.pairs, preserve=given.preserve, **settings)


def _speed(given: Given, **settings: Any) -> Change:
    return op.edit.speed(given.model, given.pairs, preserve=given.preserve, **settings)


def _hirm(given: Given, **settings: Any) -> Change:
    return op.edit.hirm(given.model, given.pairs, **settings)


def _rename(given: Given, **settings: Any) -> Change:
    return op.edit.rename(given.model, given.pairs, collateral=False, **settings)


KEYS = ("last", "last_to_pads")  # the concept's last token alone, or all from it to the last pad
_RIDGES = (0.01, 0.001, 0.1, 1.0, 10.0, 100.0)
_LIST = _grid(ridge=(0.01, 1.0, 10.0), preserve_weight=(0.1, 0.01, 0.001, 0.0001))
_UCE = _grid(ridge=(0.5, 0.05, 0.005, 5.0, 50.0), preserve_weight=(1.0, 0.1, 0.01))
_OCE = [
    # With a long preserve list the subspace form moves nothing below a weight of about 100.
    *_grid(keys=KEYS[:1], erase_weight=(100.0, 1e3, 1e4), preserve_weight=(1.0, 0.01, 10.0)),
    # Pads span all outputs, so that no subspace is left.
    *_grid(keys=KEYS, form=("vector",), erase_weight=(1.0, 10.0, 100.0)),
]
_DP = [
    *_grid(keys=KEYS[:1], rank=(None,), ridge=(1e-6, 1e-3, 0.1)),
    # Pads leave no room without a rank.
    *_grid(keys=KEYS[1:], rank=(64, 32, 128), ridge=(0.1, 1.0, 10.0, 100.0)),
]
METHODS: dict[str, Method] = {
    OURS: Method("ours", _auto, many=True, attacked=True),
    "auto, weight tuned": Method(
        "ours", _auto, [{}, *_grid(preserve_weight=(15.0, 1.5, 5.0, 50.0, 150.0))]
    ),
    "quickfix": Method("rival", _quickfix, _grid(ridge=_RIDGES), many=True, attacked=True),
    "quickfix, list": Method("rival", _quickfix_list, _LIST, many=True),
    "quickfix, last token": Method("rival", _quickfix_last, _grid(ridge=(*_RIDGES, 1e-4)), "bare"),
    "uce, last token": Method("rival", _uce, _UCE, "bare", many=True),
    "uce, to pads": Method("rival", _uce_pads, _UCE, "bare", many=True, attacked=True),
    "time": Method(
        "rival", _time, _grid(matrices=(("v",), ("k", "v")), ridge=(0.1, 0.01, 1.0, 10.0, 100.0))
    ),
    "loco": Method("rival", _loco, _grid(ridge=_RIDGES), "bare"),
    "finetune": Method("rival", _finetune, _grid(lr=(1e-3, 3e-4, 3e-3), steps=(60, 20)), "whole"),
    "oce": Method("rival", _oce, _OCE, "bare", many=True),
    "dp": Method("rival", _dp, _DP, "bare", many=True),
    "speed": Method(
        "rival", _speed, _grid(keys=KEYS, null_below=(0.1, 10.0, 100.0, 1000.0)), "bare", many=True
    ),
    "hirm": Method("rival", _hirm, _grid(towards=("replacement", "random"), lr=(5e-5, 3e-4, 2e-3))),
    "random site": Method("control", _random_site, _LIST),
    TOKEN_ROWS: Method(
        "control",
        _rename,
        _grid(any_token=(True, False)),
        "bare",
        many=True,
        attacked=True,
        local=True,
    ),
    "prompt filter": Method(
        "control", _nothing, subject="bare", many=True, rewrites=True, local=True
    ),
    PLAIN: Method("control", _nothing, subject="whole", many=True, local=True),
}
