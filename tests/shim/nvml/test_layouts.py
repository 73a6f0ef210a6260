# SPDX-License-Identifier: Apache-2.0
"""Our declarations against nvidia-ml-py's: the same sizes, and the same offsets where a name says what it is."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

from .table import SOURCES

# Ours, theirs, and fields whose offsets are compared.
PAIRS: dict[str, tuple[str, dict[str, str]]] = {
    "nvml_pci_info": (
        "nvmlPciInfo_t",
        {
            "bus_id_legacy": "busIdLegacy",
            "domain": "domain",
            "pci_subsystem_id": "pciSubSystemId",
            "bus_id": "busId",
        },
    ),
    "nvml_pci_info_ext": ("nvmlPciInfoExt_v1_t", {"base_class": "baseClass", "bus_id": "busId"}),
    "nvml_memory": ("c_nvmlMemory_t", {"total": "total", "free": "free", "used": "used"}),
    "nvml_memory_v2": ("c_nvmlMemory_v2_t", {"reserved": "reserved", "free": "free", "used": "used"}),
    "nvml_bar1_memory": (
        "c_nvmlBAR1Memory_t",
        {"total": "bar1Total", "free": "bar1Free", "used": "bar1Used"},
    ),
    "nvml_process_v2": (
        "c_nvmlProcessInfo_v2_t",
        {"used_memory": "usedGpuMemory", "gpu_instance": "gpuInstanceId"},
    ),
    "nvml_process_detail": (
        "c_nvmlProcessDetail_v1_t",
        {"used_protected_memory": "usedGpuCcProtectedMemory"},
    ),
    "nvml_process_detail_list": (
        "c_nvmlProcessDetailList_v1_t",
        {"mode": "mode", "count": "numProcArrayEntries", "entries": "procArray"},
    ),
    "nvml_process_sample": (
        "c_nvmlProcessUtilizationSample_t",
        {"microseconds": "timeStamp", "decoder": "decUtil"},
    ),
    "nvml_process_utilization": (
        "c_nvmlProcessUtilizationInfo_v1_t",
        {"pid": "pid", "optical_flow": "ofaUtil"},
    ),
    "nvml_processes_utilization": (
        "c_nvmlProcessesUtilizationInfo_v1_t",
        {"count": "processSamplesCount", "last_seen": "lastSeenTimeStamp", "entries": "procUtilArray"},
    ),
    "nvml_accounting_stats": (
        "c_nvmlAccountingStats_t",
        {"max_memory": "maxMemoryUsage", "is_running": "isRunning"},
    ),
    "nvml_utilization": ("c_nvmlUtilization_t", {"gpu": "gpu", "memory": "memory"}),
    "nvml_temperature": ("c_nvmlTemperature_v1_t", {"sensor": "sensorType", "celsius": "temperature"}),
    "nvml_sample": ("c_nvmlSample_t", {"microseconds": "timeStamp", "value": "sampleValue"}),
    "nvml_field_value": (
        "c_nvmlFieldValue_t",
        {
            "microseconds": "timestamp",
            "latency": "latencyUsec",
            "type": "valueType",
            "status": "nvmlReturn",
            "value": "value",
        },
    ),
    "nvml_fabric_v2": ("c_nvmlGpuFabricInfo_v2_t", {"status": "status", "health_mask": "healthMask"}),
    "nvml_fabric_v3": ("c_nvmlGpuFabricInfo_v3_t", {"clique": "cliqueId", "health_summary": "healthSummary"}),
    "nvml_confidential_state": ("c_nvmlConfComputeSystemState_t", {"feature": "ccFeature"}),
    "nvml_confidential_settings": (
        "c_nvmlSystemConfComputeSettings_v1_t",
        {"multi_gpu_mode": "multiGpuMode"},
    ),
    "nvml_capture_stats": ("c_nvmlFBCStats_t", {"average_latency": "averageLatency"}),
    "nvml_gpm_support": ("c_nvmlGpmSupport_t", {"supported": "isSupportedDevice"}),
    "nvml_dynamic_pstates": ("c_nvmlGpuDynamicPstatesInfo_t", {"domain": "utilization"}),
    "nvml_event": (
        "c_nvmlEventData_t",
        {"type": "eventType", "data": "eventData", "gpu_instance": "gpuInstanceId"},
    ),
    "nvml_capabilities": ("c_nvmlDeviceCapabilities_v1_t", {"mask": "capMask"}),
}


def test_layouts_are_the_public_ones(pynvml: ModuleType, tmp_path: Path) -> None:
    lines = [
        f'#include "{SOURCES}/nvml_types.h"',
        "#include <stddef.h>",
        "#include <stdio.h>",
        "int main(void) {",
    ]
    expected = []
    for ours, (theirs, fields) in PAIRS.items():
        structure = getattr(pynvml, theirs)
        lines.append(f'printf("{ours} %zu\\n", sizeof(struct {ours}));')
        expected.append(f"{ours} {pynvml.sizeof(structure)}")
        for field, other in fields.items():
            lines.append(f'printf("{ours}.{field} %zu\\n", offsetof(struct {ours}, {field}));')
            expected.append(f"{ours}.{field} {getattr(structure, other).offset}")
    source = tmp_path / "layouts.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    program = tmp_path / "layouts"
    subprocess.run(["gcc", "-std=gnu11", "-o", program, source], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == expected
