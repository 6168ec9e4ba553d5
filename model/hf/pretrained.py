"""Models from directories as on the Hugging Face hub, and back."""

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError
from conf.names import shortened
from model.config import Architecture
from model.hf.family import Family, families, family_of
from model.hf.fields import Fields
from model.hf.files import CONFIG, DTYPES, SHARD_BYTES, HubDirectory, write_directory
from model.hf.own import OWN
from model.hf.pieces import Mapped, PieceView
from model.language_model import LanguageModel

# How the names of quantised tensors and of their scales end on the hub.
_QUANTISED = re.compile(r".*(_blocks|_scales|_scale_inv|_packed|\.(weight_scale|scale|qweight|qzeros|g_idx))")


class Opened(NamedTuple):
    """A checkpoint whose config and tensors fit each other; no tensor is read yet.

    model stands on the meta device. mapped may lack tensors that the directory has and that say nothing.
    """

    hub: HubDirectory
    family: Family
    model: LanguageModel
    mapped: Mapped


def open_pretrained(directory: str | Path, dtype: torch.dtype = torch.float32) -> Opened:
    """The checkpoint in a directory, checked as a whole.

    Raises CheckpointError for missing, unexpected, misshaped or quantised tensors, lost experts, unknown
    config fields, truncated files and pickles. Tensors of MTP modules may be missing as a
    whole: transformers drops them; the model then has none, and says so.
    """
    hub = HubDirectory(Path(directory))
    if line := hub.passed_over():
        print(line)
    where = f"{hub.path / CONFIG}: model_type"
    family = family_of(every_family(), hub.config.get("model_type"), where)
    config = read_config(hub, family)
    forms = hub.forms()
    left_out = family.leaves_out(config, forms)
    if left_out:
        print(f"{hub.path}: leaves out {len(left_out)} tensors of other parts, such as {min(left_out)}")
    surplus = left_out | set(family.surplus(config))
    names = {name for name in forms.keys() - surplus if not _is_like(name, family.ignored)}
    pattern = family.mtp and family.mtp.replace("{depth}", str(config.model.depth))
    if pattern and config.model.mtp.depth and not any(re.fullmatch(pattern, name) for name in names):
        print(f"{hub.path}: has no tensors for model.mtp.depth={config.model.mtp.depth}; without")
        config = without_prediction(config)
    with torch.device("meta"):
        model = LanguageModel(config, dtype)
    shapes = {name: forms[name][0] for name in names}
    mapped = Mapped(family.pieces_found(config, shapes), state_of(model))
    expected = set(mapped.by_theirs)
    quantised = sorted(name for name in names - expected if _QUANTISED.fullmatch(name))
    if quantised:
        raise CheckpointError(f"{hub.path}: quantised tensors: {shortened(quantised)}; dequantise them first")
    _refuse(hub, "missing", expected - names)
    _refuse(hub, "unexpected", names - expected)
    _refuse_forms(hub, mapped, forms)
    return Opened(hub, family, model, mapped)


