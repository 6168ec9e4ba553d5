"""The config of a run that is there: read again, changed where it may be, compared where it may not."""

from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Violation
from conf.reading import read_text
from conf.tree import parent_of, set_keys
from conf.user_files import FILE_KEY, Given
from train.checkpoint.records import read_record
from train.checkpoint.run_files import CONFIG_FILE, read_config
from train.config.versions import upgraded

# What may change between two starts of one run without making it another run.
CHANGEABLE = (
    *("run", "kernels", "checkpoint", "track", "cluster", "slurm", "plan", "rehearse", "parallel", "sample"),
)
CHANGEABLE_KEYS = (
    *(
        "train.micro_batch",
        "train.evaluate_every",
        "train.evaluate_rows",
        "train.final_rows",
        "train.max_skipped",
        # It is about the first start; what a resumed run reads is compared with its own checkpoint.
        "train.foreign_ids",
        "train.gc_every",
        "train.profile",
    ),
    "data.verify",
)


def saved_tree(directory: Path) -> dict[str, Any] | None:
    """The config that the run in a directory was started with, with the keys of today; None without a run.

    Raises as `saved_differences` does.
    """
    saved = read_config(directory)
    if saved is None:
        return None
    if not _is_of_run(saved):
        message = f"{directory / CONFIG_FILE} is not the config of a run; it may be that of weights"
        raise ConfigError([Violation("run.dir", f"{message}; give the directory of a run, or a new one")])
    return upgraded(saved, str(directory / CONFIG_FILE))


def saved_values(path: Path) -> dict[str, Any]:
    """All but run.dir and name of the run whose config a file holds, with the keys of today.

    Raises ConfigError where there is none, or of weights, CheckpointError for a file that is damaged.
    """
    # A file that is not there, or no text, is the user's to mend, a damaged one is not.
    read_text(path, FILE_KEY)
    saved = read_record(path)
    if saved is None or not _is_of_run(saved):
        message = f"{path} is not the config of a run; it may be that of weights, which is train.start=DIR; "
        hint = "a .json holds every key, a part of them stands in a .yaml"
        raise ConfigError([Violation(FILE_KEY, message + hint)])
    found = {name: value for name, value in upgraded(saved, str(path)).items() if name != "run"}
    if isinstance(track := found.get("track"), dict):
        found["track"] = {**track, "name": None}
    return found


def refuse_run_of_file(given: Given, composed: dict[str, Any]) -> None:
    """Raises ConfigError where the config of a run would begin that run again, or one without a name."""
    if given.file is None or not given.file.is_whole:
        return
    path, directory = Path(given.file.path), composed["run"].get("dir")
    is_same = isinstance(directory, str) and (Path(directory) / CONFIG_FILE).absolute() == path.absolute()
    if is_same:
        message = f"is that of {path}, which begins another run; give another, or leave config= out"
        raise ConfigError([Violation("run.dir", message)])
    if not {"run.dir", "run.name"} & set(given.typed_keys()):
        message = f"missing: {path} has all but a run.dir for the new run; give run.dir=DIR"
        raise ConfigError([Violation("run.dir", message)])


def _is_of_run(saved: dict[str, Any]) -> bool:
    return {"run", "train"} <= saved.keys()


def own_tree(given: Given, composed: dict[str, Any]) -> dict[str, Any] | None:
    """The config of the run in the run.dir that is typed, with the other values that are.

    None where run.dir is not typed or holds no run, where a group is typed that makes another run, and where
    a key is that `composed`, the config of the same overrides, does not have. Raises as `saved_differences`.
    """
    keys = given.all_keys()
    if "run.dir" not in keys or any("." not in key and key not in CHANGEABLE for key in keys):
        return None
    if given.file is not None and given.file.is_whole:
        return None
    found = {key: parent_of(composed, key) for key in keys}
    if any(parent is None or name not in parent for parent, name in found.values()):
        return None
    values = [(key, parent[name]) for key, (parent, name) in found.items() if parent is not None]
    directory = composed["run"]["dir"]
    tree = saved_tree(Path(directory)) if isinstance(directory, str) else None
    if tree is None:
        return None
    # A group stands for all of its keys, also those of free names such as the variables of slurm.env.
    tree |= {key: value for key, value in values if "." not in key}
    if violations := set_keys(tree, values):
        raise ConfigError(violations)
    return tree


def saved_differences(directory: Path, wanted: dict[str, Any]) -> list[Violation]:
    """The keys in which a plain config differs from that of the run in a directory, if one is there.

    Raises CheckpointError where the run's config is damaged and has no copy, ConfigError where an older
    version started it in a way that this one does not know.
    """
    saved = saved_tree(directory)
    if saved is None:
        return []
    # Mixers that are newer than the run, which it cannot have.
    saved["mixer"] = wanted["mixer"] | saved["mixer"]
    return differences(saved, wanted)


def differences(saved: object, now: object, prefix: str = "") -> list[Violation]:
    """The keys whose values differ between two plain config trees, changeable ones left out."""
    if prefix in CHANGEABLE or prefix in CHANGEABLE_KEYS or saved == now:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        found = []
        for key in sorted(saved.keys() | now.keys()):
            name = f"{prefix}.{key}" if prefix else str(key)
            found += differences(saved.get(key), now.get(key), name)
        return found
    return [Violation(prefix, f"the run was started with {saved!r}; found {now!r}")]
