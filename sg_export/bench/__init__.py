"""Timing of a bundle and of PyTorch."""
