"""What graphs and steps cost, counted from the graphs."""
