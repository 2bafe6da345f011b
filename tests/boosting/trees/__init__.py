"""Tests of jaxaccel.boosting.trees."""
