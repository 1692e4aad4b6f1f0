"""NumPy arrays by what they hold."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
"""Images, latents, predictions, noise."""

Indices = NDArray[np.int64]
"""Kept tokens, class indices, rows of tables."""
