"""Run the external programs that fetch the training data: npm, apt-get and dpkg-deb."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overpaint import files

__all__ = ["Messages", "fetch", "run"]


@dataclass(frozen=True)
class Messages:
    """Texts of the errors of a program."""

    absent: str  # a sentence: the program is not installed, and what to do
    failed: (
        str  # what failed, such as "npm could not fetch twemoji"; the program's last line is added
    )
    remedy: str  # what to do then


def fetch(command: Sequence[str], path: Path, messages: Messages) -> None:
    """Run a program that writes a file of the name of `path` into its working directory; move the file to `path`.

    The program runs in a temporary folder, so that `path` is never an incomplete file.

    Raises:
        FileNotFoundError: The program is not installed.
        OSError: The program failed.
    """
    with files.temporary_folder(path.with_name(f"{path.name}.fetch")) as folder:
        run(command, folder, messages)
        with files.atomic(path) as draft:
            shutil.move(folder / path.name, draft)


def run(command: Sequence[str], folder: Path, messages: Messages) -> None:
    """Run a program in `folder` until it ends.

    Args:
        command: The program and its arguments, not interpreted by a shell.
        folder: Working directory.
        messages: Texts of the errors.

    Raises:
        FileNotFoundError: The program is not installed.
        OSError: The program failed.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(messages.absent) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()
        raise OSError(
            f"{messages.failed} ({reason[-1] if reason else 'no reason given'}): {messages.remedy}"
        ) from error
