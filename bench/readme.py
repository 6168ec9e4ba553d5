"""Tables that README.md takes from benchmarks, between marks of their own."""

from pathlib import Path

README = Path("README.md")


def show(table: str, name: str, arguments: list[str]) -> None:
    """Prints the table, or, asked to `write`, puts it between the marks of its name in README.md."""
    if arguments == ["write"]:
        start, end = marks(name)
        before, _, rest = README.read_text().partition(start)
        README.write_text(before + start + table + end + rest.partition(end)[2])
    else:
        print(table, end="")


def read(name: str) -> str:
    """What stands between the marks of a name."""
    start, end = marks(name)
    return README.read_text().partition(start)[2].partition(end)[0]


def marks(name: str) -> tuple[str, str]:
    """The lines before and behind a table."""
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
