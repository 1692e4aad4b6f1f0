"""Timing of a bundle, and of a loop in PyTorch."""
