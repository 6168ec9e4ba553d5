"""Text models that transformers only has inside a model with a vision tower."""

import json
from pathlib import Path
from typing import Any

import torch


def open_beside_vision(
    directory: Path, model_type: str, class_name: str, vision: dict[str, Any], **more: Any
) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model of a directory, with a small vision tower of random weights; more: of other parts.

    And by kind the tensors that it missed or did not expect, less those of the tower and its projector.
    """
    import transformers

    config = json.loads((directory / "config.json").read_text())
    beside = config.get("thinker_config", config)
    text = beside.get("text_config", beside)
    whole = directory.with_name(f"{directory.name}_beside_vision")
    whole.mkdir()
    fields = {"model_type": model_type, "architectures": [class_name], "dtype": config["dtype"]}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    tree = {**fields, **tied, "text_config": text, "vision_config": vision, **more}
    (whole / "config.json").write_text(json.dumps(tree))
    (whole / "model.safetensors").hardlink_to(directory / "model.safetensors")
    theirs, info = getattr(transformers, class_name).from_pretrained(
        whole,
        dtype=torch.get_default_dtype(),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    # Its row of the embedding would have no gradient.
    theirs.get_input_embeddings().padding_idx = None
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {kind: {name for name in info[kind] if not _is_vision(name)} for kind in kinds}
    return theirs.eval(), found


def _is_vision(name: str) -> bool:
    return name.startswith(
        ("model.vision", "model.visual", "model.audio_tower", "model.multi_modal_projector")
    )
