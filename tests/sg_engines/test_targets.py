"""The data types that each GPU supports."""

from collections.abc import Sequence

import pytest
import tensorrt_rtx

from sg_engines.targets import RTX_PRODUCTS, TENSORRT_PRODUCTS, check_gpu, check_targets
from sg_runtime.errors import UsageError

FROM_AMPERE = (80, 86, 89, 120, 121)


def test_table_has_the_gpus_that_the_library_has() -> None:
    """A newer TensorRT-RTX may build for more GPUs: then review the table."""
    names = tensorrt_rtx.ComputeCapability.__members__
    assert {f"SM{number}" for number in RTX_PRODUCTS} == {name for name in names if name.startswith("SM")}


@pytest.mark.parametrize(
    ("numbers", "products"),
    [
        (FROM_AMPERE, ["fp32", "fp16", "bf16"]),
        ((86, 89, 120), ["int8", "fp16", "fp32"]),
        ((89, 120, 121), ["fp8", "fp16"]),
        ((75,), ["fp16"]),
        ((75, 120), ["fp16", "fp16"]),
        ((75, 86), []),
        ((), ["fp8", "fp32"]),
    ],
)
def test_check_targets_of_types_that_all_gpus_have_passes(numbers: Sequence[int], products: list[str]) -> None:
    check_targets("tensorrt_rtx", numbers, products)


@pytest.mark.parametrize("products", [["fp32"], ["fp8"], []])
def test_check_targets_without_gpus_passes_for_tensorrt(products: list[str]) -> None:
    check_targets("tensorrt", (), products)


@pytest.mark.parametrize(
    ("numbers", "products", "message"),
    [
        (
            (75,),
            ["fp32"],
            "{} 75: expected matrix products in fp16, found fp32: {}: 80, 86, 89, 120, 121",
        ),
        (
            (75,),
            ["bf16"],
            "{} 75: expected matrix products in fp16, found bf16: {}: 80, 86, 89, 120, 121",
        ),
        (
            (75,),
            ["fp32", "bf16"],
            "{} 75: expected matrix products in fp16, found bf16, fp32: {}: 80, 86, 89, 120, 121",
        ),
        (
            (75,),
            ["int8"],
            "{} 75: expected matrix products in fp16, found int8: {}: 80, 86, 89, 120, 121",
        ),
        ((75,), ["fp8"], "{} 75: expected matrix products in fp16, found fp8: {}: 89, 120, 121"),
        (
            (80,),
            ["fp8"],
            "{} 80: expected matrix products in bf16, fp16, fp32, int8, found fp8: {}: 89, 120, 121",
        ),
        (
            (86,),
            ["fp32", "fp8"],
            "{} 86: expected matrix products in bf16, fp16, fp32, int8, found fp8: {}: 89, 120, 121",
        ),
        (
            (89, 80),
            ["fp8"],
            "{} 80: expected matrix products in bf16, fp16, fp32, int8, found fp8: {}: 89, 120, 121",
        ),
    ],
)
def test_check_targets_of_a_type_that_a_gpu_has_not_names_those_that_have(
    numbers: Sequence[int], products: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_targets("tensorrt_rtx", numbers, products)
    assert str(caught.value) == message.format(
        "`compute_capabilities`", "give another `precision`, or GPUs that support it"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("number", [90, 70, 87, 100])
def test_check_targets_of_a_gpu_without_rtx_names_other_targets(number: int) -> None:
    with pytest.raises(UsageError) as caught:
        check_targets("tensorrt_rtx", (86, number), ["fp16"])
    assert str(caught.value) == (
        f"`compute_capabilities` {number}: TensorRT-RTX builds for 75, 80, 86, 89, 120, 121: for others, such as "
        f"H100 (90), Jetson Orin (87) and Thor (110), build with TensorRT on that GPU, or build ONNX graphs"
    )


@pytest.mark.parametrize("number", [75, 86, 90])
def test_check_targets_of_a_gpu_for_tensorrt_is_refused(number: int) -> None:
    with pytest.raises(UsageError) as caught:
        check_targets("tensorrt", (number,), ["fp16"])
    assert str(caught.value) == (
        f"`compute_capabilities` {number}: TensorRT builds for the GPU that it runs on: leave out "
        f"`compute_capabilities`, or build with TensorRT-RTX"
    )


@pytest.mark.parametrize(
    ("number", "products"),
    [(87, ["fp32", "bf16", "int8"]), (101, ["fp8", "fp16"]), (110, ["fp8", "bf16"]), (90, ["fp8"]), (130, ["fp8"])],
    ids=["Orin", "Thor, CUDA 12", "Thor, CUDA 13", "H100", "a newer one"],
)
def test_check_gpu_of_types_that_it_has_passes(number: int, products: list[str]) -> None:
    check_gpu("a GPU", number, products)


@pytest.mark.parametrize(
    ("name", "number", "products", "types", "found"),
    [
        ("Orin", 87, ["fp8", "fp32"], "bf16, fp16, fp32, int8", "fp8"),
        ("Tesla T4", 75, ["bf16", "fp32"], "fp16, fp32, int8", "bf16"),
    ],
)
def test_check_gpu_of_a_type_that_it_has_not_names_those_that_it_has(
    name: str, number: int, products: list[str], types: str, found: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_gpu(name, number, products)
    assert str(caught.value) == (
        f"`precision`: {name} (SM {number}): expected matrix products in {types}, found {found}: give another precision"
    )


def test_tables_agree_on_gpus_of_both_libraries() -> None:
    """TensorRT-RTX has FP16 products alone on 7.5."""
    both = RTX_PRODUCTS.keys() & TENSORRT_PRODUCTS.keys()
    assert {number for number in both if RTX_PRODUCTS[number] != TENSORRT_PRODUCTS[number]} == {75}
