"""Tests of block top-k attention."""
