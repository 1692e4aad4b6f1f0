"""Files that are written completely or not at all, their hashes, and the cache folder."""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.files import cache_folder, check_room, is_full, leftovers_of, replacing, sha256_of, temporary_beside


def test_replacing_of_a_block_that_succeeds_puts_the_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # one file system, so that the last step is a rename
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_of_a_block_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_of_a_block_that_writes_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "a [1] b", "*"])
def test_leftovers_of_a_path_are_its_temporary_names_alone(name: str, tmp_path: Path) -> None:
    left = {temporary_beside(tmp_path / name) for _ in range(2)}
    for path in (*left, temporary_beside(tmp_path / "other"), tmp_path / f".{name}.partial"):
        path.touch()
    assert set(tmp_path.glob(leftovers_of(tmp_path / name))) == left


@pytest.mark.parametrize("place", [".", "new/deep"])
def test_check_room_passes_and_leaves_nothing(place: str, tmp_path: Path) -> None:
    check_room(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/new", "/proc/none/new"])
def test_check_room_for_no_file_raises(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"No such file|Not a directory"):
        check_room(tmp_path / place)


@pytest.mark.parametrize(("number", "full"), [(None, False), (28, True), (122, True), (13, False)])
def test_is_full_tells_a_full_disk_and_a_full_quota(
    number: int | None, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(io.BytesIO):
        def write(self, content: Any) -> int:
            if number is not None:
                raise OSError(number, os.strerror(number))
            return len(content)

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Disk())
    assert is_full(tmp_path) == full


def test_is_full_asks_for_the_given_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(io.BytesIO):
        def close(self) -> None:
            assert len(self.getvalue()) == 3 * 2**20 + 5

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Disk())
    assert not is_full(tmp_path, 3 * 2**20 + 5)


@pytest.mark.parametrize("size", [0, 3, 2**20, 2**20 + 1])
def test_sha256_of_a_file_of_any_length_is_the_hash_of_its_bytes(tmp_path: Path, size: int) -> None:
    """The lengths are around the size of the chunks that are read."""
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert sha256_of(path) == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SG_EXPORT_CACHE": "/engines", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/engines"),
        ({"SG_EXPORT_CACHE": "", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/sg-export"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/sg-export"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/sg-export"),
        ({"HOME": "/home/me"}, "/home/me/.cache/sg-export"),
    ],
)
def test_cache_folder_is_the_first_that_the_environment_names(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SG_EXPORT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_cache_folder_of_a_user_without_a_home_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run so under a number that is no user."""
    for name in ("SG_EXPORT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(FileNotFoundError, match=r"no home folder; set SG_EXPORT_CACHE: '~/.cache/sg-export'"):
        cache_folder()
