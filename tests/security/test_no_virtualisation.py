"""The wall between a guest and KVM's code for guests of guests: no guest sees virtualisation, so KVM runs none in it.

Taken away by name: `svm=off`, as in the model of images that were made before.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from service import Instance
from wire import get

from gateway.messages import Shape
from vmm import processor
from vmm.qemu import machine as topology

SVM = ("80000001.0.ECX", 1 << 2)
VMX = ("1.0.ECX", 1 << 5)
ENDS = topology.Ends(5, 6, 7)


def seen(model: str) -> dict[str, int]:
    """The words of CPUID that a guest of this model has, as QEMU says it of a machine that does not run."""
    machine = [topology.BINARY, "-M", "q35", "-m", "64", "-accel", "tcg", "-cpu", model, "-S", "-nodefaults", "-nographic", "-qmp", "stdio"]
    ask = [
        {"execute": "qmp_capabilities"},
        {"execute": "qom-get", "arguments": {"path": "/machine/unattached/device[0]", "property": "feature-words"}},
        {"execute": "quit"},
    ]
    text = "\n".join(map(json.dumps, ask))
    done = subprocess.run(machine, input=text, capture_output=True, text=True, timeout=60, check=False)
    (words,) = [answer["return"] for answer in map(json.loads, done.stdout.splitlines()) if answer.get("return")]
    return {f"{one['cpuid-input-eax']:x}.{one.get('cpuid-input-ecx', 0):x}.{one['cpuid-register']}": one["features"] for one in words}


def test_a_guest_is_offered_none() -> None:
    words = seen(topology.processor("tcg"))
    assert not words[SVM[0]] & SVM[1] and not words[VMX[0]] & VMX[1] and not words.get("8000000a.0.EDX")


def test_without_the_wall_it_is() -> None:
    assert seen(topology.processor("tcg", ""))[SVM[0]] & SVM[1]


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_new_machines_have_none_and_others_keep_what_they_booted_with(accelerator: str) -> None:
    shape = Shape(memory_mib=128, vcpus=1, disk_bytes=1 << 20, accelerator=accelerator, baseline_mib=128)
    before = {"tcg": "max,erms=off", "kvm": "host"}[accelerator]

    def model(command: topology.Command) -> str:
        return command.arguments[command.arguments.index("-cpu") + 1]

    def waits(recorded: str) -> str:
        return model(topology.standby(shape, recorded, "pc-q35-7.2", 3, 4, 5, topology.PlaceholderDevices(6, 7), ENDS))

    new = model(topology.boot(shape, "pc-q35-7.2", 3, None, 4, ENDS, 8))
    assert new.startswith(before) and not processor.virtualises(new) and processor.virtualises(before)
    assert "vmx=off" in new or accelerator == "tcg", "QEMU emulates no vmx"
    assert model(topology.probe(accelerator, 3, 4)) == new
    assert waits(new) == new and waits(before) == before and waits("") == before


def test_firecracker_is_told_the_same() -> None:
    """By bits of CPUID's leaves, of which KVM lent all: what it had besides stays, and what is recorded is what the guest sees."""
    bits = {one["leaf"]: (one["modifiers"][0]["register"], one["modifiers"][0]["bitmap"]) for one in processor.MODIFIERS}  # type: ignore[index]
    assert bits == {"0x1": ("ecx", "0b0xxxxx"), "0x80000001": ("ecx", "0b0xx")}
    assert processor.shown(["1.0.ECX=f", "1.0.EDX=ffffffff", "80000001.0.ECX=4", "7.0.EBX=24"]) == [
        "1.0.ECX=f",
        "1.0.EDX=ffffffff",
        "7.0.EBX=24",
    ]
    assert processor.shown(["1.0.ECX=ff", "80000001.0.ECX=7"]) == ["1.0.ECX=df", "80000001.0.ECX=3"]
    assert not processor.virtualises(processor.FIRECRACKER) and processor.virtualises("host")


@pytest.mark.vm
def test_a_guest_sees_none(instance: Instance, vm: dict[str, Any]) -> None:
    flags = get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"], "/processor").body.decode().split()
    assert "fpu" in flags and "lahf_lm" in flags and not {"svm", "vmx"} & set(flags)
    record = instance.hypervisors()[vm["microvmId"]]
    command = Path(f"/proc/{record['pid']}/cmdline").read_text().split("\0")
    assert "svm=off" in command[command.index("-cpu") + 1].split(",") and record["made"]["processor"] == command[command.index("-cpu") + 1]
