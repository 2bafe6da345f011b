"""Tests of kernels_pallas.local_linear_attention."""
