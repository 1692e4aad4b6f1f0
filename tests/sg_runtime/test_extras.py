"""Optional dependencies that are installed, missing or broken."""

from pathlib import Path

import pytest

from sg_runtime.errors import MissingExtraError, UsageError
from sg_runtime.extras import require


def test_require_of_a_module_that_is_there_returns_it() -> None:
    assert require("xml.dom", "ort").__name__ == "xml.dom"


@pytest.mark.parametrize("module", ["sg_no_such_module", "sg_no_such_module.part"])
def test_require_of_a_module_that_is_missing_names_the_extra(module: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        require(module, "tensorrt")
    assert str(caught.value) == "sg_no_such_module is not installed: pip install 'sg-export[tensorrt]'"
    assert isinstance(caught.value, UsageError)


def test_require_of_a_missing_part_of_a_package_names_the_part() -> None:
    with pytest.raises(MissingExtraError, match=r"^xml\.sg_no_such_part is not installed"):
        require("xml.sg_no_such_part", "ort")


def test_require_of_a_module_that_lacks_another_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is installed but incomplete.

    The module's own message helps more than advice to install the extra.
    """
    (tmp_path / "sg_half_installed.py").write_text("import sg_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'sg_no_such_module'"):
        require("sg_half_installed", "ort")


def test_require_of_a_module_that_gives_no_name_passes_its_error_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sg_nameless.py").write_text("raise ModuleNotFoundError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no driver"):
        require("sg_nameless", "ort")
