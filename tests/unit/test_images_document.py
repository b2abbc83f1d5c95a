"""docs/images.md says what the table of images says."""

from fidelity.document import DOCUMENT, document
from fidelity.table import subjects


def test_the_page_is_the_tables() -> None:
    assert DOCUMENT.read_text() == document(), "run: python tests/fidelity/document.py"


def test_names_are_unique() -> None:
    names = [image.name for subject in subjects() for image in subject.images]
    assert len(names) == len(set(names))
