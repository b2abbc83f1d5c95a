"""What is written down of the host's processor under KVM, and where a state is refused because of it (vmm/processor.py)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vmm import processor
from vmm.errors import Refused
from vmm.provenance import Provenance

HERE = "AuthenticAMD family 25 model 1"
INFO = """processor\t: {number}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC 7763
stepping\t: 1

"""


def test_a_model_is_the_first_processors(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(INFO.format(number=0, model=1) + INFO.format(number=1, model=2))
    assert processor.model(tmp_path) == HERE


@pytest.mark.parametrize("text", [None, "", "processor : 0\nBogoMIPS : 50\n"])
def test_a_model_that_linux_does_not_name_is_none(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "proc").mkdir()
    if text is not None:
        (tmp_path / "proc/cpuinfo").write_text(text)
    assert processor.model(tmp_path) == ""


def entry(leaf: int, index: int, *registers: int) -> bytes:
    return struct.pack("<10I", leaf, index, 0, *registers, 0, 0, 0)


def test_words_are_those_of_features_and_no_others() -> None:
    """Not the processor's name, nor how many there are; and nothing of what lies behind the answer."""
    answer = (
        struct.pack("<II", 3, 0)
        + entry(0, 0, 16, 1, 2, 3)
        + entry(1, 0, 9, 9, 0x80, 0x2000)
        + entry(7, 0, 1, 0, 0x10, 0)
        + entry(0xD, 0, 7, 0, 0, 0)
    )
    assert processor.words(answer) == ["1.0.ECX=80", "1.0.EDX=2000", "7.0.ECX=10"]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (Provenance(model="GenuineIntel family 6 model 85"), f"of another model (GenuineIntel family 6 model 85; this host's is {HERE})"),
        (Provenance(model=HERE, features=["7.0.EBX=21"]), "features that this one has not (CPUID 7.0.EBX=21)"),
    ],
)
def test_a_state_of_another_processor_is_refused(made: Provenance, says: str) -> None:
    with pytest.raises(Refused) as raised:
        processor.check("image one", made, HERE, ["7.0.EBX=20"])
    assert str(raised.value).startswith("image one was made on a processor ") and says in str(raised.value)


@pytest.mark.parametrize("made", [Provenance(), Provenance(model=HERE, features=["7.0.EBX=20"]), Provenance(features=["7.0.EBX=20"])])
def test_a_state_of_the_same_one_is_not_nor_one_of_which_nothing_was_written_down(made: Provenance) -> None:
    processor.check("image one", made, HERE, ["7.0.EBX=21", "1.0.ECX=1"])
