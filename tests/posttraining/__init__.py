"""Tests of jaxaccel.posttraining."""
