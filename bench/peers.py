"""Independent models by transformers, with the weights of ours."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from model.hf.pretrained import save_pretrained
from model.language_model import LanguageModel


def as_transformers(model: LanguageModel, model_type: str) -> Any:
    """transformers' model of the same architecture and weights, float32, ready for evaluation."""
    # With fla installed and no GPU transformers would pick kernels that cannot run here.
    sys.modules.setdefault("fla", None)  # pyright: ignore[reportArgumentType]
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        save_pretrained(model, path, model_type=model_type)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return theirs.eval()
