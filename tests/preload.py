"""What every process of a test has before it starts: a run imported with its shapes checked, and configs."""

import gc
from pathlib import Path

from tests import shapes

shapes.check_imports()

# Only what is imported after the hook is checked. Runs import Hydra and matplotlib when they need them.
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import rich.console  # noqa: E402
import rich.table  # noqa: E402, F401

import train.__main__  # noqa: E402
import train.loop.run  # noqa: E402, F401
from tests.train.runs import overrides_of  # noqa: E402
from train.config.load import load_config  # noqa: E402

# Hydra composes a choice of groups once per process, and then only sets values.
for precision in ("", "precision=fp32", "precision=fp64"):
    load_config(overrides_of(Path("dataset"), Path("tree"), Path("run"), *filter(None, [precision])), 1)
# A collection in a fork would read, and so copy, every object that it has from here.
gc.collect()
gc.freeze()
