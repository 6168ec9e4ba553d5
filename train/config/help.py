"""The help page of a command whose arguments are the config of a run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from conf.compose import Config
from conf.help import Page
from conf.keys import sections

if TYPE_CHECKING:
    from train.config.fields import RunDraft

ARGUMENTS = {
    "GROUP=OPTION": "a file of conf/GROUP, such as optim=lion",
    "KEY=VALUE": "a value within a group, such as optim.lr=3e-4; it wins over every file",
    "config=FILE": "values and options in a .yaml of your own, or all of them in the config.json of a run",
    "--config-dir DIR": "options of your own, DIR/GROUP/NAME.yaml; Hydra's hydra.searchpath=[file://DIR]",
}


def run_page(about: str | None, examples: Sequence[str], arguments: Mapping[str, str] | None = None) -> Page:
    """The page, with every part of the config. about is the docstring of the command's module."""
    assert about is not None, "every command has a docstring"
    return Page(about, examples, {**ARGUMENTS, **(arguments or {})}, sections=sections, root=_fields)


def layout_page(about: str | None, examples: Sequence[str], fields: type[Config]) -> Page:
    """The page of a command that reads a run and takes keys of `parallel`. about as in `run_page`."""
    assert about is not None, "every command has a docstring"
    said = "in place of the run's own, such as parallel.ep=2; python -m train --help=parallel shows the keys"
    return Page(about, examples, {"parallel.KEY=VALUE": said}, fields)


def _fields() -> "type[RunDraft]":
    # Types are wanted only by who asks for the keys of a section.
    from train.config.fields import RunDraft

    return RunDraft
