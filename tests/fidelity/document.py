"""docs/images.md, from the table: `python tests/fidelity/document.py` writes it; a test holds it to the table."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs/images.md"
HEAD = """# Images: what works, what differs, what to write instead

This page is made from the table in tests/fidelity/ (`python tests/fidelity/document.py`), each row of which is built, launched and
asked in `make test` or `make test-long`. Whatever Docker builds and runs is meant to build and run here.
"""


COMPARED = """## Beside Docker itself

The same Dockerfiles are built and run by Debian's dockerd (BuildKit and runc, as root, outside the service), and every path with its type,
mode, owner, time, content and attributes is compared, and what a process finds, in a container and in a RUN step (`test_reference.py`, in
`make test-long-images`):
"""


def document() -> str:
    from fidelity.contexts import CONTEXTS, STEPS
    from fidelity.differences import FILES, PROCESS, STEP
    from fidelity.table import subjects

    lines = [HEAD]
    for subject in subjects():
        run = " They run in `make test-long-corpus`." if subject.corpus else ""
        lines += [f"## {subject.title}", "", subject.text + run, "", "| case | what is true | note |", "|---|---|---|"]
        for image in subject.images:
            says = [check.says for check in image.checks if check.says]
            if image.fails is not None:
                says.insert(0, "is refused with a line that says why")
            elif not says:
                says = ["builds and starts"]
            lines.append(f"| {image.title} | {'; '.join(says)} | {image.note} |".replace("  |", " |"))
        lines.append("")
    lines += [COMPARED, *(f"- {context.about}" for context in [*CONTEXTS, STEPS]), "", "All is the same, but:", ""]
    lines += ["| about | Docker | here | why |", "|---|---|---|---|"]
    lines += [f"| {one.about} | {one.docker_has} | {one.ours_has} | {one.why} |" for one in [*FILES, *PROCESS, *STEP]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    DOCUMENT.write_text(document())
