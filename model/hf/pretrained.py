"""Models from directories as on the Hugging Face hub, and back."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError
from model.config import Architecture
from model.hf.family import Family, families, family_of
from model.hf.fields import Fields
from model.hf.files import CONFIG, SHARD_BYTES, HubDirectory, check_dtype, shortened, write_directory
from model.hf.pieces import Mapped
from model.language_model import LanguageModel


def load_pretrained(directory: str | Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model in a hub directory, its weights in `dtype`. Reads one tensor at a time.

    Raises CheckpointError, before anything is loaded, for missing, unexpected, misshaped or quantised
    tensors, lost experts, unknown config fields, truncated files and pickles. Tensors of modules that predict
    ahead may be missing as a whole: transformers drops them; the model then has none, and says so.
    """
    hub = HubDirectory(Path(directory))
    family = family_of(hub.config.get("model_type"), str(hub.path / CONFIG))
    config = read_config(hub, family)
    hub.check()
    names = {name for name in hub.names if not _is_like(name, family.ignored)}
    pattern = family.prediction
    if pattern and config.model.prediction.depth and not any(re.fullmatch(pattern, name) for name in names):
        print(
            f"{hub.path}: has no tensors for model.prediction.depth={config.model.prediction.depth}; without"
        )
        config = without_prediction(config)
    with torch.device("meta"):
        model = LanguageModel(config, dtype)
    mapped = Mapped(family.pieces(config), state_of(model))
    expected = set(mapped.by_theirs)
    _refuse(hub, "missing", expected - names)
    _refuse(hub, "unexpected", names - expected)
    model.to(dtype).to_empty(device="cpu")
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            module.reset_buffers()  # pyright: ignore[reportCallIssue]
    ours = state_of(model)
    with torch.no_grad():
        for name, tensor in hub.tensors():
            if name in expected:
                check_dtype(name, tensor)
                mapped.read(name, tensor, ours)
    return model


def save_pretrained(
    model: LanguageModel,
    directory: str | Path,
    *,
    model_type: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the model as a hub directory that transformers opens.

    `model_type` picks among families that can hold the architecture; None takes the first.

    Raises CheckpointError when the directory exists, or no family holds the architecture or a buffer that is
    not zero, StorageError.
    """
    family, config = family_for(model.config, model_type)
    ours = state_of(model)
    mapped = Mapped(family.pieces(model.config), ours)
    lost = [name for name in mapped.uncovered if bool(ours[name].any())]
    if lost:
        raise CheckpointError(f"{family.model_type} has no place for {shortened(lost)}, which are not zero")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    common = {"model_type": family.model_type, "architectures": [family.class_name], "dtype": dtype}
    # Special tokens belong to a tokenizer. Left out they would take the family's own, out of range here.
    common |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(mapped.by_theirs):
            yield name, mapped.write(name, ours)

    with torch.no_grad():
        write_directory(Path(directory), common | config, tensors(), shard_bytes)


def read_config(hub: HubDirectory, family: Family) -> Architecture:
    """The architecture that the directory's config describes. Raises CheckpointError."""
    fields = Fields(hub.config, str(hub.path / CONFIG), family.aliases)
    overrides = family.read(fields)
    fields.finish()
    try:
        return compose(overrides, Architecture)
    except ConfigError as error:
        raise CheckpointError(f"{hub.path / CONFIG}: {error}") from error


def family_for(config: Architecture, model_type: str | None) -> tuple[Family, dict]:
    """The family that holds the architecture, and its config.json.

    Raises CheckpointError with what each family lacks.
    """
    reasons = []
    for name, family in families().items():
        if model_type not in (None, name):
            continue
        try:
            written = family.write(config)
            again = compose(family.read(Fields(written, name, family.aliases)), Architecture)
        except (CheckpointError, ConfigError) as error:
            reasons.append(f"{name}: {error}")
            continue
        if used(again) == used(config):
            return family, written
        reasons.append(f"{name}: {difference(used(config), used(again))}")
    raise CheckpointError("no family holds this architecture\n" + "\n".join(reasons))


def used(config: Architecture) -> dict:
    """The architecture as plain values, without mixers and experts that no layer uses."""
    tree = config.model_dump(mode="json")
    tree["layers"] = [list(layer) for layer in config.layers]
    ahead = config.model.prediction
    names = {layer.mixer for layer in config.layers} | ({ahead.mixer} if ahead.depth else set())
    ffns = {layer.ffn for layer in config.layers} | ({ahead.ffn} if ahead.depth else set())
    tree["mixer"] = {name: entry for name, entry in tree["mixer"].items() if name in names}
    del tree["layout"]
    if not ffns - {"dense", "none"}:
        del tree["moe"]
    if not ffns & {"dense", "shortcut"}:
        del tree["model"]["ffn_hidden"]
    if not ahead.depth:
        del tree["model"]["prediction"]
    for name in ("balance_loss", "balance_scope", "z_loss", "bias_rate"):
        tree.get("moe", {}).pop(name, None)
    del tree["model"]["init_std"], tree["residual"]["dropout"]
    return tree


def difference(ours: object, theirs: object, key: str = "") -> str:
    """The first key in which two trees differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            found = difference(ours.get(name), theirs.get(name), f"{key}.{name}" if key else str(name))
            if found:
                return found
        return ""
    return "" if ours == theirs else f"{key} is {ours!r}, but would be read back as {theirs!r}"


def without_prediction(config: Architecture) -> Architecture:
    """The same without modules that predict ahead."""
    prediction = config.model.prediction.model_copy(update={"depth": 0})
    return config.model_copy(update={"model": config.model.model_copy(update={"prediction": prediction})})


def state_of(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers by name, to be written to in place."""
    return model.state_dict(keep_vars=True)


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _refuse(hub: HubDirectory, what: str, names: set[str]) -> None:
    if names:
        raise CheckpointError(f"{hub.path}: {what} tensors: {shortened(names)}")
