"""Which fonts train `lettering`? Write `overpaint/train/lettering-fonts.tsv` from the archives in `runs/fonts`.

    npm pack --ignore-scripts @fontsource/lato@5.3.0 ...     # in runs/fonts
    python benchmarks/make_lettering_fonts.py

A family is taken if it has all printable ASCII characters and if its lower-case letters differ from its capitals.
Every eighth family of a category is held out, in the order of the SHA-256 of its name.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from overpaint.train.lettering_fonts import TABLE, extract

ILLEGIBLE = ("amatic-sc", "monoton", "rock-salt")  # in a line of 32 pixels, or capitals alone
STYLES = ("400-normal", "700-normal", "400-italic", "700-italic")


def has_all_characters(data: bytes) -> bool:
    """Return whether a font has a glyph for each printable ASCII character."""
    characters = TTFont(io.BytesIO(data)).getBestCmap()
    return all(code in characters for code in range(32, 127))


def has_lower_case(data: bytes) -> bool:
    """Return whether the lower-case letters, brought to the size of the capitals, look different from these."""
    font = ImageFont.truetype(io.BytesIO(data), 64)
    overlaps = []
    for letter in "adegr":
        pictures = []
        for text in (letter, letter.upper()):
            box = font.getbbox(text)
            canvas = Image.new("L", (int(box[2]) + 8, int(box[3]) + 8))
            ImageDraw.Draw(canvas).text((0, 0), text, fill=255, font=font)
            pictures.append(np.asarray(canvas.crop(canvas.getbbox()).resize((32, 32))) > 127)
        overlaps.append((pictures[0] & pictures[1]).sum() / (pictures[0] | pictures[1]).sum())
    return bool(np.mean(overlaps) < 0.75)


def row(archive: Path) -> dict[str, str] | None:
    """Return the columns of one archive; `None` if the family is not taken."""
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        metadata = json.load(tar.extractfile("package/metadata.json"))
    package = metadata["id"]
    styles = [s for s in STYLES if f"package/files/{package}-latin-{s}.woff" in names]
    if "400-normal" not in styles or package in ILLEGIBLE:
        return None
    data = extract(archive, package, ["400-normal"])["400-normal"]
    if not has_all_characters(data) or not has_lower_case(data):
        return None
    return {
        "package": package,
        "version": archive.name.removesuffix(".tgz").rpartition("-")[2],
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "family": metadata["family"].replace(" ", ""),
        "category": metadata["category"],
        "licence": metadata["license"]["type"],
        "styles": ",".join(styles),
    }


def main() -> None:
    """Write the table."""
    rows = []
    for archive in sorted(Path("runs/fonts").glob("*.tgz")):
        entry = row(archive)
        if entry is None:
            sys.stdout.write(f"left out: {archive.name}\n")
        else:
            rows.append(entry)
    rows.sort(key=lambda r: hashlib.sha256(r["package"].encode()).hexdigest())
    counts: dict[str, int] = {}
    for entry in rows:
        counts[entry["category"]] = counts.get(entry["category"], 0) + 1
        entry["split"] = "held-out" if counts[entry["category"]] % 8 == 0 else "training"
    rows.sort(key=lambda r: r["package"])
    lines = ["\t".join(rows[0])] + ["\t".join(entry.values()) for entry in rows]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} families, {counts}\n")


if __name__ == "__main__":
    main()
