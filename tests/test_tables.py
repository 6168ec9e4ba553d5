"""What the pages say about systems, recipes and pipelines is what their configs and results give."""

import pytest

from bench import pipeline, recipes, systems
from bench.tables import read


def test_the_table_of_systems_is_current() -> None:
    assert read("systems") == systems.table(), "write it anew: python -m bench.systems write"


def test_the_table_of_pipelines_is_current() -> None:
    assert read("pipeline") == pipeline.table(), "write it anew: python -m bench.pipeline write"


@pytest.mark.prove
def test_the_table_of_recipes_is_current() -> None:
    assert read("recipes") == recipes.table(), "write it anew: python -m bench.recipes write"
