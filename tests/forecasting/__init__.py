"""Tests of jaxaccel.forecasting."""
