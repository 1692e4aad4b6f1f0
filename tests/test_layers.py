"""Check the import rules between packages, and that heavy imports wait until they are needed."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "sg_runtime": ROOT / "runtime/sg_runtime",
    "sg_engines": ROOT / "engines/sg_engines",
    "sg_calibration": ROOT / "calibration/sg_calibration",
    "sg_export": ROOT / "sg_export",
}

BACKENDS = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}
# Packages that each package may import besides itself and the standard library. The rule covers the
# entire package, including imports in functions and for type checking.
MAY_IMPORT = {
    "sg_runtime": {"numpy", "PIL", "ftfy", "pydantic", "ray", "tokenizers"}
    | {"triton_python_backend_utils"}
    | BACKENDS,
    "sg_engines": {"sg_runtime", "numpy", "onnx", "onnx_ir"} | BACKENDS,
    "sg_calibration": {"sg_runtime", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic"},
    "sg_export": {"sg_runtime", "sg_engines", "sg_calibration", "click", "numpy", "onnx", "onnx_ir", "onnxscript"}
    | {"PIL", "diffusers", "ml_dtypes", "polygraphy", "pydantic", "rich", "safetensors", "sympy", "torch"}
    | {"transformers"}
    | {"prometheus_client", "ray", "starlette", "uvicorn"}
    | BACKENDS,
}

HEAVY = {
    "diffusers",
    "ftfy",
    "matplotlib",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "polygraphy",
    "prometheus_client",
    "pydantic",
    "ray",
    "safetensors",
    "starlette",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "triton_python_backend_utils",
    "uvicorn",
} | BACKENDS
# Files that every user imports, by glob. They import `HEAVY` packages only inside functions.
LIGHT = {"sg_runtime": ["**/*.py"], "sg_export": ["__init__.py", "__main__.py", "cli/**/*.py"]}

NOT_LOADED = ["torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "ftfy", "tokenizers", "ray"]

# `require` is sg_runtime.extras.require.
IMPORT_FUNCTIONS = {"__import__", "import_module", "require"}


@dataclass(frozen=True)
class Import:
    """One absolute import. `at_load` is false in functions and under `if TYPE_CHECKING:`."""

    module: str
    line: int
    at_load: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports_of(source: str) -> list[Import]:
    """Return all imports of a module.

    These are statements at any depth and calls such as `import_module("torch")`.
    """
    return list(_walk(ast.parse(source), at_load=True))


def _walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_load)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield Import(node.module, node.lineno, at_load)
    elif isinstance(node, ast.Call) and node.args and _name(node.func) in IMPORT_FUNCTIONS:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield Import(argument.value, node.lineno, at_load)

    inside = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    unread = node.body if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, inside and child not in unread)


def _name(node: ast.expr) -> str | None:
    """Return `f` for both `f` and `module.f`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def found_in(files: list[Path]) -> list[tuple[str, Import]]:
    """Return the imports of all files, each with its `path:line`."""
    assert files
    return [
        (f"{file.relative_to(ROOT)}:{found.line}", found)
        for file in files
        for found in imports_of(file.read_text(encoding="utf-8"))
    ]


def run_python(code: str, *arguments: str, rooms: tuple[str, ...] = tuple(ROOMS)) -> str:
    """Run `code` in a fresh interpreter. Returns its stdout.

    The given packages of this checkout come first on its path.
    """
    path = os.pathsep.join(str(ROOMS[room].parent) for room in rooms)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_of_nested_statements_are_all_found() -> None:
    source = """
import one
from two.part import name
from . import sibling
if TYPE_CHECKING:
    import three
else:
    import four
try:
    import five
except ImportError:
    five = None
class C:
    import six
    def method(self):
        import seven
        return importlib.import_module("eight.part")
nine = require("nine", "extra")
"""
    found = {(item.package, item.at_load) for item in imports_of(source)}
    assert found == {
        ("one", True),
        ("two", True),
        ("three", False),
        ("four", True),
        ("five", True),
        ("six", True),
        ("seven", False),
        ("eight", False),
        ("nine", True),
    }


