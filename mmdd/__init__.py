"""Multimodal dataset distillation: small synthetic image-text sets that train retrieval models."""

__version__ = "0.1.0"
