"""Operators with a weight."""

from sg_export.graph.products import belongs


def test_belongs_goes_by_whole_parts_of_names() -> None:
    assert belongs("blocks.2.attn.qkv.weight", ("blocks.2",))
    assert not belongs("blocks.21.attn.qkv.weight", ("blocks.2",))
    assert not belongs("blocks.2.attn.qkv.weight", ())
