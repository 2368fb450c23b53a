"""Public texts that travel in the PyPI package ``exllamav2``, without a data hub."""

from __future__ import annotations

from pathlib import Path

from packages import Wheel, fetch

WHEEL = Wheel(
    requirement="exllamav2==0.3.2",
    sha256="7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
)
FILES = {"wikipedia": "wiki.utf8", "c4": "c4.utf8", "tinystories": "tiny.utf8"}


def read_text(name: str, cache: Path) -> str:
    """Returns one of the texts, without the markers between its documents.

    :param cache: folder that keeps what was downloaded
    """
    path = cache / "text" / FILES[name]
    if not path.exists():
        member = f"exllamav2/conversion/standard_cal_data/{FILES[name]}"
        path = fetch(WHEEL, member, cache / "downloads", cache / "text")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("<doc ", "</doc>")))
