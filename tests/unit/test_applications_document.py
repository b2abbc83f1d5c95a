"""docs/applications.md says what the table of applications says."""

from applications.document import DOCUMENT, document
from applications.table import applications
from service import REPO


def test_the_page_is_the_tables() -> None:
    assert DOCUMENT.read_text() == document(), "run: python tests/applications/document.py"


def test_each_row_has_an_image_and_each_image_a_row() -> None:
    names = [row.name for row in applications()]
    assert sorted(names) == sorted(path.name for path in (REPO / "tests/applications/images").iterdir())
