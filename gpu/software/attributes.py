# SPDX-License-Identifier: Apache-2.0
"""What the software GPU says of itself: CUdevice_attribute numbers and values.

A modest compute capability 7.5 device under its own name: the oldest that current compilers still write
PTX for, so the PTX that reaches the executor is the plainest there is. It has no unified virtual
addressing claims it cannot keep: managed memory, peers, clusters, tensor maps are 0.
"""

from __future__ import annotations

NAME = "vGPU Software Device"
UUID = b"vgpu-software-0\0"
DRIVER_VERSION = 13000
DRIVER_VERSION_TEXT = "580.00.00"
COMPUTE_CAPABILITY = (7, 5)
MULTIPROCESSORS = 8
MAX_THREADS_PER_BLOCK = 1024
SHARED_PER_BLOCK = 48 * 1024
SHARED_PER_BLOCK_OPTIN = 64 * 1024
SHARED_PER_MULTIPROCESSOR = 64 * 1024
REGISTERS = 65536
THREADS_PER_MULTIPROCESSOR = 1024
BLOCKS_PER_MULTIPROCESSOR = 16
PCI = (0, 0, 0)

ATTRIBUTES: dict[int, int] = {
    1: MAX_THREADS_PER_BLOCK,
    2: 1024, 3: 1024, 4: 64,  # block x, y, z
    5: 2**31 - 1, 6: 65535, 7: 65535,  # grid x, y, z
    8: SHARED_PER_BLOCK,
    9: 65536,  # constant memory
    10: 32,  # warp size
    11: 2**31 - 1,  # pitch
    12: REGISTERS,
    13: 1_000_000,  # clock kHz
    14: 512,  # texture alignment
    15: 1,  # copy/compute overlap
    16: MULTIPROCESSORS,
    17: 0, 18: 0,  # kernel timeout, integrated
    19: 1,  # can map host memory
    20: 0,  # compute mode default
    21: 131072,  # largest textures, and so arrays: of one dimension
    22: 131072, 23: 65536,  # of two
    24: 16384, 25: 16384, 26: 16384,  # of three
    27: 32768, 28: 32768, 29: 2048,  # of two in layers
    42: 32768, 43: 2048,  # of one in layers
    45: 32768, 46: 32768,  # gathering
    52: 32768, 53: 32768, 54: 2046,  # cubes
    30: 512,  # surface alignment
    51: 32,  # pitch alignment of textures in device memory
    55: 32768, 56: 131072, 57: 65536, 58: 16384, 59: 16384, 60: 16384,  # largest surfaces of one, two, three dimensions
    61: 32768, 62: 2048, 63: 32768, 64: 32768, 65: 2048,  # of one and two in layers
    66: 32768, 67: 32768, 68: 2046,  # cubes
    69: 1 << 28, 70: 131072, 71: 65000, 72: 2097120,  # textures in device memory: elements; columns, rows and pitch
    31: 1,  # concurrent kernels
    32: 0,  # ECC
    33: PCI[1], 34: PCI[2],
    35: 0,  # TCC
    36: 1_000_000, 37: 64,  # memory clock kHz, bus width
    38: 1 << 20,  # L2
    39: THREADS_PER_MULTIPROCESSOR,
    40: 0,  # async engines: copies complete in order with everything else
    41: 1,  # unified addressing
    50: PCI[0],
    75: COMPUTE_CAPABILITY[0], 76: COMPUTE_CAPABILITY[1],
    78: 0,  # stream priorities
    79: 0, 80: 0,  # L1 caching
    81: SHARED_PER_MULTIPROCESSOR,
    82: REGISTERS,
    83: 0,  # managed memory
    84: 0, 85: 0,
    86: 0,  # host native atomics
    87: 32,
    88: 0, 89: 0,  # pageable access, concurrent managed access
    90: 0,
    91: 1,  # host pointer usable for registered memory
    92: 0, 93: 0, 94: 0,  # v1 stream memory operations
    95: 1,  # cooperative launch
    97: SHARED_PER_BLOCK_OPTIN,
    98: 0, 99: 1,  # flush remote writes, host register supported
    100: 0, 101: 0,
    102: 1,  # virtual memory management
    103: 0, 104: 0, 105: 0,  # shareable handles
    106: BLOCKS_PER_MULTIPROCESSOR,
    107: 0, 108: 0, 109: 0, 110: 0,
    111: 1024,  # reserved shared memory per block
    112: 0, 113: 0, 114: 0,
    115: 1,  # memory pools
    116: 0, 117: 0, 118: 0, 119: 0, 120: 0,
    121: 0, 122: 1, 123: 1, 124: 0,  # clusters; stream memory operations and 64-bit ones are there
    125: 0, 126: 0,
    127: 0,
    130: 0, 131: 0, 132: 0, 133: 0, 134: 0,
}  # fmt: skip

# Every number a 13.0 driver knows has an answer, since runtimes ask for all of them and give up at the first that
# has none; what is not listed above is a feature this device lacks.
LAST_ATTRIBUTE = 149
ATTRIBUTES.update({number: 0 for number in range(1, LAST_ATTRIBUTE) if number not in ATTRIBUTES})
