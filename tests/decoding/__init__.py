"""Tests of jaxaccel.decoding."""
