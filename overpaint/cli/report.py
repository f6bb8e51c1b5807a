"""`overpaint report`: draw the page of saved results."""

from pathlib import Path
from typing import Annotated

import typer

from overpaint.cli.options import Json, as_path
from overpaint.cli.terminal import check_writable, print_facts

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of saved results.", parser=as_path)],
    card: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an edited model, whose model card gets the figures too.", parser=as_path
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the page of saved results. report.json beside report.html holds the same figures.

    \b
    overpaint report runs/demo
    overpaint report runs/demo --card runs/edited
    """  # noqa: D301
    from overpaint import report as pages

    check_writable(folder, make=False)
    # the card first: it is refused more often, and then no page is written
    cards = {} if card is None else {"card": str(pages.save_card(folder, card))}
    print_facts({"report": str(pages.save(folder)), **cards}, as_json=as_json)
