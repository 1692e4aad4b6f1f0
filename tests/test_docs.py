"""Check that the pages of docs/ that run do what they say.

They run on the reference models without their blocks after the first, which is the route. These
have the classes, tokens and names of the reference models. Builds get a fixed batch, with which
tracing takes half the time. With SG_EXPORT_REAL_PAGES=1, which `make pages` sets, the pages run on
the reference models themselves, as they are written.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from full_pipelines import autoencoder, write_full_pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from servers import serving

from benchmarks.tritonserver import missing, running
from sg_export.cli import main
from sg_export.reference import REFERENCES, place_of
from sg_runtime.triton import PARAMETERS

DOCS = Path(__file__).parent.parent / "docs"

COMMAND = r"^ {4}(?:\$ )?sg-export (?:[^\n]*\\\n)*[^\n]*"
"""Regular expression of a command in a code block, with its continuation lines."""


def words(command: str) -> list[str]:
    """Return the arguments of a command."""
    return shlex.split(command.strip().removeprefix("$ ").replace("\\\n", ""))[1:]


REAL = bool(os.environ.get("SG_EXPORT_REAL_PAGES"))


def run(page: str, batch: int) -> dict[str, Any]:
    """Run the commands and programs of a page in order, in the current folder.

    batch: number of images of the bundles that commands build without one. Returns the variables of
    the programs.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for match in re.finditer(rf"{COMMAND}|^```python\n(?P<program>[^`]*)```", text, re.MULTILINE):
        if match["program"] is not None:
            exec(compile(match["program"], page, "exec"), names)
            continue
        arguments = words(match[0])
        if arguments[0] == "generate":
            arguments += ["--count", "2"]
        if arguments[0] == "build" and "--batch" not in arguments and not REAL:
            arguments += ["--batch", str(batch)]
        result = CliRunner().invoke(main, arguments)
        refused = match[0].strip().startswith("$ ")
        assert result.exit_code == (2 if refused else 0), result.output
        if refused:
            assert text[match.end() :].splitlines()[1].strip() in result.output
    return names


def cut(path: Path, output: Path) -> None:
    """Write the checkpoint `path` with its first block alone, which is the route, to `output`."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["sg_export"])
    kept = {name: value for name, value in state.items() if re.match(r"(?!blocks\.)|blocks\.0\.", name)}
    save_file(kept, output, {"sg_export": json.dumps({**facts, "route": "0-0"})})


@pytest.fixture(autouse=True)
def _small_references(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give the names of the reference models to small ones, and enter an empty folder."""
    monkeypatch.chdir(tmp_path)
    if REAL:
        return
    folder = tmp_path_factory.mktemp("references")
    for name in ("glyphs", "glyphs-early"):
        cut(place_of(name), folder / (file := REFERENCES[name]))
        monkeypatch.setitem(REFERENCES, name, str(folder / file))


@pytest.mark.slow
def test_guidance_page_run_from_top_to_bottom_does_what_it_says() -> None:
    assert run("guidance.md", 2)["images"].shape == (1, 16, 16, 1)


@pytest.mark.slow
def test_production_page_run_from_top_to_bottom_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("production.md", 4)
    assert capsys.readouterr().out == "(2, 16, 16, 1)\n(1, 16, 16, 1)\n(4, 16, 16, 1)\n"
    assert names["latents"].shape == names["velocity"].shape == (2, 1, 16, 16)


@pytest.mark.slow
def test_text_to_image_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's folder `prx` is a tiny one, which `PRXPipeline.save_pretrained` writes."""
    write_full_pipeline(tmp_path / "prx")
    capsys.readouterr()
    names = run("text-to-image.md", 2)
    printed = ["(2, 64, 64, 3) uint8", "(2, 12, 16) (2, 12)", "True", "True", "(2, 48, 80, 3)"]
    assert capsys.readouterr().out.splitlines() == printed
    assert names["both"].weak is not None


@pytest.mark.slow
def test_pictures_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Any
) -> None:
    """The page's checkpoint is a tiny one, and its decoder that of a tiny autoencoder."""
    tiny.save(tmp_path / "latest.pt")
    autoencoder(channels=tiny.config.channels).save_pretrained(tmp_path / "vae")
    run("pictures.md", 2)
    assert capsys.readouterr().out == "(2, 64, 64, 3) uint8\n"


