"""Runtime checks of the jaxtyping annotations of our own packages, for tests only."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import decode_source
from pathlib import Path
from types import ModuleType

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

CHECKED = ("kernels", "model", "parallel", "data")

# An int is a float wherever Python's type checkers say so.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


class Unchecked:
    """Finds modules that load as they are: those with Triton kernels, and those without a shape.

    Triton reads the source and the globals of the very function that it is given; a wrapped one
    has neither. What has no shape would cost a hundred times its own time for each small call.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The plain spec of such a module of ours; None for any other."""
        if name.split(".")[0] not in CHECKED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return None
        source = decode_source(Path(spec.origin).read_bytes())
        return spec if "triton.jit" in source or "[Tensor, " not in source else None


def check_imports() -> None:
    """From here on, modules of CHECKED are imported with every annotated call checked.

    A second call in one process changes nothing.
    """
    if any(isinstance(finder, Unchecked) for finder in sys.meta_path):
        return
    early = sorted(name for name in sys.modules if name.split(".")[0] in CHECKED)
    assert not early, f"imported before their shapes could be checked: {early}"
    install_import_hook(CHECKED, "tests.shapes.check")
    sys.meta_path.insert(0, Unchecked())
