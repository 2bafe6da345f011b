"""Tests of kernels_pallas.modulated_residual."""
