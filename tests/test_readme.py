"""What README.md says about the published systems is what their configs give."""

from bench.systems import END, README, START, table


def test_the_table_of_systems_is_current() -> None:
    said = README.read_text().partition(START)[2].partition(END)[0]
    assert said == table(), "write it anew: python -m bench.systems write"
