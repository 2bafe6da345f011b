"""Tests of jaxaccel.caching."""
