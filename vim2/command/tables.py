"""Tables of what a command found."""

__all__ = ["ABSENT", "table"]

ABSENT = "-"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table, without the columns that hold nothing."""
    columns = [column for column in zip(header, *rows) if any(cell != ABSENT for cell in column[1:])]
    header, *rows = zip(*columns)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
