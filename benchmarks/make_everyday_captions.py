"""Write the captions of everyday English that `overpaint.probes.everyday` reads, from WordNet and the caption grammar.

    python benchmarks/make_everyday_captions.py

The lists that ship were written by commit fe9ae3f; other held-out words in the grammar give other captions.

Needs npm and pip for the packages of `overpaint.train.language`; they go to `runs/packages`.
"""

from pathlib import Path

import overpaint.probes
from overpaint import files
from overpaint.train import language


def main() -> None:
    """Write both lists."""
    packages = Path("runs/packages")
    language.fetch(packages)
    lists = language.everyday_captions(packages, 5000)
    folder = Path(overpaint.probes.__file__).parent
    for part, lines in zip(("validation", "test"), lists, strict=True):
        with files.atomic(folder / f"everyday-{part}.txt") as draft:
            draft.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
