"""docs/reliability.md: its rows come from the tests that show them, and the tests hold the page to it.

A test calls ``reliability(section, case, result)``. ``pytest --write-reliability`` writes what the tests of that
run said into the page; rows of tests that did not run stay. Without the option a row that the page lacks fails its
test, so that the page cannot fall behind.
"""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"

INTRODUCTION = """# Reliability

What was done to this program, and what came of it. Every row is written by the test that it names
(`make reliability` writes the page anew, `make test-slurm` the rows of `tests/slurm`), and `make test` fails where the
page and the program no longer agree. How to use what is shown here: "When things go wrong" in the README.
"""

# Section -> its title and the headings of its table.
SECTIONS = {
    "faults": ("Faults injected and survived", ("fault", "outcome")),
    "differences": ("Largest differences", ("compared", "largest difference")),
    "inputs": ("Bad input and what it is told", ("input", "message")),
    "checkpoints": ("Hostile and damaged files", ("tried", "outcome")),
}

Rows = dict[tuple[str, str], tuple[str, str]]
"""(section, case) -> (result, test)."""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def read_page() -> Rows:
    rows: Rows = {}
    titles = {title: section for section, (title, _) in SECTIONS.items()}
    section = None
    for line in PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else ():
        if line.startswith("## "):
            section = titles.get(line[3:].partition(": ")[0])
        cells = re.split(r"(?<!\\) \| ", line.strip("| ")) if line.startswith("| ") else []
        if section and len(cells) == 3 and cells[2].startswith("`"):
            rows[section, cells[0]] = (cells[1], cells[2].strip("`"))
    return rows


def write_page(rows: Rows) -> None:
    parts = [INTRODUCTION]
    for section, (title, headings) in SECTIONS.items():
        chosen = sorted(
            (test, case, result) for (row_section, case), (result, test) in rows.items() if row_section == section
        )
        lines = [f"## {title}: {len(chosen)}", "", f"| {' | '.join(headings)} | test |", "| --- | --- | --- |"]
        lines += [f"| {case} | {result} | `{test}` |" for test, case, result in chosen]
        parts.append("\n".join(lines) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")


class Recorder:
    """Collects the rows of one pytest run."""

    def __init__(self, writing: bool) -> None:
        self.writing = writing
        self.rows: Rows = {}
        self._page = read_page()

    def record(self, test: str, section: str, case: str, result: str, measured: bool = False) -> None:
        """One row; ``measured`` results differ from run to run, so that the page is not held to them."""
        key = (section, _cell(case))
        self.rows[key] = (_cell(result), test)
        if not self.writing:
            known = self._page.get(key)
            assert known, f"docs/reliability.md lacks {key}; run: make reliability"
            assert measured or known[0] == _cell(result), (
                f"docs/reliability.md says {known[0]!r} of {case!r}, the program now {_cell(result)!r}; "
                "run: make reliability"
            )

    def finish(self) -> None:
        if self.writing and self.rows:
            tests = {test for _, test in self.rows.values()}
            kept = {key: row for key, row in read_page().items() if row[1] not in tests}
            write_page({**kept, **self.rows})
