"""Multimodal dataset distillation: small synthetic image-text sets that train retrieval models."""

import os

# Before anything imports huggingface_hub: its requests then do not tell what is installed here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
