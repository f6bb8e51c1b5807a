"""The open fonts that `lettering` is trained and evaluated on, from the npm packages `@fontsource/<family>`.

`lettering-fonts.tsv` lists the families with version, SHA-256, category and licence; every eighth family of a category
is held out of training. A family has up to four faces: regular, bold, italic and bold italic. The bold and italic faces
of a quarter of the training families are held out too, to test styles that a family was never seen in.

Only the training recipe runs `npm pack`, with install scripts off. The fonts are read from the archives as WOFF, which
FreeType decompresses with zlib.
"""

import csv
import hashlib
import io
import tarfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from overpaint.train import programs

__all__ = [
    "TABLE",
    "Face",
    "Family",
    "extract",
    "families",
    "fetch",
    "load",
    "make_face",
    "sources",
]

TABLE = Path(__file__).with_name("lettering-fonts.tsv")
EM = 48  # pixels in which faces are drawn before they are scaled to the line
_SUFFIXES = {"400-normal": "", "700-normal": "-Bold", "400-italic": "-Italic", "700-italic": "-BoldItalic"}  # fmt: skip
# Largest height above and depth below the baseline, in heights of the capital H.
_ASCENT, _DESCENT = 1.27, 0.5

Split = Literal["training", "held-out"]


@dataclass(frozen=True)
class Family:
    """A row of the table of fonts."""

    package: str  # of npm, without `@fontsource/`
    version: str
    sha256: str  # of the archive that `npm pack` writes
    family: str  # name in instructions, without spaces
    category: str  # sans-serif, serif, display, handwriting or monospace
    licence: str
    styles: tuple[str, ...]  # weight and slant of the faces
    split: Split

    @property
    def archive(self) -> str:
        """Name of the archive."""
        return f"fontsource-{self.package}-{self.version}.tgz"


@dataclass(frozen=True)
class Face:
    """A font of one weight and slant, with its measures at `EM` pixels."""

    name: str  # in instructions, such as `Lato-BoldItalic`
    family: str
    split: Split
    font: ImageFont.FreeTypeFont
    capital: float  # height of the capital H, in pixels
    # 1, or less if ascenders or descenders are so long that the line would not hold them.
    shrink: float


def families() -> tuple[Family, ...]:
    """Return all families of the table, in alphabetical order."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return tuple(
        Family(**{**row, "styles": tuple(row["styles"].split(","))})
        for row in rows  # type: ignore[arg-type]
    )


def fetch(folder: Path, only: Collection[str] = ()) -> None:
    """Download the archives that `folder` lacks, and check the SHA-256 of all of them.

    Args:
        folder: Folder of the archives.
        only: Packages; by default all of the table, 170 MB.

    Raises:
        ValueError: An archive does not have the pinned SHA-256.
        OSError: npm cannot be run, or cannot reach its registry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in families():
        if only and entry.package not in only:
            continue
        path = folder / entry.archive
        if not path.exists():
            spec = f"@fontsource/{entry.package}@{entry.version}"
            messages = programs.Messages(
                absent=f"the fonts are downloaded with npm, which is not installed: install Node.js, or put "
                f"{entry.archive} into {str(folder)!r} yourself.",
                failed=f"npm could not fetch {spec}",
                remedy="check the connection and npm's registry.",
            )
            programs.fetch(["npm", "pack", "--silent", "--ignore-scripts", spec], path, messages)
        computed = hashlib.sha256(path.read_bytes()).hexdigest()
        if computed != entry.sha256:
            raise ValueError(
                f"{path.name} has SHA-256 {computed}, expected {entry.sha256}: delete the file and run the recipe "
                "again."
            )


def load(folder: Path, packages: Collection[str] = ()) -> list[Face]:
    """Return the faces of the families, by name; those of a training family may be held out.

    Args:
        folder: Folder of `fetch`.
        packages: Packages; by default all of the table.

    Raises:
        FileNotFoundError: An archive is missing.
    """
    faces = []
    for entry in families():
        if packages and entry.package not in packages:
            continue
        for style, data in extract(folder / entry.archive, entry.package, entry.styles).items():
            split = entry.split
            if style != "400-normal" and _regular_only(entry.package):
                split = "held-out"
            faces.append(make_face(entry.family + _SUFFIXES[style], entry.family, data, split))
    return sorted(faces, key=lambda face: face.name)


def extract(archive: Path, package: str, styles: Sequence[str]) -> dict[str, bytes]:
    """Return the WOFF files of `styles` in an archive of Fontsource, by style.

    Raises:
        FileNotFoundError: The archive is missing.
        KeyError: It has no such file.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            f"no archive {str(archive)!r}: let `overpaint train lettering` fetch it."
        )
    names = {f"package/files/{package}-latin-{style}.woff": style for style in styles}
    contents = {}
    with tarfile.open(archive) as tar:
        for member in tar:  # in the order of the archive, since a gzip stream cannot seek backwards
            if member.name in names:
                file = tar.extractfile(member)
                contents[names[member.name]] = file.read() if file else b""
    return {style: contents[style] for style in styles}


def sources(entries: Iterable[Family] | None = None) -> list[dict[str, str]]:
    """Return package, version, SHA-256 and licence of each family, for the model's card."""
    return [
        {
            "package": f"@fontsource/{entry.package}", "version": entry.version, "sha256": entry.sha256,
            "licence": entry.licence,
        }
        for entry in (families() if entries is None else entries)
    ]  # fmt: skip


def _regular_only(package: str) -> bool:
    """Return whether only the regular face of a family is trained on: one family in four."""
    return hashlib.sha256(f"faces of {package}".encode()).digest()[0] % 4 == 0


def make_face(name: str, family: str, data: bytes, split: Split = "training") -> Face:
    """Return a face and its measures.

    Args:
        name: Name in instructions.
        family: Name of its family.
        data: A font file, WOFF or TrueType.
        split: Its split.
    """
    font = ImageFont.truetype(io.BytesIO(data), EM, layout_engine=ImageFont.Layout.BASIC)
    capital = -float(font.getbbox("H", anchor="ls")[1])
    _, top, _, bottom = font.getbbox("bdfhkltgjpqyQJ", anchor="ls")
    shrink = min(1.0, _ASCENT * capital / max(-top, 1), _DESCENT * capital / max(bottom, 1))
    return Face(name, family, split, font, capital, shrink)
