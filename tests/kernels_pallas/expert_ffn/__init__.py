"""Tests of the union kernel."""