@pytest.mark.parametrize("room", ROOMS)
def test_imports_of_room_stay_in_its_layer(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room} | sys.stdlib_module_names
    strays = [
        f"{place}: {room} may not import {found.module}"
        for place, found in found_in(sorted(ROOMS[room].rglob("*.py")))
        if found.package not in allowed
    ]
    assert not strays, "\n".join(strays)


@pytest.mark.parametrize("room", LIGHT)
def test_imports_at_load_of_light_files_are_light(room: str) -> None:
    files = sorted({file for pattern in LIGHT[room] for file in ROOMS[room].glob(pattern)})
    strays = [
        f"{place}: import {found.module} in the function that needs it"
        for place, found in found_in(files)
        if found.at_load and found.package in HEAVY
    ]
    assert not strays, "\n".join(strays)


def test_import_sg_runtime_loads_no_backend() -> None:
    loaded = run_python(f"import sys, sg_runtime; print([name for name in {NOT_LOADED} if name in sys.modules])")
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("package", ["sg_runtime", "sg_export", "sg_calibration"])
@pytest.mark.parametrize("given", [None, "0"])
def test_import_of_a_package_turns_telemetry_off_unless_told_otherwise(
    package: str, given: str | None, tmp_path: Path
) -> None:
    """ONNX Runtime would leave an identifier of the device in the home folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    setting = {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    environment = kept | setting | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    code = f"import {package}, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == (given or "1")
    if given is None:
        assert not [*tmp_path.rglob("*")]


def test_help_loads_no_backend() -> None:
    code = f"""
import sys
from sg_export.cli import main
sys.argv = ["sg-export", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {NOT_LOADED} if name in sys.modules])
"""
    usage, loaded = run_python(code).rstrip().rsplit("\n", 1)
    assert "build" in usage
    assert loaded == "[]"


def test_sg_runtime_without_compiler_makes_images(glyphs_bundle: Path) -> None:
    code = """
import sys

class Blocked:
    names = {"torch", "onnx", "onnx_ir", "onnxscript", "sg_export", "sg_engines", "sg_calibration"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from sg_runtime import Pipeline

images = Pipeline.load(sys.argv[1])(classes=[0], seeds=[0], steps=2)
print(images.shape, images.dtype)
"""
    assert run_python(code, str(glyphs_bundle), rooms=("sg_runtime",)).strip() == "(1, 16, 16, 1) uint8"


def test_report_runs_on_a_machine_without_the_compiler(tiny_bundle: Path, tmp_path: Path) -> None:
    code = """
import sys

class Blocked:
    names = {"torch", "onnx", "onnx_ir", "onnxscript", "polygraphy"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from sg_export.cli import main

main(["report", sys.argv[1], "--quiet", "-o", sys.argv[2]], standalone_mode=False)
"""
    run_python(code, str(tiny_bundle), str(tmp_path / "report.html"))
    assert "<h2>Bundles</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def texts_of(file: Path) -> Iterator[str]:
    """Yield the text constants of a file without its docstrings."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    docs = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node.value


def test_messages_of_the_library_name_parameters_and_the_command_line_knows_each() -> None:
    """A message names a parameter in backticks, for which the command line shows its option.

    A text that is an option alone is a word of a command.
    """
    from sg_export.cli import main
    from sg_export.cli.output import with_options

    options = {name for command in main.commands.values() for option in command.params for name in option.opts}
    files = [file for room in ROOMS.values() for file in room.rglob("*.py") if "cli" not in file.parts]
    for file in files:
        for text in texts_of(file):
            named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
            assert not named or text == named[0], f"{file}: {text}: name the parameter, in backticks"
            for name in re.findall(r"`[a-z_]+`", text):
                assert with_options(name) in options, f"{file}: {name} is no parameter that the command line has"
