"""Tests of boosting."""
