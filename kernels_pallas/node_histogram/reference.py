"""The sums, naively: one addition for each row and feature."""

import numpy as np


def naive(bins: np.ndarray, node: np.ndarray, stats: np.ndarray, n_nodes: int, n_bins: int) -> np.ndarray:
    """Sums [F, N, B, K] in float64 of rows whose node and bin exist."""
    features, rows = bins.shape
    sums = np.zeros((features, n_nodes, n_bins, stats.shape[1]))
    for f in range(features):
        for i in range(rows):
            if 0 <= node[i] < n_nodes and 0 <= bins[f, i] < n_bins:
                sums[f, node[i], bins[f, i]] += np.asarray(stats[i], np.float64)
    return sums