def load_pretrained(directory: str | Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model in a directory of the hub or of our own, its weights in `dtype`. Reads one tensor at a time.

    What must stay float32 does (`Initial.is_float32`, `Family.float32`).

    Raises CheckpointError, before anything is loaded, for all that `open_pretrained` refuses.
    """
    hub, family, model, mapped = open_pretrained(directory, dtype)
    kept = family.float32_of(mapped, model)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    model.to_empty(device="cpu")
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            module.reset_buffers()  # pyright: ignore[reportCallIssue]
    ours = state_of(model)
    with torch.no_grad():
        for name, tensor in hub.tensors():
            if name in mapped.by_theirs:
                mapped.read(name, tensor, ours)
    return model


def save_pretrained(
    model: LanguageModel,
    directory: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer_digest: str | None = None,
    facts: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Writes the model as a hub directory that transformers opens; gives the name of its family.

    `model_type` picks among families that can hold the architecture; None takes the first; weft is our own.
    A `dtype` of None keeps that of every tensor; another one leaves in float32 what must stay so.
    `tokenizer_digest` is the sha256 of the tokenizer whose ids the model was trained on, written beside.
    facts are as in `Export`.

    Raises CheckpointError when the directory exists, or no family holds the architecture or a buffer that is
    not zero, StorageError.
    """
    ours = state_of(model)
    export = Export(model, model_type, dtype, facts)
    export.refuse_lost(ours.__getitem__)
    with torch.no_grad():
        tensors = export.tensors(view=lambda piece: piece.ours_view(ours[piece.ours]))
        write_directory(Path(directory), export.fields, tensors, shard_bytes, tokenizer_digest)
    return export.family.model_type


class Export:
    """A model as a directory of the hub: the family, its config.json, and what its files hold.

    The model may stand on the meta device: its numbers come from outside.
    """

    def __init__(
        self,
        model: LanguageModel,
        model_type: str | None = None,
        dtype: torch.dtype | None = None,
        facts: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """model_type and dtype as in `save_pretrained`. Raises CheckpointError when no family fits.

        facts are fields of config.json that the architecture does not say: special tokens, context length.
        """
        self.family, fields = family_for(model.config, model_type)
        self._config, self._ours, self._dtype = model.config, state_of(model), dtype
        self._mapped = Mapped(self.family.pieces(model.config), self._ours)
        self._kept = self.family.float32_of(self._mapped, model)
        self.fields = full_config(self.family, fields, dtype or next(model.parameters()).dtype) | dict(facts)
        # In the order of the files; the second is what a tensor is a copy of.
        self._sources = {name: name for name in sorted(self._mapped.by_theirs)}
        self._sources |= self.family.copies(model.config)

    def refuse_lost(self, read: Callable[[str], Tensor]) -> None:
        """Raises CheckpointError for a buffer of ours that the family has no place for and is not zero."""
        lost = [name for name in self._mapped.uncovered if bool(read(name).any())]
        if lost:
            raise CheckpointError(
                f"{self.family.model_type} has no place for {shortened(lost)}, which are not zero"
            )

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Bytes of every tensor of the directory, in the order of its files; nothing is read."""
        for name, source in self._sources.items():
            dtype = self._mapped.dtype_of(source, self._ours, self._dtype, self._kept)
            yield name, math.prod(self._mapped.shapes[source]) * dtype.itemsize
        yield from ((name, tensor.nbytes) for name, tensor in self.family.derived(self._config))

    def tensors(
        self, names: Container[str] | None = None, *, view: PieceView
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, of all by default, one made at a time; view as in `Mapped.write`."""
        for name, source in self._sources.items():
            if names is None or name in names:
                yield name, self._mapped.write(source, self._ours, self._dtype, self._kept, view)
        for name, tensor in self.family.derived(self._config):
            if names is None or name in names:
                yield name, tensor


def full_config(family: Family, fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json: the family's fields and those that every one has."""
    name = str(dtype).removeprefix("torch.")
    common = {"model_type": family.model_type, "architectures": [family.class_name], "dtype": name}
    # Special tokens belong to a tokenizer. Left out they would take the family's own, out of range here.
    return common | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | fields


def read_config(hub: HubDirectory, family: Family) -> Architecture:
    """The architecture that the directory's config describes. Raises CheckpointError."""
    for part in (hub.config, *hub.config.values()):
        if isinstance(part, dict) and (quantised := part.get("quantization_config")):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise CheckpointError(
                f"{hub.path / CONFIG}: quantization_config says that tensors are quantised ({method}); "
                "dequantise them first, and drop the field"
            )
    fields = Fields(hub.config, str(hub.path / CONFIG), family.aliases)
    with fields.reading():
        overrides = family.read(fields)
    fields.finish()
    try:
        return compose(overrides, Architecture)
    except ConfigError as error:
        raise CheckpointError(f"{hub.path / CONFIG}: {error}") from error


def every_family() -> dict[str, Family]:
    """Families of the hub and our own form."""
    return families() | {OWN.model_type: OWN}


def family_for(config: Architecture, model_type: str | None) -> tuple[Family, dict]:
    """The family that holds the architecture, and its config.json.

    Raises CheckpointError with what each family lacks.
    """
    reasons = []
    chosen = [*families()] if model_type is None else [model_type]
    for name in chosen:
        family = family_of(every_family(), name, "model_type")
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
    mtp = config.model.mtp
    names = {layer.mixer for layer in config.layers} | ({mtp.mixer} if mtp.depth else set())
    ffns = {layer.ffn for layer in config.layers} | ({mtp.ffn} if mtp.depth else set())
    tree["mixer"] = {name: entry for name, entry in tree["mixer"].items() if name in names}
    del tree["layout"]
    if not ffns - {"dense", "none"}:
        del tree["moe"]
    if not ffns & {"dense", "shortcut"}:
        del tree["model"]["ffn_hidden"], tree["model"]["activation"]
    if not mtp.depth:
        del tree["model"]["mtp"]
    else:
        del tree["model"]["mtp"]["coefficient"]
    for name in ("balance_loss", "balance_scope", "z_loss", "bias_rate"):
        tree.get("moe", {}).pop(name, None)
    for mixer in tree["mixer"].values():
        mixer.pop("index_loss", None)
        if mixer.get("rotary_scaling", {}).get("kind") == "none":
            mixer["rotary_scaling"] = {"kind": "none"}
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
    """The same without MTP modules."""
    mtp = config.model.mtp.model_copy(update={"depth": 0})
    return config.model_copy(update={"model": config.model.model_copy(update={"mtp": mtp})})


def state_of(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers by name, to be written to in place."""
    return model.state_dict(keep_vars=True)


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _refuse_forms(hub: HubDirectory, mapped: Mapped, forms: dict[str, tuple[tuple[int, ...], str]]) -> None:
    wrong = [
        f"{name} (found {list(forms[name][0])}, expected {list(shape)})"
        for name, shape in mapped.shapes.items()
        if forms[name][0] != shape
    ]
    if wrong:
        raise CheckpointError(f"{hub.path}: misshaped tensors: {shortened(wrong)}")
    wrong = [f"{name} ({forms[name][1]})" for name in mapped.shapes if forms[name][1] not in DTYPES]
    if wrong:
        raise CheckpointError(
            f"{hub.path}: tensors that are in no plain floating-point format: {shortened(wrong)}; "
            "dequantise them first"
        )


def _refuse(hub: HubDirectory, what: str, names: set[str]) -> None:
    if names:
        raise CheckpointError(f"{hub.path}: {what} tensors: {shortened(names)}")
