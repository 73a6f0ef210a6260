# SPDX-License-Identifier: Apache-2.0
"""Answers against a page with known contents, through nvidia-ml-py: its structures are the interface's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from .page_host import ATTRIBUTES, GIB, UUID, UUID_TEXT, PageHost, page_bytes, unknown_page
from .table import functions

MINE = (os.getpid(), 40, 3 * GIB, 1)
MINE_AGAIN = (os.getpid(), 25, GIB, 2)
OTHER = (1, 0xFFFFFFFF, GIB // 2, 3)


@pytest.fixture
def gpu(pynvml: ModuleType, device: ctypes.c_void_p) -> Any:
    """The handle as nvidia-ml-py wants it."""
    return ctypes.cast(device, pynvml.c_nvmlDevice_t)


# Name in nvidia-ml-py, further arguments, the answer. Texts come back as str.
SIMPLE: list[tuple[str, tuple[Any, ...], Any]] = [
    ("nvmlDeviceGetName", (), "NVIDIA H200"),
    ("nvmlDeviceGetUUID", (), UUID_TEXT),
    ("nvmlDeviceGetSerial", (), "1652723012345"),
    ("nvmlDeviceGetVbiosVersion", (), "96.00.A5.00.01"),
    ("nvmlDeviceGetBoardPartNumber", (), "692-2G520-0280-001"),
    ("nvmlDeviceGetIndex", (), 0),
    ("nvmlDeviceGetMinorNumber", (), 0),
    ("nvmlDeviceGetMultiGpuBoard", (), 0),
    ("nvmlDeviceGetBoardId", (), 0x4100),
    ("nvmlDeviceGetBrand", (), 14),
    ("nvmlDeviceGetArchitecture", (), 9),
    ("nvmlDeviceGetBusType", (), 2),
    ("nvmlDeviceGetCudaComputeCapability", (), (9, 0)),
    ("nvmlDeviceGetNumGpuCores", (), 132 * 128),
    ("nvmlDeviceGetMemoryBusWidth", (), 6144),
    ("nvmlDeviceGetTemperature", (0,), 43),
    ("nvmlDeviceGetTemperatureV", (0,), 43),
    ("nvmlDeviceGetTemperatureThreshold", (0,), 92),
    ("nvmlDeviceGetTemperatureThreshold", (1,), 87),
    ("nvmlDeviceGetPowerUsage", (), 412_345),
    ("nvmlDeviceGetPowerManagementLimit", (), 700_000),
    ("nvmlDeviceGetEnforcedPowerLimit", (), 700_000),
    ("nvmlDeviceGetPowerManagementDefaultLimit", (), 690_000),
    ("nvmlDeviceGetPowerManagementLimitConstraints", (), [200_000, 710_000]),
    ("nvmlDeviceGetPowerManagementMode", (), 1),
    ("nvmlDeviceGetPowerSource", (), 0),
    ("nvmlDeviceGetTotalEnergyConsumption", (), 987_654_321),
    ("nvmlDeviceGetClockInfo", (0,), 1979),
    ("nvmlDeviceGetClockInfo", (1,), 1980),
    ("nvmlDeviceGetClockInfo", (2,), 3201),
    ("nvmlDeviceGetClockInfo", (3,), 1500),
    ("nvmlDeviceGetMaxClockInfo", (0,), 1981),
    ("nvmlDeviceGetMaxClockInfo", (1,), 1982),
    ("nvmlDeviceGetMaxClockInfo", (2,), 3202),
    ("nvmlDeviceGetMaxClockInfo", (3,), 1545),
    ("nvmlDeviceGetClock", (2, 0), 3201),
    ("nvmlDeviceGetClock", (2, 3), 3202),
    ("nvmlDeviceGetMaxCustomerBoostClock", (0,), 1981),
    ("nvmlDeviceGetCurrentClocksEventReasons", (), 4),
    ("nvmlDeviceGetCurrentClocksThrottleReasons", (), 4),
    ("nvmlDeviceGetSupportedClocksEventReasons", (), 0x1FF),
    ("nvmlDeviceGetPerformanceState", (), 0),
    ("nvmlDeviceGetPowerState", (), 0),
    ("nvmlDeviceGetNumFans", (), 0),
    ("nvmlDeviceGetEccMode", (), [1, 1]),
    ("nvmlDeviceGetTotalEccErrors", (0, 0), 3),
    ("nvmlDeviceGetTotalEccErrors", (0, 1), 5_000_000_000),
    ("nvmlDeviceGetTotalEccErrors", (1, 0), 0),
    ("nvmlDeviceGetTotalEccErrors", (1, 1), 2),
    ("nvmlDeviceGetPersistenceMode", (), 1),
    ("nvmlDeviceGetComputeMode", (), 0),
    ("nvmlDeviceGetDisplayMode", (), 0),
    ("nvmlDeviceGetDisplayActive", (), 0),
    ("nvmlDeviceGetVirtualizationMode", (), 0),
    ("nvmlDeviceGetMigMode", (), [0, 0]),
    ("nvmlDeviceGetMaxMigDeviceCount", (), 0),
    ("nvmlDeviceGetAccountingMode", (), 0),
    ("nvmlDeviceGetAccountingPids", (), []),
    ("nvmlDeviceGetCurrPcieLinkGeneration", (), 4),
    ("nvmlDeviceGetMaxPcieLinkGeneration", (), 5),
    ("nvmlDeviceGetGpuMaxPcieLinkGeneration", (), 5),
    ("nvmlDeviceGetCurrPcieLinkWidth", (), 8),
    ("nvmlDeviceGetMaxPcieLinkWidth", (), 16),
    ("nvmlDeviceGetPcieThroughput", (0,), 123),
    ("nvmlDeviceGetPcieThroughput", (1,), 456),
    ("nvmlDeviceGetPcieSpeed", (), 16000),
    ("nvmlDeviceGetPcieLinkMaxSpeed", (), 5),
    ("nvmlDeviceGetEncoderUtilization", (), [3, 0]),
    ("nvmlDeviceGetDecoderUtilization", (), [5, 0]),
    ("nvmlDeviceGetEncoderStats", (), [0, 0, 0]),
    ("nvmlDeviceGetEncoderSessions", (), []),
    ("nvmlDeviceGetGspFirmwareMode", (), [1, 1]),
    ("nvmlDeviceGetGspFirmwareVersion", (), b"580.159.04"),
    ("nvmlDeviceGetGraphicsRunningProcesses_v3", (), []),
    ("nvmlDeviceGetMPSComputeRunningProcesses_v3", (), []),
    ("nvmlDeviceGetTopologyNearestGpus", (0,), []),
]


@pytest.mark.parametrize(("name", "extra", "expected"), SIMPLE, ids=lambda value: str(value)[:60])
def test_answer(pynvml: ModuleType, gpu: Any, name: str, extra: tuple[Any, ...], expected: Any) -> None:
    answer = getattr(pynvml, name)(gpu, *extra)
    if hasattr(answer, "temperature"):
        answer = answer.temperature
    assert (list(answer) if isinstance(expected, list) else answer) == expected


def test_the_machine(pynvml: ModuleType, gpu: Any) -> None:
    assert pynvml.nvmlSystemGetDriverVersion() == "580.159.04"
    assert pynvml.nvmlSystemGetNVMLVersion() == "13.580.159.04"
    assert pynvml.nvmlSystemGetCudaDriverVersion() == 13000
    assert pynvml.nvmlSystemGetCudaDriverVersion_v2() == 13000
    assert pynvml.nvmlDeviceGetCount() == 1
    assert pynvml.nvmlUnitGetCount() == 0
    assert pynvml.nvmlGetExcludedDeviceCount() == 0
    assert pynvml.nvmlSystemGetHicVersion() == []
    state = pynvml.nvmlSystemGetConfComputeState()
    assert (state.environment, state.ccFeature, state.devToolsMode) == (0, 0, 0)
    settings = pynvml.c_nvmlSystemConfComputeSettings_v1_t()
    settings.ccFeature = 7
    assert pynvml.nvmlLib.nvmlSystemGetConfComputeSettings(ctypes.byref(settings)) == 0
    assert settings.ccFeature == 0


def test_versions_without_nvmls_own(
    pynvml: ModuleType, nvml: ctypes.CDLL, device: ctypes.c_void_p, host: PageHost
) -> None:
    host.replace_page(page_bytes(texts={"nvml_version": ""}))
    assert pynvml.nvmlSystemGetNVMLVersion() == "13.580.159.04"


def test_memory_is_the_quota_and_adds_up(pynvml: ModuleType, gpu: Any, host: PageHost) -> None:
    old = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    assert (old.total, old.used, old.free) == (40 * GIB, 11 * GIB // 2, 69 * GIB // 2)
    new = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
    assert (new.total, new.used, new.reserved, new.free) == (40 * GIB, 5 * GIB, GIB // 2, 69 * GIB // 2)
    bar1 = pynvml.nvmlDeviceGetBAR1MemoryInfo(gpu)
    assert (bar1.bar1Total, bar1.bar1Used, bar1.bar1Free) == (256 * GIB, 0, 256 * GIB)
    host.set("memory_used_bytes", 41 * GIB)  # more than there is
    full = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
    assert (full.used, full.reserved, full.free) == (40 * GIB, 0, 0)
    host.set("memory_used_bytes", GIB)
    host.set("memory_reserved_bytes", (1 << 64) - 1)  # not known
    assert pynvml.nvmlDeviceGetMemoryInfo(gpu).used == GIB


def test_handles(pynvml: ModuleType, gpu: Any) -> None:
    address = ctypes.cast(gpu, ctypes.c_void_p).value
    ways: list[Callable[[], Any]] = [
        lambda: pynvml.nvmlDeviceGetHandleByUUID(UUID_TEXT.encode()),
        lambda: pynvml.nvmlDeviceGetHandleByUUID(UUID_TEXT.upper().replace("GPU", "gpu").encode()),
        lambda: pynvml.nvmlDeviceGetHandleBySerial(b"1652723012345"),
        *[
            lambda text=text: pynvml.nvmlDeviceGetHandleByPciBusId(text)
            for text in (
                b"00000000:41:00.0",
                b"0000:41:00.0",
                b"0:41:0.0",
                b"41:00.0",
                b"41:00",
                b"0000:41:00",
            )
        ],
    ]
    for way in ways:
        assert ctypes.cast(way(), ctypes.c_void_p).value == address


@pytest.mark.parametrize(
    ("way", "argument", "status"),
    [
        ("ByIndex", 1, 2),
        ("ByUUID", b"GPU-b19598fb-ac3f-010f-1c1b-e5a23a7b38d5", 6),
        ("ByUUID", b"", 6),
        ("BySerial", b"1", 6),
        ("BySerial", b"", 6),
        ("ByPciBusId", b"0000:42:00.0", 6),
        ("ByPciBusId", b"0000:41:00.1", 6),
        ("ByPciBusId", b"0001:41:00.0", 6),
        ("ByPciBusId", b"", 2),
        ("ByPciBusId", b"41", 2),
        ("ByPciBusId", b"41.0", 2),
        ("ByPciBusId", b"0000:41:00.", 2),
        ("ByPciBusId", b"0000:41:00.0.0", 2),
        ("ByPciBusId", b"0000:41:00.0:", 2),
        ("ByPciBusId", b"0000000000000041:00.0", 2),
        ("ByPciBusId", b"GPU 0", 2),
        ("ByPciBusId", b":::", 2),
    ],
)
def test_a_handle_that_there_is_not(
    pynvml: ModuleType, gpu: Any, way: str, argument: Any, status: int
) -> None:
    with pytest.raises(pynvml.NVMLError) as caught:
        getattr(pynvml, f"nvmlDeviceGetHandle{way}")(argument)
    assert caught.value.value == status


def test_handle_by_versioned_uuid(pynvml: ModuleType, gpu: Any, nvml: ctypes.CDLL) -> None:
    class Uuid(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint), ("type", ctypes.c_uint), ("value", ctypes.c_char * 41))

    version = ctypes.sizeof(Uuid) | 1 << 24
    cases = [
        (version, 1, UUID_TEXT.encode(), 0),
        (version, 2, UUID, 0),
        (version, 2, bytes(16), 6),
        (version, 1, b"x" * 41, 2),
        (version, 0, UUID, 2),
        (version + 1, 2, UUID, 25),
    ]
    for number, kind, value, status in cases:
        uuid = Uuid(number, kind)
        ctypes.memmove(ctypes.addressof(uuid) + 8, value, len(value))
        found = ctypes.c_void_p()
        assert nvml.nvmlDeviceGetHandleByUUIDV(ctypes.byref(uuid), ctypes.byref(found)) == status
        assert (found.value == ctypes.cast(gpu, ctypes.c_void_p).value) is (status == 0)


def test_pci(pynvml: ModuleType, gpu: Any, nvml: ctypes.CDLL) -> None:
    pci = pynvml.nvmlDeviceGetPciInfo(gpu)
    assert (pci.domain, pci.bus, pci.device) == (0, 0x41, 0)
    assert (pci.busId, pci.busIdLegacy) == ("00000000:41:00.0", "0000:41:00.0")
    assert pci.pciDeviceId & 0xFFFF == 0x10DE
    extended = pynvml.nvmlPciInfoExt_v1_t(version=pynvml.nvmlPciInfoExt_v1)
    pynvml.nvmlDeviceGetPciInfoExt(gpu, ctypes.byref(extended))
    assert (extended.baseClass, extended.subClass, extended.bus) == (3, 2, 0x41)
    # Callers of the older forms have room for less.
    for name, size in (
        ("nvmlDeviceGetPciInfo", 32),
        ("nvmlDeviceGetPciInfo_v2", 36),
        ("nvmlDeviceGetPciInfo_v3", 68),
    ):
        room = ctypes.create_string_buffer(b"\xee" * 128)
        assert nvml[name](gpu, room) == 0
        assert room.raw[:13] == b"0000:41:00.0\0"
        assert room.raw[size - 1] != 0xEE
        assert room.raw[size:128] == b"\xee" * (128 - size)


def test_utilisation(pynvml: ModuleType, gpu: Any) -> None:
    rates = pynvml.nvmlDeviceGetUtilizationRates(gpu)
    assert (rates.gpu, rates.memory) == (87, 31)
    domains = pynvml.nvmlDeviceGetDynamicPstatesInfo(gpu).utilization
    assert [(d.bIsPresent, d.percentage) for d in domains][:4] == [(1, 87), (1, 31), (1, 5), (0, 0)]


def test_processes_are_merged_by_pid(pynvml: ModuleType, gpu: Any, host: PageHost, nvml: ctypes.CDLL) -> None:
    host.replace_page(page_bytes(processes=(MINE, OTHER, MINE_AGAIN)))
    for name in (
        "nvmlDeviceGetComputeRunningProcesses_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetComputeRunningProcesses",
    ):
        found = [(p.pid, p.usedGpuMemory) for p in getattr(pynvml, name)(gpu)]
        assert found == [(os.getpid(), 4 * GIB), (1, GIB // 2)]

    class Old(ctypes.Structure):
        _fields_ = (("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong))

    old, count = (Old * 3)(), ctypes.c_uint(3)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(gpu, ctypes.byref(count), old) == 0
    assert [(p.pid, p.used) for p in old] == [(os.getpid(), 4 * GIB), (1, GIB // 2), (0, 0)]
    # Too little room: how many there are, and nothing is written.
    small, count = (Old * 2)(), ctypes.c_uint(1)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(gpu, ctypes.byref(count), small) == 7
    assert (count.value, small[0].pid) == (2, 0)
    details = pynvml.nvmlDeviceGetRunningProcessDetailList(gpu, pynvml.nvmlProcessDetailList_v1, 0)
    assert [(p.pid, p.usedGpuMemory) for p in details] == [(os.getpid(), 4 * GIB), (1, GIB // 2)]
    assert pynvml.nvmlDeviceGetRunningProcessDetailList(gpu, pynvml.nvmlProcessDetailList_v1, 1) == []


def test_utilisation_by_process(pynvml: ModuleType, gpu: Any, host: PageHost) -> None:
    host.replace_page(page_bytes(processes=(MINE, OTHER, MINE_AGAIN)))
    (sample,) = pynvml.nvmlDeviceGetProcessUtilization(gpu, 0)
    assert (sample.pid, sample.smUtil) == (os.getpid(), 65)
    with pytest.raises(pynvml.NVMLError_NotFound):  # nothing newer
        pynvml.nvmlDeviceGetProcessUtilization(gpu, sample.timeStamp)
    host.set("telemetry_ns", 42)  # another sample, whatever its time on the host
    (again,) = pynvml.nvmlDeviceGetProcessUtilization(gpu, sample.timeStamp)
    assert again.timeStamp > sample.timeStamp
    (info,) = pynvml.nvmlDeviceGetProcessesUtilizationInfo(gpu, 0)
    assert (info.pid, info.smUtil) == (os.getpid(), 65)
    host.replace_page(page_bytes(processes=(OTHER,)))
    with pytest.raises(pynvml.NVMLError_NotFound):  # not known
        pynvml.nvmlDeviceGetProcessUtilization(gpu, 0)


def test_process_names(pynvml: ModuleType, gpu: Any, nvml: ctypes.CDLL) -> None:
    with open("/proc/self/cmdline") as file:
        expected = file.read().split("\0")[0]
    assert pynvml.nvmlSystemGetProcessName(os.getpid()) == expected
    short = ctypes.create_string_buffer(4)
    assert nvml.nvmlSystemGetProcessName(os.getpid(), short, 4) == 0
    assert short.value.decode() == expected[:3]
    assert nvml.nvmlSystemGetProcessName(os.getpid(), short, 0) == 2
    assert nvml.nvmlSystemGetProcessName(2**22 + 1, short, 4) == 6


def test_field_values(pynvml: ModuleType, gpu: Any, host: PageHost) -> None:
    asked = {1: 1, 2: 1, 82: 51, 83: 987_654_321, 91: 0, 170: 0, 185: 412_345, 186: 412_345, 187: 200_000}
    asked |= {188: 710_000, 189: 690_000, 190: 700_000, 191: 987_654_321, 192: 700_000}
    for value in pynvml.nvmlDeviceGetFieldValues(gpu, list(asked)):
        assert value.nvmlReturn == 0
        wide = value.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
        assert (value.value.ullVal if wide else value.value.uiVal) == asked[value.fieldId]
    refused = pynvml.nvmlDeviceGetFieldValues(gpu, [0, 3, 94, 142, 273, 5000, (185, 1), (185, 2)])
    assert [value.nvmlReturn for value in refused] == [3] * 8
    host.set("memory_temperature_celsius", 0xFFFFFFFF)
    assert pynvml.nvmlDeviceGetFieldValues(gpu, [82])[0].nvmlReturn == 3


def test_samples(pynvml: ModuleType, gpu: Any) -> None:
    expected = {0: 412_345, 1: 87, 2: 31, 3: 3, 4: 5, 5: 1980, 6: 3201}
    for kind, number in expected.items():
        _, samples = pynvml.nvmlDeviceGetSamples(gpu, kind, 0)
        assert [sample.sampleValue.uiVal for sample in samples] == [number]
        with pytest.raises(pynvml.NVMLError_NotFound):
            pynvml.nvmlDeviceGetSamples(gpu, kind, samples[0].timeStamp)
    for kind, status in ((7, 3), (9, 3), (10, 2)):
        with pytest.raises(pynvml.NVMLError) as caught:
            pynvml.nvmlDeviceGetSamples(gpu, kind, 0)
        assert caught.value.value == status


def test_features_that_there_are_not(pynvml: ModuleType, gpu: Any, nvml: ctypes.CDLL) -> None:
    for structure, version in (
        (pynvml.c_nvmlGpuFabricInfo_v2_t, pynvml.nvmlGpuFabricInfo_v2),
        (pynvml.c_nvmlGpuFabricInfo_v3_t, pynvml.nvmlGpuFabricInfo_v3),
    ):
        info = structure()
        info.version, info.state, info.status = version, 9, 9
        assert nvml.nvmlDeviceGetGpuFabricInfoV(gpu, ctypes.byref(info)) == 0
        assert (info.version, info.state, info.status) == (version, 0, 0)
        info.version += 1
        assert nvml.nvmlDeviceGetGpuFabricInfoV(gpu, ctypes.byref(info)) == 25
    old = ctypes.create_string_buffer(b"\xee" * 64)
    assert nvml.nvmlDeviceGetGpuFabricInfo(gpu, old) == 0
    assert (old.raw[:24].strip(b"\0"), old.raw[24], old.raw[28:]) == (b"", 0, b"\xee" * 36 + b"\0")
    mode = (ctypes.c_uint * 2)(8 | 1 << 24, 9)
    assert nvml.nvmlDeviceGetAddressingMode(gpu, mode) == 0
    assert mode[1] == 0
    assert nvml.nvmlDeviceGetAddressingMode(gpu, (ctypes.c_uint * 2)(8, 9)) == 25
    assert pynvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice == 0
    assert pynvml.nvmlDeviceGetGridLicensableFeatures(gpu).isGridLicenseSupported == 0
    assert pynvml.nvmlDeviceGetFBCStats(gpu).sessionsCount == 0
    assert pynvml.nvmlDeviceIsMigDeviceHandle(gpu).value == 0
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetAccountingStats(gpu, os.getpid())


def test_topology(pynvml: ModuleType, gpu: Any, nvml: ctypes.CDLL) -> None:
    allowed = os.sched_getaffinity(0)
    words = pynvml.nvmlDeviceGetCpuAffinity(gpu, 16)
    near = {64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}
    assert near & allowed
    assert list(pynvml.nvmlDeviceGetCpuAffinityWithinScope(gpu, 16, 0)) == list(words)
    assert any(pynvml.nvmlDeviceGetMemoryAffinity(gpu, 16, 0))
    count, found = ctypes.c_uint(1), ctypes.c_void_p()
    assert nvml.nvmlSystemGetTopologyGpuSet(min(near), ctypes.byref(count), ctypes.byref(found)) == 0
    assert (count.value, found.value) == (1, ctypes.cast(gpu, ctypes.c_void_p).value)
    assert pynvml.nvmlDeviceGetTopologyCommonAncestor(gpu, gpu) == 0
    assert pynvml.nvmlDeviceOnSameBoard(gpu, gpu) == 1
    assert [pynvml.nvmlDeviceGetP2PStatus(gpu, gpu, index) for index in range(6)] == [0, 0, 5, 0, 0, 0]
    try:
        pynvml.nvmlDeviceSetCpuAffinity(gpu)
        assert os.sched_getaffinity(0) <= near
        pynvml.nvmlDeviceClearCpuAffinity(gpu)
        assert os.sched_getaffinity(0) >= allowed
    finally:
        os.sched_setaffinity(0, allowed)


def test_events(pynvml: ModuleType, gpu: Any, nvml: ctypes.CDLL) -> None:
    assert pynvml.nvmlDeviceGetSupportedEventTypes(gpu) == pynvml.nvmlEventTypeXidCriticalError
    events = pynvml.nvmlEventSetCreate()
    pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, events)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeClock, events)
    for timeout in (0, 20):
        with pytest.raises(pynvml.NVMLError_Timeout):
            pynvml.nvmlEventSetWait_v2(events, timeout)
    pynvml.nvmlEventSetFree(events)
    assert nvml.nvmlEventSetFree(events) == 2  # once only
    assert nvml.nvmlEventSetWait_v2(events, ctypes.create_string_buffer(64), 0) == 2


def test_texts_need_room(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> None:
    room = ctypes.create_string_buffer(b"\xee" * 64)
    assert nvml.nvmlDeviceGetName(device, room, 11) == 7
    assert room.raw[0] == 0xEE
    assert nvml.nvmlDeviceGetName(device, room, 12) == 0
    assert room.value == b"NVIDIA H200"


def test_error_texts(library: ctypes.CDLL) -> None:
    library.nvmlErrorString.restype = ctypes.c_char_p
    expected = {0: b"Success", 3: b"Not Supported", 9: b"Driver Not Loaded", 25: b"Argument version mismatch"}
    expected |= {29: b"Resource not in correct state to perform requested operation"}
    expected |= dict.fromkeys((30, 999, -1), b"Unknown Error")
    assert {code: library.nvmlErrorString(code) for code in expected} == expected


# What a card that tells nothing is still answered for.
KNOWN_ANYWAY = {
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetUUID": UUID_TEXT,
    "nvmlDeviceGetArchitecture": 9,
    "nvmlDeviceGetMemoryBusWidth": ATTRIBUTES[37],
    "nvmlDeviceGetNumGpuCores": 132 * 128,
}


def test_what_the_card_does_not_say_is_not_supported(pynvml: ModuleType, gpu: Any, host: PageHost) -> None:
    host.replace_page(unknown_page())
    for name, expected in KNOWN_ANYWAY.items():
        assert getattr(pynvml, name)(gpu) == expected
    unknown = [
        (name, extra)
        for name, extra, _ in SIMPLE
        if any(word in name for word in ("Power", "Clock", "Temperature", "Pcie", "Serial", "Vbios", "Ecc"))
        or name in ("nvmlDeviceGetBrand", "nvmlDeviceGetComputeMode", "nvmlDeviceGetPersistenceMode")
    ]
    unknown += [("nvmlDeviceGetUtilizationRates", ()), ("nvmlDeviceGetBAR1MemoryInfo", ())]
    unknown += [("nvmlDeviceGetFanSpeed", ()), ("nvmlDeviceGetEncoderUtilization", ())]
    unknown.remove(("nvmlDeviceGetPowerSource", ()))
    assert len(unknown) > 30
    for name, extra in unknown:
        with pytest.raises(pynvml.NVMLError_NotSupported):
            getattr(pynvml, name)(gpu, *extra)


def test_fans_where_there_are_some(pynvml: ModuleType, gpu: Any, host: PageHost) -> None:
    host.set("fan_percent", 30)
    assert pynvml.nvmlDeviceGetFanSpeed(gpu) == 30
    assert pynvml.nvmlDeviceGetFanSpeed_v2(gpu, 0) == 30
    assert pynvml.nvmlDeviceGetNumFans(gpu) == 1
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetFanSpeed_v2(gpu, 1)


@pytest.mark.parametrize(
    ("capability", "architecture", "partitionable"),
    [
        ((7, 0), 5, False),
        ((7, 5), 6, False),
        ((8, 0), 7, True),
        ((8, 6), 7, False),
        ((8, 9), 8, False),
        ((10, 0), 10, True),
    ],
)
def test_other_architectures(
    pynvml: ModuleType,
    gpu: Any,
    host: PageHost,
    capability: tuple[int, int],
    architecture: int,
    partitionable: bool,
) -> None:
    attributes = {75: capability[0], 76: capability[1]}
    host.replace_page(page_bytes({"architecture": 0xFFFFFFFF}, attributes=attributes))
    assert pynvml.nvmlDeviceGetArchitecture(gpu) == architecture
    if partitionable:
        assert pynvml.nvmlDeviceGetMigMode(gpu) == [0, 0]
    else:
        with pytest.raises(pynvml.NVMLError_NotSupported):
            pynvml.nvmlDeviceGetMigMode(gpu)


def test_nvidia_ml_py_finds_all_it_asks_for(pynvml: ModuleType, library: ctypes.CDLL) -> None:
    """Its wrappers name functions; those of driver 580 all exist here."""
    names = {function.name for function in functions()}
    missing = [name for name in names if not hasattr(library, name)]
    assert missing == []
