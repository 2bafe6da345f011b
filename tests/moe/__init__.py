"""Tests of jaxaccel.moe."""
