"""Attention with and without a bias, from PyTorch through the operator to the form of a backend."""

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sg_export.graph.attention import lower_attention, translate_attention
from sg_export.graph.opset import DEFAULT_OPSET

HEADS, SIZE = 2, 4


class Attend(nn.Module):
    """Attention of tokens (B, N, D) to longer keys and values (B, L, D)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in (query, key, value))  # type: ignore[no-untyped-call]
        mask = None if bias is None else bias[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def example(masked: bool) -> tuple[Tensor, ...]:
    """Return inputs of `Attend` for two images; a bias pads two keys of the second image."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, count, HEADS * SIZE, generator=generator) for count in (3, 5, 5))
    return (query, key, value, torch.tensor([[0.0] * 5, [0, -1e4, -1e4, 0, 0]])) if masked else (query, key, value)


def exported(values: tuple[Tensor, ...]) -> ir.Model:
    """Return the model of `Attend` with nodes `Attention`."""
    program = torch.onnx.export(
        torch.export.export(Attend(), values),
        opset_version=DEFAULT_OPSET,
        verbose=False,
        custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: translate_attention},
    )
    assert program is not None
    return program.model


# PyTorch's exporter warns about its own deprecated parts.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "bias"])
def test_lowered_attention_equals_pytorch(masked: bool) -> None:
    values = example(masked)
    model = exported(values)
    lower_attention(model.graph)
    counts = [node.op_type for node in model.graph]
    assert "Attention" not in counts
    assert counts[counts.index("Softmax") - 1] == ("Add" if masked else "MatMul")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))
    # Sums of at most five products, rounded to FP32.
    torch.testing.assert_close(torch.from_numpy(found), Attend()(*values), rtol=0, atol=1e-6)
