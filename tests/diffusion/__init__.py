"""Tests of continuous diffusion."""
