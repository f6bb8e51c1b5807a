"""Programs of others that recipes call to fetch their material: npm, apt-get and dpkg-deb."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run"]


def run(command: Sequence[str], folder: Path, *, absent: str, failed: str, remedy: str) -> None:
    """Run a program in `folder` until it ends, and say in plain words what to do if it cannot.

    Args:
        command: The program and its arguments; no shell reads them.
        folder: Where it runs.
        absent: What to say where the program is not installed; a whole sentence.
        failed: What it could not do, as "npm could not fetch twemoji"; the last line of its complaint follows.
        remedy: What to do then.

    Raises:
        FileNotFoundError: The program is not installed.
        OSError: It failed.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(absent) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()
        raise OSError(
            f"{failed} ({reason[-1] if reason else 'no reason given'}): {remedy}"
        ) from error
