"""The engine cache: hits, misses, and two processes that use it at the same time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from sg_engines.cache import SCHEMA, EngineCache, EngineKey
from sg_engines.child import BuildFigures

KEY = EngineKey(
    name="guided",
    graph="a" * 64,
    weights="b" * 64,
    library="tensorrt_rtx",
    version="1.7.1",
    profiles=({"x": (1, 2, 8, 8), "keep": (1, 4)},),
    compute_capabilities=(86, 89),
    workspace=None,
    flags={"TF32": False},
    gpu="",
)
OTHERS: dict[str, Any] = {
    "name": "dense",
    "graph": "c" * 64,
    "weights": "c" * 64,
    "library": "tensorrt",
    "version": "1.7.2",
    "profiles": ({"x": (2, 2, 8, 8), "keep": (2, 4)},),
    "compute_capabilities": (86,),
    "workspace": 1 << 30,
    "flags": {},
    "gpu": "NVIDIA H100, 90",
    "schema": SCHEMA + 1,
}
"""A different value for every part of a key."""

FIGURES = BuildFigures(1.5, 123_456_789)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    """A cache that holds one engine."""
    built = tmp_path / "built"
    built.write_bytes(b"the engine")
    cache = EngineCache(tmp_path / "new" / "cache")
    cache.store(KEY, built, FIGURES)
    return cache


def entry(cache: EngineCache, suffix: str, key: EngineKey = KEY) -> Path:
    return cache.folder / f"{key.digest}.{suffix}"


def test_fetch_of_a_known_key_gives_the_same_bytes_and_figures(cache: EngineCache, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    assert cache.fetch(KEY, output) == FIGURES
    assert output.read_bytes() == b"the engine"
    assert {path.suffix for path in cache.folder.iterdir()} == {".engine", ".json"}, "no temporary file is left"


def test_store_removes_the_partial_copies_of_killed_processes(cache: EngineCache, tmp_path: Path) -> None:
    stale, fresh = (cache.folder / f".{name}.engine.7-01234567.partial" for name in ("stale", "fresh"))
    for path in (stale, fresh):
        path.write_bytes(b"the eng")
    os.utime(stale, (0, 0))
    cache.store(KEY, tmp_path / "built", FIGURES)
    assert (stale.exists(), fresh.exists()) == (False, True)


def test_fetch_replaces_what_was_there(cache: EngineCache, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    output.write_bytes(b"an older one")
    cache.fetch(KEY, output)
    assert output.read_bytes() == b"the engine"


@pytest.mark.parametrize("name", ["open", "unlink"])
def test_fetch_from_a_cache_that_denies_it_gives_none(
    name: str, cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine cannot be read, or an altered entry cannot be removed."""
    real = getattr(Path, name)

    def deny(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path == entry(cache, "engine"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **settings)

    if name == "unlink":
        entry(cache, "engine").write_bytes(b"altered")
    monkeypatch.setattr(Path, name, deny)
    assert cache.fetch(KEY, tmp_path / "engine") is None
    assert entry(cache, "engine").exists()


def test_fetch_to_a_folder_that_cannot_be_written_blames_the_output(cache: EngineCache, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        cache.fetch(KEY, tmp_path / "none/engine")
    assert Path(caught.value.filename).parent == tmp_path / "none"
    assert cache.fetch(KEY, tmp_path / "engine") == FIGURES


def test_fetch_from_a_folder_that_is_not_there_gives_none(tmp_path: Path) -> None:
    assert EngineCache(tmp_path / "none").fetch(KEY, tmp_path / "engine") is None
    assert list(tmp_path.iterdir()) == []


def test_others_are_of_every_part_of_the_key() -> None:
    assert OTHERS.keys() == {field.name for field in fields(EngineKey)}


@pytest.mark.parametrize("part", OTHERS)
def test_fetch_with_another_part_of_the_key_gives_none(cache: EngineCache, tmp_path: Path, part: str) -> None:
    other = replace(KEY, **{part: OTHERS[part]})
    assert other.digest != KEY.digest
    assert cache.fetch(other, tmp_path / "engine") is None
    assert not (tmp_path / "engine").exists()


def test_digest_is_the_same_whatever_the_order_of_inputs() -> None:
    (shapes,) = KEY.profiles
    turned = dict(reversed(shapes.items()))
    assert list(turned) != list(shapes)
    assert replace(KEY, profiles=(turned,)).digest == KEY.digest
    assert len(KEY.digest) == 64


def test_digest_depends_on_the_order_of_profiles() -> None:
    """An engine's profiles are identified by their index."""
    profiles = ({"x": (1, 4)}, {"x": (2, 4)})
    assert replace(KEY, profiles=profiles).digest != replace(KEY, profiles=profiles[::-1]).digest


@pytest.mark.parametrize("content", [b"the engin", b"the Engine", b""], ids=["cut off", "altered", "empty"])
def test_fetch_of_an_altered_engine_removes_it_and_the_next_is_kept(
    cache: EngineCache, tmp_path: Path, content: bytes
) -> None:
    entry(cache, "engine").write_bytes(content)
    assert cache.fetch(KEY, tmp_path / "engine") is None
    assert list(cache.folder.iterdir()) == []
    assert not (tmp_path / "engine").exists()
    cache.store(KEY, tmp_path / "built", FIGURES)
    assert cache.fetch(KEY, tmp_path / "engine") == FIGURES


@pytest.mark.parametrize("suffix", ["engine", "json"])
def test_fetch_of_half_an_entry_gives_none(cache: EngineCache, tmp_path: Path, suffix: str) -> None:
    entry(cache, suffix).unlink()
    assert cache.fetch(KEY, tmp_path / "engine") is None


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no text": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[]",
    "a number": lambda content: b"3",
    "foreign": lambda content: b'{"name": "something else"}',
    "no key": lambda content: content.replace(b'"key"', b'"kez"'),
    "no object as key": lambda content: json.dumps(json.loads(content) | {"key": "guided"}).encode(),
    "no hash": lambda content: content.replace(b'"sha256"', b'"sha1"'),
    "no time": lambda content: content.replace(b'"seconds"', b'"minutes"'),
    "deep": lambda content: b"[" * 100_000,
    "a word as time": lambda content: content.replace(b"1.5", b'"long"'),
    "nothing as memory": lambda content: content.replace(b"123456789", b"null"),
    "no memory": lambda content: content.replace(b'"memory_bytes"', b'"memory"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_fetch_with_damaged_facts_gives_none_until_stored_anew(
    cache: EngineCache, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    facts = entry(cache, "json")
    facts.write_bytes(damage(facts.read_bytes()))
    assert cache.fetch(KEY, tmp_path / "engine") is None
    assert cache.explain(KEY) == f"miss: no engine of guided in {cache.folder}"
    cache.store(KEY, tmp_path / "built", FIGURES)
    assert cache.fetch(KEY, tmp_path / "engine") == FIGURES


def test_explain_of_a_known_key_is_a_hit(cache: EngineCache) -> None:
    assert cache.explain(KEY) == "hit"


@pytest.mark.parametrize("part", sorted(OTHERS.keys() - {"name"}))
def test_explain_names_the_part_that_differs(cache: EngineCache, part: str) -> None:
    assert cache.explain(replace(KEY, **{part: OTHERS[part]})) == f"miss: different {part}"


def test_explain_names_the_parts_of_the_most_similar_entry(cache: EngineCache, tmp_path: Path) -> None:
    for parts in (("weights", "graph", "workspace"), ("version", "gpu"), ("graph", "version", "gpu")):
        cache.store(replace(KEY, **{part: OTHERS[part] for part in parts}), tmp_path / "built", FIGURES)
    entry(cache, "json").unlink()
    assert cache.explain(KEY) == "miss: different version, gpu"


def test_explain_of_another_graph_says_that_there_is_none(cache: EngineCache) -> None:
    other = replace(KEY, name="dense")
    assert cache.explain(other) == f"miss: no engine of dense in {cache.folder}"


def test_explain_of_a_folder_that_is_not_there_says_that_there_is_none(tmp_path: Path) -> None:
    assert EngineCache(tmp_path / "none").explain(KEY) == f"miss: no engine of guided in {tmp_path / 'none'}"


@pytest.mark.parametrize("content", [b"the Engine", None], ids=["altered", "gone"])
def test_explain_of_an_altered_entry_says_so(cache: EngineCache, content: bytes | None) -> None:
    engine = entry(cache, "engine")
    engine.unlink() if content is None else engine.write_bytes(content)
    assert cache.explain(KEY) == "miss: the entry was altered; the engine is built again"


PROCESS = """
import sys
from pathlib import Path
from sg_engines.cache import EngineCache
from sg_engines.child import BuildFigures
sys.path.insert(0, sys.argv[1])
from key import KEY

folder, number = Path(sys.argv[1]), sys.argv[2]
cache, output = EngineCache(folder / "cache"), folder / f"output-{number}"
built = folder / f"built-{number}"
built.write_bytes(bytes(range(256)) * 4096)
for round in range(40):
    cache.store(KEY, built, BuildFigures(float(number), round))
    figures = cache.fetch(KEY, output)
    assert figures is not None, "what was stored is there"
    assert figures.seconds in (1.0, 2.0) and 0 <= figures.memory_bytes < 40
    assert output.read_bytes() == built.read_bytes(), "the engine is whole"
    assert cache.explain(KEY) == "hit"
"""


def test_two_processes_that_store_and_fetch_the_same_engine_see_whole_entries(tmp_path: Path) -> None:
    (tmp_path / "key.py").write_text(f"from sg_engines.cache import EngineKey\nKEY = {KEY!r}\n")
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([*command, number], env=environment, stdout=pipe, stderr=pipe, text=True) for number in "12"
    ]
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one entry, and no temporary file"
