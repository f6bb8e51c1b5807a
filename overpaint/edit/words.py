"""The words whose rows of the token embedding a change moves, read off its report: for those who tell of a change."""

from collections.abc import Mapping
from typing import Any

__all__ = ["moved"]


def moved(report: Mapping[str, Any]) -> list[str]:
    """Return the words that a change's report says move, in its order.

    Args:
        report: Of a change. Its `tokens` are lists of tokens by concept, as the tokenizer spells them; what a file has
            there instead, as the mere count that other methods report, is passed over.
    """
    told = report.get("tokens")
    rows = told.values() if isinstance(told, Mapping) else ()
    names = [name for row in rows if isinstance(row, list) for name in row]
    return [name.removesuffix("</w>") for name in names if isinstance(name, str)]
