"""Tests of jaxaccel.attention."""