@pytest.mark.slow
def test_serving_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first server of the page runs, on a free port. The commands after it ask that server."""
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    build, serve = re.findall(r"^ {4}(sg-export (?:build|serve) [^\n]*)", text, re.MULTILINE)[:2]
    result = CliRunner().invoke(main, words(build) + ([] if REAL else ["--batch", "4"]))
    assert result.exit_code == 0, result.output
    answers = []
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server", *words(serve)[1:], "--threads", "1") as server:
        page = text.replace("http://127.0.0.1:8000", server.address)
        for match in re.finditer(r"^ {4}(curl (?:[^\n]*\\\n)*[^\n]*)|^```python\n([^`]*)```", page, re.MULTILINE):
            if match[2] is not None:
                exec(compile(match[2], "serving.md", "exec"), {})
            else:
                done = subprocess.run(match[1], shell=True, capture_output=True, text=True, timeout=120, check=True)
                answers.append(done.stdout)
    models, images, ready, metrics = answers
    assert [model["id"] for model in json.loads(models)["data"]] == ["glyphs-bundle"]
    assert [image["seed"] for image in json.loads(images)["data"]] == [7, 8]
    assert json.loads(ready)["models"] == {"glyphs-bundle": "ok"}
    assert 'sg_images_total{model="glyphs-bundle"} 3.0' in metrics
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (16, 16)
    # On a busy machine the window may end before the other requests arrive.
    assert re.fullmatch(r"6 \{[1-4]: \d(, [1-4]: \d)*\}\n", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_triton_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server of the page is a real one, on free ports."""
    text = (DOCS / "triton.md").read_text(encoding="utf-8")
    build, write = map(words, re.findall(r"^ {4}(sg-export (?:build|triton) [^\n]*)", text, re.MULTILINE)[:2])
    for arguments in (build + ([] if REAL else ["--batch", "2"]), write):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert result.output == "models/glyphs-bundle\n"
    (tmp_path / "server").mkdir()
    with running(Path("models").absolute(), tmp_path / "server") as server:
        (program,) = re.findall(r"^```python\n([^`]*)```", text, re.MULTILINE)
        exec(compile(program.replace("127.0.0.1:8000", server.http), "triton.md", "exec"), {})
    assert capsys.readouterr().out == "(2, 16, 16, 1) uint8\n"


def test_triton_page_names_every_input_and_parameter() -> None:
    text = (DOCS / "triton.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in ("class", "class_name", "prompt", "negative", "seed", "image"))
    assert all(f"`{name}`" in text for name in PARAMETERS)


def test_serving_page_names_every_field_error_and_metric() -> None:
    """The tables are compared with the code."""
    from sg_export.serving.errors import _STATUSES
    from sg_export.serving.metrics import Metrics
    from sg_export.serving.schema import ImagesRequest

    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    fields = {field.alias or name for name, field in ImagesRequest.model_fields.items()} - {"output_format"}
    assert all(f"`{name}`" in text for name in fields), fields
    rows = {
        code: status
        for status, codes in re.findall(r"^\| (\d+) \| (`[^|]*`) \|", text, re.MULTILINE)
        for code in codes.split(", ")
    }
    assert all(rows[f"`{code}`"] == str(status) for _, status, code in _STATUSES)
    names = {metric.name for metric in Metrics(["m"]).registry.collect()}
    assert all(re.search(rf"`{name}(_total)?`", text) for name in names), names


@pytest.mark.slow
def test_sampling_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    names = run("sampling.md", 8)
    assert capsys.readouterr().out == "(100, 16, 16, 1) uint8 [0 1 2]\n100 0\n"
    assert names["done"].sampled == 0
    for name, count in {"pictures": 100, "some": 20, "by-ray": 32}.items():
        assert len(list((tmp_path / name).glob("images/*.png"))) == count
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["00000.tar"]


def test_production_page_has_a_program_of_at_most_20_lines() -> None:
    programs = re.findall(r"^```python\n([^`]*)```", (DOCS / "production.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len([line for line in programs[0].splitlines() if line.strip()]) <= 20
