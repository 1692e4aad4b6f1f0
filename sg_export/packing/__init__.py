"""Packing of a bundle: its graphs, its folder, its engines."""
