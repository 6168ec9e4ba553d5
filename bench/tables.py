"""Tables that pages take from benchmarks, between marks of their own."""

from pathlib import Path

# The page of each table.
PAGES = {
    "systems": Path("docs/models.md"),
    "equality": Path("docs/parallelism.md"),
    "pipeline": Path("docs/parallelism.md"),
    "recipes": Path("docs/planning.md"),
}


def show(table: str, name: str, arguments: list[str]) -> None:
    """Prints the table, or, asked to `write`, puts it between the marks of its name in its page."""
    if arguments == ["write"]:
        start, end = marks(name)
        before, _, rest = PAGES[name].read_text().partition(start)
        PAGES[name].write_text(before + start + table + end + rest.partition(end)[2])
    else:
        print(table, end="")


def read(name: str) -> str:
    """What stands between the marks of a name."""
    start, end = marks(name)
    return PAGES[name].read_text().partition(start)[2].partition(end)[0]


def marks(name: str) -> tuple[str, str]:
    """The lines before and behind a table."""
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
