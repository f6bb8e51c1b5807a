"""Rewrite a word in twenty pictures of signs and book covers by the command line, and draw one contact sheet.

    python examples/lettering_pictures.py [--model FOLDER] [--out FOLDER] [--photos FOLDER] [--fonts FOLDER]
                                          [--samples N] [--only N]

Six pictures are photographs of real signs, from the examples of Debian's opencv-doc; none of them is in the training
data of `lettering`. Fourteen are composed: seven signs and seven book covers, with fonts of Fontsource drawn by the
generator of the training data, put with perspective into photographs that are held out of training or used there only
as backgrounds. Photographs and fonts are fetched as `overpaint train lettering` fetches them.

For each picture `overpaint letter` runs in a process of its own. The sheet shows each picture before and after, with
the options of its command, also if the word cannot be read. Writes `<out>/<name>.png`, `<out>/<name>-after.png` and
`<out>/sheet.png`.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from overpaint import files
from overpaint.scene_text.line import Line
from overpaint.train import lettering_fonts, photographs
from overpaint.train.lettering_fonts import Face
from overpaint.train.lettering_glyphs import Style, Word, draw_word, paint

SIDE = 640  # pixels of the shorter side of a photograph
LINE = Line(height=96, width=480, top=8, bottom=88, capital=24.0, baseline=68.0, margin=24)
ABOVE, BELOW = (
    4 / 15,
    7 / 15,
)  # room around capital letters, in their heights; as on the model's line
CELL, LABEL = (300, 200), 34  # pixels of a picture in the sheet, and of its label


@dataclass(frozen=True)
class Real:
    """A photograph of a sign, and the word to rewrite in it."""

    name: str
    photograph: str
    region: tuple[str, ...]  # options of `overpaint letter`, in pixels of the photograph
    text: str
    style: tuple[str, ...] = ()


@dataclass(frozen=True)
class Composed:
    """A sign or a book cover in a photograph; the word of line `target` is rewritten."""

    name: str
    photograph: str
    lines: tuple[str, ...]
    font: str
    ink: tuple[int, int, int]
    board: tuple[int, int, int] | str  # a color, or the photograph of a cover
    corners: tuple[tuple[float, float], ...]  # of the board, as shares of the photograph
    text: str
    style: tuple[str, ...] = ()
    target: int = 0


_OPENCV = "opencv-doc/text/scenetext0{}.jpg"
REAL = (
    Real("notice", _OPENCV.format(1), ("--box", "273,123,155,45"), "LOADING", ("--color", "black")),
    Real("centre", _OPENCV.format(2), ("--polygon", "438,598 796,624 790,712 432,686"), "Library"),
    Real("copy", _OPENCV.format(3), ("--find", "copy"), "book"),
    Real("generator", _OPENCV.format(4), ("--find", "GM 125"), "PX 480", ("--color", "white")),
    Real("barrier", _OPENCV.format(5), ("--find", "NOPARKING", "--which", "1"), "FISHING", ("--color", "red")),
    Real("shop", _OPENCV.format(6), ("--rotated-box", "252,282,200,38,2"), "Antiques", ("--color", "yellow")),
)  # fmt: skip
_WHITE, _BLACK, _RED = (245, 245, 240), (20, 20, 25), (180, 30, 35)
COMPOSED = (
    Composed("cafe", "sklearn/china.jpg", ("Garden", "cafe"), "Pacifico", _WHITE, (30, 70, 60),
             ((0.30, 0.35), (0.72, 0.38), (0.71, 0.62), (0.31, 0.63)), "Market",
             ("--font", "pacifico", "--color", "white")),
    Composed("hotel", "opencv-doc/data/building.jpg", ("HOTEL",), "Oswald-Bold", _RED, (240, 230, 205),
             ((0.20, 0.40), (0.80, 0.34), (0.80, 0.50), (0.20, 0.54)), "MUSEUM",
             ("--font", "oswald-bold", "--color", "red")),
    Composed("bridge", "lomiri-wallpapers-16.04/Bridge_by_Sander_Klootwijk.jpg", ("River", "bridge"), "Roboto-Bold",
             _WHITE, (20, 70, 140), ((0.08, 0.30), (0.40, 0.26), (0.40, 0.58), (0.08, 0.60)), "Castle"),
    Composed("garden", "mate-backgrounds/nature/Garden.jpg", ("Please", "keep off"), "Lobster", _BLACK, (235, 220, 180),
             ((0.35, 0.45), (0.65, 0.45), (0.65, 0.75), (0.35, 0.75)), "Do come", ("--font", "lobster"), 1),
    Composed("dune", "mate-backgrounds/nature/Dune.jpg", ("BEACH",), "AlfaSlabOne", (20, 60, 120), _WHITE,
             ((0.55, 0.20), (0.92, 0.28), (0.92, 0.48), (0.55, 0.42)), "HARBOR", ("--color", "blue")),
    Composed("storm", "mate-backgrounds/nature/Storm.jpg", ("DANGER", "high tide"), "Roboto-Bold", _BLACK,
             (240, 195, 20), ((0.12, 0.35), (0.45, 0.35), (0.45, 0.68), (0.12, 0.68)), "low wind",
             ("--font", "roboto-bold"), 1),
    Composed("meadow", "mate-backgrounds/nature/GreenMeadow.jpg", ("Farm shop",), "Chewy", _WHITE, (110, 60, 30),
             ((0.30, 0.52), (0.70, 0.56), (0.70, 0.72), (0.30, 0.70)), "Apples", ("--font", "chewy")),
    Composed("sea", "mate-backgrounds/nature/Wood.jpg", ("The sea", "Ada Grey"), "Prata", _WHITE,
             "lomiri-wallpapers-20.04/Infinite-Sea_by_Aury88.jpg",
             ((0.36, 0.10), (0.62, 0.12), (0.62, 0.90), (0.35, 0.88)), "The deep", ("--color", "white")),
    Composed("birds", "skimage/brick.png", ("Birds", "R. Holm"), "Courgette", (250, 220, 90),
             "lomiri-wallpapers-20.04/Kleiber_by_Lukas_Baubkus.jpg",
             ((0.30, 0.12), (0.68, 0.10), (0.70, 0.90), (0.28, 0.92)), "wizards",
             ("--font", "courgette", "--color", "yellow")),
    Composed("wine", "skimage/gravel.png", ("Wine", "a guide"), "GreatVibes", _WHITE,
             "lomiri-wallpapers-16.04/Wine_by_Jakkub_Mede.jpg",
             ((0.30, 0.08), (0.70, 0.08), (0.70, 0.92), (0.30, 0.92)), "Bread", ("--font", "great vibes")),
    Composed("flower", "mate-backgrounds/nature/Blinds.jpg", ("ROSES", "L. Marsh"), "Montserrat-Bold", (120, 20, 60),
             "sklearn/flower.jpg", ((0.38, 0.10), (0.60, 0.16), (0.60, 0.84), (0.38, 0.92)), "LILIES",
             ("--instruction", '"LILIES" in purple Montserrat letters')),
    Composed("rocket", "skimage/grass.png", ("ROCKETS", "J. Park"), "Righteous", (255, 240, 120), "skimage/rocket.jpg",
             ((0.28, 0.15), (0.66, 0.10), (0.72, 0.86), (0.32, 0.92)), "PLANETS", ("--color", "yellow")),
    Composed("coffee", "mate-backgrounds/nature/Aqua.jpg", ("Coffee", "M. Bean"), "DancingScript-Bold", _WHITE,
             "skimage/coffee.png", ((0.35, 0.12), (0.65, 0.12), (0.65, 0.88), (0.35, 0.88)), "Cocoa",
             ("--font", "Dancing Script and Lobster")),
    Composed("cat", "mate-backgrounds/nature/RainDrops.jpg", ("My cat", "T. Whisk"), "ComicNeue-Bold", (255, 250, 230),
             "skimage/chelsea.png", ((0.32, 0.12), (0.66, 0.16), (0.64, 0.88), (0.30, 0.84)), "T. Brown",
             ("--font", "comic neue-bold"), 1),
)  # fmt: skip


def compose(case: Composed, faces: dict[str, Face], photos: Path) -> tuple[Image.Image, np.ndarray]:
    """Return the picture, and the corners of the region of its target word, (4, 2)."""
    photo = np.ascontiguousarray(_photograph(case.photograph, photos))
    is_book = isinstance(case.board, str)
    rows = 2 * len(case.lines) + 2 if is_book else len(case.lines)
    height = max(rows * LINE.height, LINE.height)
    board = np.full((height, LINE.width, 3), 200, np.uint8)
    if isinstance(case.board, str):
        board = cv2.resize(
            _photograph(case.board, photos), (LINE.width, height), interpolation=cv2.INTER_AREA
        )
        board = np.ascontiguousarray((board * 0.6).astype(np.uint8))
    else:
        board[:] = case.board
    region = np.zeros((4, 2))
    for index, text in enumerate(case.lines):
        top = (0 if index == 0 else height - LINE.height) if is_book else index * LINE.height
        word = _placed(faces[case.font], text)
        style = Style(np.array(case.ink, np.float32))
        board[top : top + LINE.height] = paint(board[top : top + LINE.height], [word], style)
        if index == case.target:
            capital = word.baseline - word.capital
            left, right = float(word.edges[0]) - 8, float(word.edges[-1]) + 8
            low, high = top + word.capital - ABOVE * capital, top + word.baseline + BELOW * capital
            region = np.array([[left, low], [right, low], [right, high], [left, high]])
    frame = np.array([[0, 0], [LINE.width, 0], [LINE.width, height], [0, height]], np.float32)
    corners = np.array(case.corners, np.float32) * [photo.shape[1], photo.shape[0]]
    matrix = cv2.getPerspectiveTransform(frame, corners.astype(np.float32))
    size = (photo.shape[1], photo.shape[0])
    warped = cv2.warpPerspective(board, matrix, size, flags=cv2.INTER_AREA)
    cover = cv2.warpPerspective(
        np.ones(board.shape[:2], np.float32), matrix, size, flags=cv2.INTER_LINEAR
    )
    shade = cv2.GaussianBlur(cover, (0, 0), 6) * (1 - cover) * 0.5
    picture = photo * (1 - shade[..., None]) * (1 - cover[..., None]) + warped * cover[..., None]
    moved = cv2.perspectiveTransform(region[None].astype(np.float64), matrix.astype(np.float64))[0]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), moved


def _placed(face: Face, text: str) -> Word:
    """Return a word in the middle of a line, smaller if the line cannot hold it."""
    capital, room = LINE.baseline - LINE.capital, LINE.width - 2 * LINE.margin
    word = Word.lay_out(face, text, capital=capital)
    if word.width > room:
        word = Word.lay_out(face, text, capital=capital * room / word.width)
    x = (LINE.width - word.width) / 2
    return draw_word(word, LINE, x=x, baseline=LINE.baseline, stretch=1.0, bend=np.eye(3))


def _photograph(name: str, folder: Path) -> np.ndarray:
    return photographs.read(name, folder, side=SIDE).permute(1, 2, 0).numpy()


def _command(
    case: Real | Composed,
    before: Path,
    after: Path,
    region: tuple[str, ...],
    args: argparse.Namespace,
) -> list[str]:
    options = [*region, "--text", case.text, *case.style]
    return [
        sys.executable, "-m", "overpaint", "letter", str(before), *options, "--out", str(after), "--force",
        "--samples", str(args.samples), "--model", args.model,
    ]  # fmt: skip


def run(args: argparse.Namespace) -> Path:
    """Write all pictures, rewrite them by the command line, and return the path of the sheet."""
    args.out.mkdir(parents=True, exist_ok=True)
    photographs.fetch(args.photos)
    wanted = {case.font.partition("-")[0] for case in COMPOSED}
    packages = [family.package for family in lettering_fonts.families() if family.family in wanted]
    lettering_fonts.fetch(args.fonts, packages)
    faces = {face.name: face for face in lettering_fonts.load(args.fonts, packages)}
    cells = []
    for case in (*REAL, *COMPOSED)[: args.only]:
        before, after = args.out / f"{case.name}.png", args.out / f"{case.name}-after.png"
        if isinstance(case, Real):
            with Image.open(photographs.locate(case.photograph, args.photos)) as picture:
                picture.convert("RGB").save(before)
            region = case.region
        else:
            picture, corners = compose(case, faces, args.photos)
            picture.save(before)
            region = ("--polygon", " ".join(f"{x:.1f},{y:.1f}" for x, y in corners))
        done = subprocess.run(
            _command(case, before, after, region, args), capture_output=True, text=True
        )
        line = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        sys.stdout.write(f"{case.name}: {' '.join(line)}\n")
        sys.stdout.flush()
        label = f"{case.name}: {' '.join((region[0], '--text', case.text, *case.style))}"
        cells.append((label, before, after if done.returncode == 0 else None))
    path = args.out / "sheet.png"
    with files.atomic(path) as draft:
        sheet(cells).save(draft, format="PNG")
    return path


def sheet(cells: list[tuple[str, Path, Path | None]], *, columns: int = 2) -> Image.Image:
    """Return a contact sheet: each picture before and after; a grey field where the command failed."""
    width, height = 2 * CELL[0] + 12, CELL[1] + LABEL
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for index, (label, *paths) in enumerate(cells):
        x, y = index % columns * width, index // columns * height
        for number, path in enumerate(paths):
            place = (x + number * (CELL[0] + 2), y)
            if path is None:
                pen.rectangle((*place, place[0] + CELL[0], y + CELL[1]), fill="#d5d8df")
                continue
            with Image.open(path) as picture:
                picture.thumbnail(CELL)
                page.paste(picture, place)
        pen.text((x + 2, y + CELL[1] + 4), label[:100], fill="#1f2430", font=font)
    return page


def main() -> None:
    """Read the options and draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="lettering", help="a lettering model's folder, or the shipped one"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lettering-pictures"))
    parser.add_argument("--photos", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--fonts", type=Path, default=Path("runs/fonts"))
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--only", type=int, default=None, help="only the first N pictures")
    sys.stdout.write(f"{run(parser.parse_args())}\n")


if __name__ == "__main__":
    main()
