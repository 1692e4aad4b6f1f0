"""Check the README and the pages: Python blocks run, and links have targets.

The Python blocks are those of README.md and docs/features.md. Links are checked on all pages.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")])


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures, without those on the web."""
    targets = re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if not re.match(r"https?://", target)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "name", "shape"),
    [("README.md", "scenes-bundle", (1, 64, 64, 3)), ("docs/features.md", "glyphs-bundle", (2, 16, 16, 1))],
)
def test_python_blocks_of_readme_and_features_run_in_order(
    page: str,
    name: str,
    shape: tuple[int, ...],
    build_once: Callable[..., Path],
    glyphs_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The README's bundle is built by its command."""
    bundle = glyphs_bundle
    if name == "scenes-bundle":
        pytest.importorskip("diffusers", reason="needs the extra diffusers")
        bundle = build_once("scenes-of-readme", "scenes", strong_sparsity=(0.5,), sparsity=(0.9,))
    (tmp_path / name).symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    programs = blocks(ROOT / page)
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, page, "exec"), names)
    assert names["images"].shape == shape  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_page_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
