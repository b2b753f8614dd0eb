"""Attach the method to the models of other libraries. Each package here loads its library when it is imported."""

from .torchvision_ops import repair_torchvision

__all__ = ["repair_torchvision"]
