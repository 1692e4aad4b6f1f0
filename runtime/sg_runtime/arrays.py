"""Types of NumPy arrays, named by their content."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
"""float32 values: images, latents, predictions, noise."""

Indices = NDArray[np.int64]
"""int64 indices: kept tokens, class indices, table rows."""
