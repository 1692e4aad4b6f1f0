"""Execution of one run: prepared inputs, graph launches, buffers, lanes, sampling."""
