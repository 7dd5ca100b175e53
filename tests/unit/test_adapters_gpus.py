"""The GPU reader against a stand-in for the library pynvml, in the real child process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.adapters.gpus import GpuReader
from agent.domain.observations import DeviceProcess, Devices

FAKE_NVML = '''
"""Two cards, of 12 and 16 GB; the file `trouble` beside this module says what is wrong today."""
import os, time
from pathlib import Path
from types import SimpleNamespace

NVML_ERROR_UNINITIALIZED, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = 1, 3, 4
NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = 9, 12, 13
NVML_ERROR_GPU_IS_LOST, NVML_ERROR_ARGUMENT_VERSION_MISMATCH, NVML_ERROR_UNKNOWN = 15, 25, 999
nvmlMemory_v2 = 2

class NVMLError(Exception):
    def __init__(self, value):
        super().__init__({15: "GPU is lost", 999: "Unknown Error"}.get(value, f"error {value}"))
        self.value = value

def _trouble():
    path = Path(__file__).with_name("trouble")
    return path.read_text() if path.exists() else ""

def nvmlInit():
    if _trouble().startswith("init "):
        raise NVMLError(int(_trouble().split()[1]))
    if _trouble() == "old init" :
        raise NVMLError(NVML_ERROR_UNKNOWN)

def nvmlShutdown():
    pass

def nvmlDeviceGetCount():
    if _trouble() == "hang":
        time.sleep(600)
    if _trouble() == "crash":
        os.write(2, b"the driver took the process with it\\n")
        os._exit(139)
    if _trouble() == "babble":
        os.write(1, b"not json\\n")
    return 0 if _trouble() == "none" else 2

def nvmlDeviceGetHandleByIndex(index):
    if _trouble() == "lost" and index == 0:
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)
    return index

def nvmlDeviceGetUUID(handle):
    return [b"GPU-aaa", "GPU-bbb"][handle]

def nvmlDeviceGetName(handle):
    return ["NVIDIA GeForce RTX 3060", b"NVIDIA RTX A4000"][handle]

def nvmlDeviceGetMemoryInfo(handle, version=None):
    if version is not None and handle == 1:
        raise NVMLError(NVML_ERROR_FUNCTION_NOT_FOUND)
    if version is not None:
        return SimpleNamespace(total=12_000_000_000, used=1_000_000_000, reserved=500_000_000)
    return SimpleNamespace(total=16_000_000_000, used=0)

def nvmlDeviceGetUtilizationRates(handle):
    if _trouble() == "sick" and handle == 1:
        raise NVMLError(NVML_ERROR_UNKNOWN)
    return SimpleNamespace(gpu=[97, 0][handle])

def nvmlDeviceGetTemperature(handle, sensor):
    return [71, 33][handle]

def nvmlDeviceGetPowerUsage(handle):
    return _only_first(handle, 169_500)

def nvmlDeviceGetEnforcedPowerLimit(handle):
    return _only_first(handle, 170_000)

def nvmlDeviceGetCurrentClocksEventReasons(handle):
    if handle == 1:
        raise NVMLError(NVML_ERROR_FUNCTION_NOT_FOUND)
    return 0x4 | 0x40

def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return 0x1

def nvmlDeviceGetTotalEccErrors(handle, kind, counter):
    if handle == 0:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return 3

def nvmlDeviceGetComputeRunningProcesses(handle):
    if handle == 1:
        return []
    own = int(os.environ["TEST_PID"])
    return [SimpleNamespace(pid=4242424, usedGpuMemory=900), SimpleNamespace(pid=own, usedGpuMemory=None)]

def nvmlSystemGetProcessName(pid):
    if pid == 4242424:
        return b"/usr/bin/blender --background"
    raise NVMLError(NVML_ERROR_NO_PERMISSION)

def _only_first(handle, value):
    if handle == 1:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return value
'''

Trouble = Callable[[str], None]


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    (tmp_path / "pynvml.py").write_text(FAKE_NVML)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("TEST_PID", str(os.getpid()))

    def set_trouble(what: str) -> None:
        (tmp_path / "trouble").write_text(what)

    return set_trouble


@pytest.fixture
def reader() -> Iterator[GpuReader]:
    reader = GpuReader(deadline_seconds=30.0, cpu_slots=4)
    yield reader
    reader.close()


def child_pid(reader: GpuReader) -> int:
    assert reader._child is not None
    return reader._child.pid


def test_two_different_cards_with_all_that_they_tell(trouble: Trouble, reader: GpuReader) -> None:
    devices = reader.read()
    assert (devices.cpu_slots, devices.note) == (4, "")
    assert devices.gpus is not None
    first, second = devices.gpus
    assert (first.index, first.uuid, first.name) == (0, "GPU-aaa", "NVIDIA GeForce RTX 3060")
    assert (first.memory_total_bytes, first.memory_used_bytes) == (12_000_000_000, 1_500_000_000)
    assert (first.utilization_percent, first.temperature_celsius) == (97, 71)
    assert (first.power_watts, first.power_limit_watts) == (169.5, 170.0)
    assert first.throttle_reasons == ("software power cap", "hardware thermal slowdown")
    assert first.ecc_uncorrected is None
    own_name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    assert first.processes == (
        DeviceProcess(pid=4242424, name="blender", memory_bytes=900),
        DeviceProcess(pid=os.getpid(), name=own_name, memory_bytes=None),
    )
    assert (second.uuid, second.name) == ("GPU-bbb", "NVIDIA RTX A4000")
    assert (second.memory_total_bytes, second.memory_free_bytes) == (16_000_000_000, 16_000_000_000)
    assert (second.power_watts, second.power_limit_watts, second.ecc_uncorrected) == (None, None, 3)
    assert (second.throttle_reasons, second.processes, second.error) == ((), (), "")


def test_one_child_serves_many_questions(trouble: Trouble, reader: GpuReader) -> None:
    assert reader.read() == reader.read()
    pid = child_pid(reader)
    reader.read()
    assert child_pid(reader) == pid
    reader.close()
    assert reader.read().gpus


def test_a_lost_card_keeps_its_name_and_does_not_hide_the_other(trouble: Trouble, reader: GpuReader) -> None:
    trouble("lost")
    never_seen = reader.read().gpus
    assert never_seen is not None
    assert (never_seen[0].uuid, never_seen[0].error) == ("unknown-0", "GPU is lost")
    trouble("")
    reader.read()
    trouble("lost")
    gpus = reader.read().gpus
    assert gpus is not None
    assert (gpus[0].uuid, gpus[0].error, gpus[0].memory_free_bytes) == ("GPU-aaa", "GPU is lost", 0)
    assert (gpus[1].uuid, gpus[1].error) == ("GPU-bbb", "")


def test_an_error_in_the_vitals_marks_only_that_card(trouble: Trouble, reader: GpuReader) -> None:
    trouble("sick")
    gpus = reader.read().gpus
    assert gpus is not None
    assert [gpu.error for gpu in gpus] == ["", "Unknown Error"]
    assert gpus[1].name == "NVIDIA RTX A4000"


def test_a_hang_is_unknown_and_the_next_question_goes_to_a_new_child(trouble: Trouble) -> None:
    reader = GpuReader(deadline_seconds=30.0, cpu_slots=4)
    try:
        reader.read()
        hung = child_pid(reader)
        trouble("hang")
        reader._deadline_seconds = 0.2
        assert reader.read() == Devices(gpus=None, cpu_slots=4, note="GPUs unknown: NVML did not answer within 0.2 s")
        assert not Path(f"/proc/{hung}").exists()
        trouble("")
        reader._deadline_seconds = 30.0
        assert len(reader.read().gpus or ()) == 2
    finally:
        reader.close()


def test_a_child_that_dies_is_unknown_with_its_last_words(trouble: Trouble, reader: GpuReader) -> None:
    trouble("crash")
    devices = reader.read()
    assert devices.gpus is None
    assert "the NVML process has ended: the driver took the process with it" in devices.note
    trouble("")
    assert len(reader.read().gpus or ()) == 2


def test_a_child_that_died_between_two_questions_is_replaced(trouble: Trouble, reader: GpuReader) -> None:
    reader.read()
    os.kill(child_pid(reader), 9)
    states = [reader.read().gpus for _ in range(2)]
    assert states[0] is None
    assert len(states[1] or ()) == 2


def test_an_answer_without_sense_is_unknown(trouble: Trouble, reader: GpuReader) -> None:
    trouble("babble")
    assert "no sense" in reader.read().note
    trouble("")
    assert len(reader.read().gpus or ()) == 2


@pytest.mark.parametrize("code", [9, 12])
def test_no_driver_is_no_gpus_and_said_plainly(trouble: Trouble, reader: GpuReader, code: int) -> None:
    trouble(f"init {code}")
    assert reader.read() == Devices(gpus=(), cpu_slots=4, note="no NVIDIA driver: runs use 4 CPU slots")


def test_a_driver_that_cannot_be_asked_is_unknown_and_not_none(trouble: Trouble, reader: GpuReader) -> None:
    trouble("init 999")
    devices = reader.read()
    assert devices.gpus is None
    assert "the NVIDIA driver cannot be asked: Unknown Error" in devices.note
    trouble("")
    assert len(reader.read().gpus or ()) == 2


def test_a_driver_without_cards(trouble: Trouble, reader: GpuReader) -> None:
    trouble("none")
    assert reader.read() == Devices(gpus=(), cpu_slots=4, note="no NVIDIA GPU: runs use 4 CPU slots")


def test_without_the_python_library_there_are_no_gpus(trouble: Trouble, reader: GpuReader, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError('not installed')")
    devices = reader.read()
    assert devices.gpus == ()
    assert "not installed" in devices.note


def test_cpu_slots_are_what_this_process_may_use(trouble: Trouble) -> None:
    reader = GpuReader(deadline_seconds=30.0)
    try:
        assert reader.read().cpu_slots == len(os.sched_getaffinity(0))
    finally:
        reader.close()


def test_a_child_that_cannot_start_is_unknown(monkeypatch: pytest.MonkeyPatch, reader: GpuReader) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "cannot be started" in reader.read().note
