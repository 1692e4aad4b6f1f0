"""The public names of `sg_export`, which are imported on first use."""

import inspect

import pytest

import sg_export


@pytest.mark.parametrize("name", sg_export.__all__)
def test_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(sg_export, name)
    assert not inspect.ismodule(value)
    assert value.__name__ == name


def test_compile_stays_a_function_after_its_module_is_imported() -> None:
    from sg_export import CompileOptions, compile

    assert inspect.isfunction(compile)
    assert inspect.isclass(CompileOptions)
