"""Making a bundle: what goes into it, its folder, its engines."""
