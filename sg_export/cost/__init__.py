"""Costs of graphs and steps, counted from the graphs."""
