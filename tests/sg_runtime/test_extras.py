"""Optional dependencies that are installed, missing or broken."""

from importlib import metadata
from pathlib import Path

import pytest

from sg_runtime.errors import MissingExtraError, UsageError
from sg_runtime.extras import outdated, require


def test_require_of_a_module_that_is_there_returns_it() -> None:
    assert require("xml.dom", "ort").__name__ == "xml.dom"


@pytest.mark.parametrize("module", ["sg_no_such_module", "sg_no_such_module.part"])
def test_require_of_a_module_that_is_missing_names_the_extra(module: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        require(module, "tensorrt")
    told = "sg_no_such_module is not installed: pip install -e '.[tensorrt]' in a checkout of sg-export"
    assert str(caught.value) == told
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


def test_outdated_names_the_version_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [
        "click>=8.4",
        "onnx-ir>=0.1.16; extra == 'export'",
        "onnxruntime-gpu[cuda]>=1.31.1; extra == 'ort-gpu'",
        "onnxscript>=0.6; extra == 'export'",
        "pytest>=9; extra == 'dev'",
        "sg-export[export]; extra == 'dev'",
        "tensorrt>=10.3; extra == 'tensorrt'",
    ]
    found = {"click": "8.4.0", "onnx-ir": "0.1.9", "onnxruntime-gpu": "1.31", "onnxscript": "0.10.dev3", "pytest": "8"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "requires", lambda _: claims)
    monkeypatch.setattr(metadata, "version", version)
    assert outdated() == [
        "onnx-ir 0.1.9 is older than 0.1.16, which sg-export needs: pip install 'onnx-ir>=0.1.16'",
        "onnxruntime-gpu 1.31 is older than 1.31.1, which sg-export needs: pip install 'onnxruntime-gpu>=1.31.1'",
    ]
    assert outdated("onnx-ir") == outdated()[:1]
    assert outdated("tensorrt") == outdated("click") == []


def test_outdated_of_what_is_not_installed_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert outdated() == []
