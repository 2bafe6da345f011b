"""Tests of kernels_pallas.node_histogram."""
