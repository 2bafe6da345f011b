"""Adversarial robustness: attacks to measure it and to train for it."""

from jaxaccel.robustness.attacks import deepfool_linf, fgsm, pgd_linf, robust_accuracy

__all__ = ["deepfool_linf", "fgsm", "pgd_linf", "robust_accuracy"]
