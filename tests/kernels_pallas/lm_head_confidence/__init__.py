"""Tests of kernels_pallas.lm_head_confidence."""
