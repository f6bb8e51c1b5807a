"""The photographs that `matcher` is trained and evaluated on, read from packages; none of them is shipped.

scikit-image and scikit-learn contain a few; the others come from four Debian packages, which are downloaded once with
`apt-get download`, checked against their SHA-256 and unpacked, or read from an installation of the same versions. The
split is by photograph: no scene of a reported figure is in the training data.

Licences: opencv-doc Apache-2.0 and BSD-3-Clause; mate-backgrounds GPL-2+ and CC-BY-SA-4.0; lomiri-wallpapers CC-BY-4.0,
CC-BY-SA-3.0, CC-BY-SA-4.0 and CC0, scikit-image public domain and CC0, both picture by picture, as written in the
package and in the data's README; scikit-learn's pictures CC-BY-2.0.
"""

import hashlib
import subprocess
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from overpaint import files
from overpaint.errors import MissingExtra
from overpaint.train import programs

__all__ = ["HELD_OUT", "PACKAGES", "TRAINING", "VALIDATION", "fetch", "locate", "read", "read_all"]

# Debian package: version and SHA-256 of the archive that `apt-get download` writes.
PACKAGES = {
    "opencv-doc": (
        "4.6.0+dfsg-12",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
    ),
    "mate-backgrounds": (
        "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    ),
    "lomiri-wallpapers-16.04": (
        "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    ),
    "lomiri-wallpapers-20.04": (
        "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
    ),
}

# Folder of the pictures in the Debian package, or in the Python module.
_FOLDERS = {
    "opencv-doc": "usr/share/doc/opencv-doc/examples",
    "mate-backgrounds": "usr/share/backgrounds/mate",
    "lomiri-wallpapers-16.04": "usr/share/backgrounds",
    "lomiri-wallpapers-20.04": "usr/share/backgrounds",
    "skimage": "data",
    "sklearn": "datasets/images",
}


def _names(source: str, text: str) -> tuple[str, ...]:
    return tuple(f"{source}/{name}" for name in text.split())


TRAINING = (
    *_names("opencv-doc", """
    data/HappyFish.jpg data/aero1.jpg data/aero3.jpg data/apple.jpg data/basketball1.png data/blox.jpg data/board.jpg
    data/butterfly.jpg data/cards.png data/chicky_512.png data/ela_original.jpg data/fruits.jpg data/home.jpg
    data/imageTextN.png data/licenseplate_motion.jpg data/messi5.jpg data/ml.png data/notes.png data/orange.jpg
    data/rubberwhale1.png data/smarties.png data/starry_night.jpg data/sudoku.png data/text_defocus.jpg
    text/scenetext01.jpg text/scenetext02.jpg text/scenetext03.jpg text/scenetext04.jpg text/scenetext05.jpg
    alphamat/input_images/plant.jpg hfs/data/000.jpg ximgproc/stanford.png dnn_superres/butterfly.png"""),
    *_names("mate-backgrounds", """
    nature/Aqua.jpg nature/Blinds.jpg nature/Dune.jpg nature/FreshFlower.jpg nature/GreenMeadow.jpg nature/LadyBird.jpg
    nature/RainDrops.jpg nature/Storm.jpg nature/TwoWings.jpg nature/Wood.jpg nature/YellowFlower.jpg
    abstract/Elephants.jpg"""),
    *_names("lomiri-wallpapers-16.04", """
    Bridge_by_Sander_Klootwijk.jpg Dragonfly_by_Bolly.jpg Picture_0B_by_freespace.jpg Picture_1A_by_freespace.jpg
    Wine_by_Jakkub_Mede.jpg aitzgorri_by_Aitzol_Berasategi.jpg analogpattern_by_Peter_Nerlich.jpg
    free_by_Peter_Nerlich.jpg friends_by_Aitzol_Berasategi.jpg greentock_by_Peter_Nerlich.jpg
    picosdeeuropa_by_Aitzol_Berasategi.jpg seeding_by_Clements_Engelhardt.jpg sunset_by_Aitzol_Berasategi.jpg"""),
    *_names("lomiri-wallpapers-20.04", "Infinite-Sea_by_Aury88.jpg Kleiber_by_Lukas_Baubkus.jpg"),
    *_names("skimage", """
    brick.png camera.png chelsea.png clock_motion.png coins.png gravel.png hubble_deep_field.jpg ihc.png moon.png
    page.png rocket.jpg"""),
)  # fmt: skip

# Held out of training to monitor it; no reported figure depends on them.
VALIDATION = (
    *_names("opencv-doc", """
    data/building.jpg data/leuvenA.jpg data/leuvenB.jpg data/squirrel_cls.jpg data/stuff.jpg text/scenetext06.jpg"""),
    *_names("mate-backgrounds", "nature/Garden.jpg"),
    *_names("lomiri-wallpapers-16.04", "life_by_Aitzol_Berasategi.jpg"),
    *_names("skimage", "astronaut.png"),
    *_names("sklearn", "flower.jpg"),
)  # fmt: skip

# For the synthetic test pairs. The scenes with ground truth (graf, aloe, motorcycle, the chessboards) are read by path,
# with `locate`, and are in no list.
HELD_OUT = (
    *_names("opencv-doc", "data/baboon.jpg data/box_in_scene.png"),
    *_names("skimage", "coffee.png grass.png retina.jpg text.png"),
    *_names("sklearn", "china.jpg"),
)


def fetch(folder: Path, names: Collection[str] = ()) -> None:
    """Download and unpack the Debian packages that are neither in `folder` nor installed in the pinned version.

    Downloads must have the pinned SHA-256; installed packages and folders that are unpacked already are not checked.

    Args:
        folder: Where to unpack them.
        names: Which packages; by default all.

    Raises:
        ValueError: An archive does not have the pinned SHA-256.
        OSError: `apt-get` or `dpkg-deb` is missing or fails.
    """
    for name, (version, digest) in PACKAGES.items():
        if names and name not in names:
            continue
        if (folder / name / _FOLDERS[name]).is_dir():
            continue
        if (Path("/") / _FOLDERS[name]).is_dir() and _installed(name) == version:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / f"{name}_{version}_all.deb"
        if not archive.exists():
            command = ["apt-get", "download", f"{name}={version}"]
            programs.fetch(command, archive, _messages(command[0], folder, name))
        computed = hashlib.sha256(archive.read_bytes()).hexdigest()
        if computed != digest:
            raise ValueError(
                f"{archive.name} has SHA-256 {computed}, expected {digest}: delete the file and run the recipe again."
            )
        with files.atomic((folder / name).resolve()) as draft:
            command = ["dpkg-deb", "-x", str(archive.resolve()), str(draft)]
            programs.run(command, folder, _messages(command[0], folder, name))


def locate(name: str, folder: Path) -> Path:
    """Return the path of a photograph or another file of the packages, such as `opencv-doc/data/H1to3p.xml`.

    Args:
        name: Source and path within its pictures, as in `TRAINING`.
        folder: Folder of `fetch`; installed packages of any version are tried next.

    Raises:
        FileNotFoundError: The file is in neither of them.
        MissingExtra: The package scikit-image or scikit-learn is not installed.
        ValueError: The source is unknown.
    """
    source, _, path = name.partition("/")
    if source not in _FOLDERS:
        raise ValueError(f"no photographs from {source!r}: choose from {', '.join(_FOLDERS)}.")
    if source in PACKAGES:
        candidates = [
            folder / source / _FOLDERS[source] / path,
            Path("/") / _FOLDERS[source] / path,
        ]
    else:
        module = find_spec(source)
        if module is None or module.origin is None:
            package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[source]
            raise MissingExtra(
                f"{name!r} comes with {package}, which is not installed. "
                f"Install it with: pip install {package}."
            )
        candidates = [Path(module.origin).parent / _FOLDERS[source] / path]
    for file in candidates:
        if file.is_file():
            return file
    remedy = f"apt-get install {source}" if source in PACKAGES else f"reinstall {source}"
    raise FileNotFoundError(
        f"no photograph {name!r}: neither in {str(folder)!r} nor on the system. Install its package ({remedy}), or let "
        "`overpaint train matcher` fetch it."
    )


def read(name: str, folder: Path, *, side: int = 768) -> Tensor:
    """Return a photograph as RGB, uint8 (3, H, W), its shorter side at most `side` pixels; grey becomes RGB.

    Args:
        name: As in `locate`.
        folder: As in `locate`.
        side: Larger pictures are reduced with an area filter; smaller ones are not resized.
    """
    with Image.open(locate(name, folder)) as picture:
        picture.draft("RGB", (side, side))
        picture = picture.convert("RGBA").convert("RGB") if "A" in picture.mode else picture
        picture = picture.convert("RGB")
        scale = side / min(picture.size)
        if scale < 1:
            width, height = (round(n * scale) for n in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BOX)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_all(names: Iterable[str], folder: Path, *, side: int = 768) -> dict[str, Tensor]:
    """Return the photographs by name; arguments and errors as in `read`."""
    return {name: read(name, folder, side=side) for name in names}


def _installed(name: str) -> str:
    """Return the installed version of a Debian package; an empty string if it is not installed."""
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    status, _, version = result.stdout.partition(" ")
    return version if status == "installed" else ""


def _messages(program: str, folder: Path, package: str) -> programs.Messages:
    by_hand = f"unpack the package into {str(folder / package)!r} yourself."
    return programs.Messages(
        absent=f"the photographs of {package} come from Debian, and {program} is not installed: {by_hand}",
        failed=f"{program} could not fetch or unpack {package}",
        remedy=f"check the connection and Debian's sources, or {by_hand}",
    )
