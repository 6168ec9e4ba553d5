"""What every process of a test has imported before it starts: a run, with its shapes checked."""

from tests import shapes

shapes.check_imports()

import train.loop.run  # noqa: E402, F401 (only what is imported after the hook is checked)
