"""What README.md says about the published systems is what their configs give."""

from bench.readme import read
from bench.systems import table


def test_the_table_of_systems_is_current() -> None:
    assert read("systems") == table(), "write it anew: python -m bench.systems write"
