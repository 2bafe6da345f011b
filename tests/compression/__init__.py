"""Tests of jaxaccel.compression."""
