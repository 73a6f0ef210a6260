# SPDX-License-Identifier: Apache-2.0
"""The private export tables, slot by slot: digest, context-local storage, refusals, topology, functions of a module."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.private_library import (
    DEINITIALIZED,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_SUPPORTED,
    SUCCESS,
    TABLES,
    PrivateLibrary,
    build_fake_libcuda,
)

KEY = bytes.fromhex("146addae53a9a752aa0841360bf55a9f")

# Words a caller may reach, by what any known driver has; word 0 says what the 580 driver has.
KNOWN_WORDS = {
    "cudart": 13,
    "tls": 4,
    "hooks": 7,
    "checks": 17,
    "integrity": 3,
    "tools_context": 95,
    "tools_module": 95,
    "topology": 17,
    "jit_cache": 7,
}
SIZE_WORDS = {
    "cudart": 0x68,
    "tls": 0x18,
    "hooks": 0x38,
    "checks": 0x78,
    "integrity": 0x18,
    "tools_context": 0x2E8,
    "topology": 0x88,
    "jit_cache": 0x38,
}
ANSWERED = {
    "cudart": {1, 2, 6, 7, 8, 12},
    "tls": {2},
    "hooks": {2, 6},
    "storage": {0, 1, 2},
    "checks": {2, 3},
    "integrity": {1},
    "tools_context": {4, 39, 51},
    "tools_module": {7},
    "topology": {4, 13},
    "jit_cache": {1, 2, 3, 4, 6},
}


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_libcuda(tmp_path_factory.mktemp("private"))


@pytest.fixture
def private(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateLibrary]:
    for name in ("FAKE_DEVICES", "FAKE_DRIVER_VERSION", "FAKE_SPOIL", "FAKE_REFUSE", "FAKE_LOG"):
        monkeypatch.delenv(name, raising=False)
    library = PrivateLibrary(library_path)
    yield library
    library.library.fake_set_current(None)
    library.library.fake_tear_down(0)
    library.library.fake_set_topology(None, None, ctypes.c_size_t(66))


# ---- an MD2 of our own, whose permutation is shuffled out of the digits of pi ----


def digits_of_pi(count: int) -> str:
    """Machin's formula in whole numbers."""
    one = int("1" + "0" * (count + 10))

    def arctangent_of_inverse(x: int) -> int:
        term = total = one // x
        sign, odd = -1, 3
        while term:
            term //= x * x
            total += sign * (term // odd)
            sign, odd = -sign, odd + 2
        return total

    return str(4 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239)))[:count]


def permutation_from_pi() -> list[int]:
    digits = map(int, digits_of_pi(2000))

    def below(limit: int) -> int:
        while True:
            number, range_ = next(digits), 10
            if limit > 10:
                number, range_ = 10 * number + next(digits), 100
            if limit > 100:
                number, range_ = 10 * number + next(digits), 1000
            if number < limit * (range_ // limit):
                return number % limit

    box = list(range(256))
    for i in range(2, 257):
        j = below(i)
        box[j], box[i - 1] = box[i - 1], box[j]
    return box


BOX = permutation_from_pi()


def md2(message: bytes) -> bytes:
    padding = 16 - len(message) % 16
    message += bytes([padding]) * padding
    checksum, last = [0] * 16, 0
    for start in range(0, len(message), 16):
        for i in range(16):
            checksum[i] ^= BOX[message[start + i] ^ last]
            last = checksum[i]
    message += bytes(checksum)
    state = [0] * 16
    for start in range(0, len(message), 16):
        block = list(message[start : start + 16])
        work = state + block + [a ^ b for a, b in zip(state, block, strict=True)]
        carry = 0
        for turn in range(18):
            for i in range(48):
                work[i] ^= BOX[carry]
                carry = work[i]
            carry = (carry + turn) % 256
        state = work[:16]
    return bytes(state)


class Md2:
    """As much of a hash object as :mod:`hmac` asks for."""

    name = "md2"
    digest_size = 16
    block_size = 16

    def __init__(self, data: bytes = b"") -> None:
        self._data = data

    def update(self, data: bytes) -> None:
        self._data += data

    def digest(self) -> bytes:
        return md2(self._data)

    def copy(self) -> Md2:
        return Md2(self._data)


def hmac_md2(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, Md2).digest()  # type: ignore[arg-type]


def c_md2(private: PrivateLibrary, message: bytes) -> bytes:
    digest = ctypes.create_string_buffer(16)
    private.library.fake_md2(message, ctypes.c_size_t(len(message)), digest)
    return digest.raw


def c_hmac(private: PrivateLibrary, key: bytes, message: bytes) -> bytes:
    digest = ctypes.create_string_buffer(16)
    private.library.fake_hmac_md2(
        key, ctypes.c_size_t(len(key)), message, ctypes.c_size_t(len(message)), digest
    )
    return digest.raw


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (b"", "8350e5a3e24c153df2275c9f80692773"),
        (b"a", "32ec01ec4a6dac72c0ab96fb34c0b5d1"),
        (b"abc", "da853b0d3f88d99b30283a69e6ded6bb"),
        (b"message digest", "ab4f496bfb2a530b219ff33031fe06b0"),
        (b"abcdefghijklmnopqrstuvwxyz", "4e8ddff3650292ab5a4108c3aa47940b"),
    ],
)
def test_md2_gives_the_vectors_of_the_standard(private: PrivateLibrary, message: bytes, digest: str) -> None:
    assert md2(message).hex() == digest
    assert c_md2(private, message).hex() == digest


def test_md2_and_hmac_agree_with_the_independent_one_at_every_length(private: PrivateLibrary) -> None:
    for size in range(70):
        message = hashlib.sha512(b"%d" % size).digest()[:size]
        assert c_md2(private, message) == md2(message)
        # Keys below, at and above one block: the last is hashed first.
        key = hashlib.sha512(b"key %d" % size).digest()[: size % 40]
        assert c_hmac(private, key, message) == hmac_md2(key, message)
    assert c_hmac(private, KEY, b"").hex() == "f66b07aba4a875ea140c2cc013a41c6a"


def test_sha256_agrees_with_hashlib_at_every_length(private: PrivateLibrary) -> None:
    for size in [*range(200), 1000, 65537]:
        message = bytes(i * 7 % 251 for i in range(size))
        digest = ctypes.create_string_buffer(32)
        private.library.fake_sha256(message, ctypes.c_size_t(size), digest)
        assert digest.raw == hashlib.sha256(message).digest()


# ---- the integrity answer ----

RECORD = (0x2F30, 12082, 0x2FA423, 0xF79C1000, 0x7FFFF6958240, 0x7FFFF6958220, 0x7FFFF2AAF4A0, 0x682B9CEE)
DEVICES = [
    bytes(range(0x10, 0x20)) + struct.pack("<iii", 0, 0x40, 0),
    bytes(range(0x20, 0x30)) + struct.pack("<iii", 0, 0x41, 0),
]


def integrity_answer(private: PrivateLibrary, record: tuple[int, ...], devices: list[bytes]) -> bytes:
    inputs = struct.pack("<IIIIQQQQII", *record, len(devices), 0)
    answer = ctypes.create_string_buffer(16)
    private.library.fake_integrity_answer(inputs, b"".join(devices), answer)
    return answer.raw


@pytest.mark.parametrize(
    ("device_count", "digest"),
    [
        (0, "0779ef5e4ffa2dd207527503d1907bfa"),
        (1, "830fafb9ce38c3e4f1f1ed30fef81a16"),
        (2, "7f1e2ed9f3aa7b51d1b1f7f9d6cf8d1a"),
    ],
)
def test_the_digest_of_a_known_record(private: PrivateLibrary, device_count: int, digest: str) -> None:
    devices = DEVICES[:device_count]
    message = struct.pack("<IIIIQQQQ", *RECORD) + b"".join(devices)
    assert len(message) == 48 + 28 * device_count
    assert hmac_md2(KEY, message).hex() == digest
    assert integrity_answer(private, RECORD, devices).hex() == digest


def test_the_first_two_questions_have_fixed_answers(private: PrivateLibrary) -> None:
    for last_digit, first_word in [(0, 0x3341181C03CB675C), (1, 0x1841181C03CB675C)]:
        record = (RECORD[0], 13000 + last_digit, *RECORD[2:])
        expected = struct.pack("<QQ", first_word, 0x8ED383AA1F4CD1E8)
        assert integrity_answer(private, record, DEVICES) == expected
    record = (RECORD[0], 13005, *RECORD[2:])
    assert integrity_answer(private, record, []) == hmac_md2(KEY, struct.pack("<IIIIQQQQ", *record))


def ask_integrity(private: PrivateLibrary, version: int, seconds: int) -> bytes:
    question = private.slot("integrity", 1, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p)
    answer = ctypes.create_string_buffer(16)
    assert question(version, seconds, answer) == SUCCESS
    return answer.raw


def expected_from_public_answers(private: PrivateLibrary, version: int, seconds: int) -> bytes:
    """What a runtime computes, from nothing but public functions and the tables it was handed, on this thread."""
    library = private.library
    driver, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(driver))
    library.cuDeviceGetCount(ctypes.byref(count))
    pthread_self = ctypes.CDLL(None).pthread_self
    pthread_self.restype = ctypes.c_ulong
    message = struct.pack(
        "<IIIIQQQQ",
        *(driver.value, version, os.getpid(), pthread_self() & 0xFFFFFFFF),
        *(private.table("cudart"), private.table("integrity"), private.words("integrity", 2)[1], seconds),
    )
    for ordinal in range(count.value):
        uuid = ctypes.create_string_buffer(16)
        library.cuDeviceGetUuid(uuid, ordinal)
        message += uuid.raw
        for attribute in (50, 33, 34):
            value = ctypes.c_int()
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, ordinal)
            message += struct.pack("<i", value.value)
    return hmac_md2(KEY, message)


@pytest.mark.parametrize("devices", [0, 1, 8])
def test_the_integrity_slot_covers_what_the_public_functions_say(
    private: PrivateLibrary, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    monkeypatch.setenv("FAKE_DEVICES", str(devices))
    answer = ask_integrity(private, 13002, 1_700_000_000)
    assert answer == expected_from_public_answers(private, 13002, 1_700_000_000)


def test_the_integrity_answer_is_of_the_asking_thread(private: PrivateLibrary) -> None:
    results: list[bool] = []

    def ask() -> None:
        results.append(ask_integrity(private, 12082, 7) == expected_from_public_answers(private, 12082, 7))

    here = ask_integrity(private, 12082, 7)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert results == [True]
    assert here == expected_from_public_answers(private, 12082, 7)


@pytest.mark.parametrize("what", ["version", "uuid", "pci", "count"])
def test_a_private_fact_that_differs_from_the_public_one_changes_the_digest(
    private: PrivateLibrary, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("FAKE_SPOIL", what)
    assert ask_integrity(private, 13002, 7) != expected_from_public_answers(private, 13002, 7)


def test_the_integrity_slot_without_room_for_an_answer(private: PrivateLibrary) -> None:
    question = private.slot("integrity", 1, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p)
    assert question(13002, 7, None) == INVALID_VALUE


# ---- which tables, which slots ----


def test_tables_have_one_address_for_ever_and_the_known_sizes(private: PrivateLibrary) -> None:
    addresses = {name: private.table(name) for name in TABLES}
    assert len(set(addresses.values())) == len(TABLES)
    assert {name: private.table(name) for name in TABLES} == addresses
    for name, size in SIZE_WORDS.items():
        assert private.words(name, 1) == [size], name


def test_every_slot_is_a_function_and_the_unanswered_say_which_they_are(private: PrivateLibrary) -> None:
    for name, count in {**KNOWN_WORDS, "storage": 8}.items():
        first = 0 if name == "storage" else 1
        words = private.words(name, count)
        assert all(words[first:]), name
        assert len(set(words[first:])) == count - first, f"{name}: two slots share a function"
        for number in set(range(first, count)) - ANSWERED[name]:
            before = private.refused_count()
            # Whatever a caller passes, the answer is the same and nothing is touched.
            refused = private.slot(name, number, *[ctypes.c_void_p] * 6)
            assert refused(1, 2, 3, 4, 5, 6) == NOT_SUPPORTED
            assert private.refused_count() == before + 1
            assert private.last_refused() == f"cuGetExportTable {TABLES[name]}[{number}]"
    assert private.words("storage", 9)[8] == 0, "the table without a size word ends with a null"


@pytest.mark.parametrize(
    "uuid",
    [
        "f8cff95121468b4eb9e2fb469e7c0dd9",
        "69a28e9f24498b47b030c5da330ea4e9",
        "0ca50b8c1004929a89a7d0df10e77286",
        "6bd5fb6c5bf4e74a8987d93912fd9dfa",
        "00000000000000000000000000000000",
        "ffffffffffffffffffffffffffffffff",
    ],
)
def test_other_tables_are_refused_with_a_null_and_counted_by_name(private: PrivateLibrary, uuid: str) -> None:
    assert private.table_result(uuid) == (INVALID_VALUE, None)
    assert private.last_refused() == f"cuGetExportTable {uuid}"


def test_names_of_refused_tables_last_and_are_bounded(private: PrivateLibrary) -> None:
    uuid = "0123456789abcdef0123456789abcdef"
    private.table_result(uuid)
    private.table_result(uuid)
    names = private.library.fake_refused_name
    names.restype = ctypes.c_void_p
    try:
        assert names(0) == names(1), "the counter keeps the pointer, so it must be the same one"
    finally:
        names.restype = ctypes.c_char_p
    for i in range(200):
        private.table_result(hashlib.md5(b"%d" % i).hexdigest())
    assert private.last_refused() == "cuGetExportTable (others)"
    private.table_result(uuid)
    assert private.last_refused() == f"cuGetExportTable {uuid}"


def test_null_arguments_of_the_look_up(private: PrivateLibrary) -> None:
    assert private.library.cuGetExportTable(None, bytes.fromhex(TABLES["cudart"])) == INVALID_VALUE
    table = ctypes.c_void_p(1)
    assert private.library.cuGetExportTable(ctypes.byref(table), None) == INVALID_VALUE
    assert table.value is None


# ---- the runtime's own table ----


def test_the_primary_context_handle_is_the_one_a_retain_gives(
    private: PrivateLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEVICES", "2")
    handle_of = private.slot("cudart", 2, ctypes.c_void_p, ctypes.c_int)
    for device in (0, 1):
        handle, retained = ctypes.c_void_p(), ctypes.c_void_p()
        flags, active = ctypes.c_uint(), ctypes.c_int(-1)
        assert handle_of(ctypes.byref(handle), device) == SUCCESS
        private.library.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        assert active.value == 0, "asking for the handle must not activate the context"
        private.library.cuDevicePrimaryCtxRetain(ctypes.byref(retained), device)
        assert handle.value == retained.value
        private.library.cuDevicePrimaryCtxRelease_v2(device)
    assert handle_of(ctypes.byref(ctypes.c_void_p()), 2) == INVALID_DEVICE
    assert handle_of(ctypes.byref(ctypes.c_void_p()), -1) == INVALID_DEVICE
    assert handle_of(None, 0) == INVALID_VALUE


def test_module_loading_slots_take_the_image_and_refuse_host_variables(private: PrivateLibrary) -> None:
    pointer = ctypes.c_void_p
    module = pointer()
    assert private.slot("cudart", 1, pointer, pointer)(ctypes.byref(module), 0x5000) == SUCCESS
    assert module.value == 0x5001  # the fake's handle for that image
    extended = private.slot("cudart", 6, pointer, pointer, pointer, pointer, ctypes.c_uint32)
    assert extended(ctypes.byref(module), 0x6000, None, None, 0) == SUCCESS
    assert module.value == 0x6001
    swapped = private.slot("cudart", 8, pointer, pointer, pointer, pointer, ctypes.c_uint32)
    assert swapped(0x7000, ctypes.byref(module), None, None, 0) == SUCCESS
    assert module.value == 0x7001
    for arguments in [(1, None, 0), (None, 1, 0), (None, None, 1)]:
        assert extended(ctypes.byref(module), 0x6000, *arguments) == NOT_SUPPORTED
        assert private.last_refused() == f"cuGetExportTable {TABLES['cudart']}[6] with host variables"
        assert swapped(0x7000, ctypes.byref(module), *arguments) == NOT_SUPPORTED
        assert private.last_refused() == f"cuGetExportTable {TABLES['cudart']}[8] with host variables"
    assert extended(ctypes.byref(module), None, None, None, 0) == INVALID_VALUE
    assert private.slot("cudart", 12)() == SUCCESS


def test_callback_flags_are_zero_words_enough_for_every_runtime(private: PrivateLibrary) -> None:
    pointer = ctypes.c_void_p
    for slot, least in [(2, 567), (6, 14)]:
        flags, count = pointer(), ctypes.c_size_t()
        private.slot("hooks", slot, pointer, pointer, result=None)(ctypes.byref(flags), ctypes.byref(count))
        assert count.value >= least
        assert flags.value is not None
        # 4096 bytes in both, whatever the count says: runtimes read u32s.
        assert not any((ctypes.c_uint32 * 1024).from_address(flags.value))


def test_thread_context_and_checks(private: PrivateLibrary) -> None:
    pointer = ctypes.c_void_p
    thread_context = private.slot("tls", 2, pointer)
    found = pointer(1)
    assert thread_context(ctypes.byref(found)) == SUCCESS
    assert found.value is None
    private.library.fake_set_current(0x1000)
    assert thread_context(ctypes.byref(found)) == SUCCESS
    assert found.value == 0x1000

    derived, other = ctypes.c_uint32(7), pointer(0x1234)
    is_derived = private.slot("checks", 2, pointer, pointer, pointer)
    assert is_derived(0x1000, ctypes.byref(derived), ctypes.byref(other)) == SUCCESS
    assert derived.value == 0
    assert other.value == 0x1234, "cuBLAS breaks when this is written"
    assert private.slot("checks", 3, result=ctypes.c_uint32)() == 0


# ---- context-local storage ----

DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class Storage:
    """The three slots, and what destructors were called with."""

    def __init__(self, private: PrivateLibrary) -> None:
        pointer = ctypes.c_void_p
        self.put = private.slot("storage", 0, pointer, pointer, pointer, DESTRUCTOR)
        self.delete = private.slot("storage", 1, pointer, pointer)
        self._get = private.slot("storage", 2, pointer, pointer, pointer)
        self.drop = private.library.fake_context_dropped
        self.destroyed: list[tuple[int, int, int]] = []
        self.destructor = DESTRUCTOR(lambda *arguments: self.destroyed.append(arguments))
        self.no_destructor = DESTRUCTOR()

    def get(self, context: int | None, key: int) -> tuple[int, int | None]:
        value = ctypes.c_void_p(0xBAD)
        result = self._get(ctypes.byref(value), context, key)
        return result, value.value


@pytest.fixture
def storage(private: PrivateLibrary) -> Iterator[Storage]:
    slots = Storage(private)
    yield slots
    for context in (0x1000, 0x2000):
        slots.drop(context)


def test_storage_is_by_context_and_key(storage: Storage) -> None:
    for context in (0x1000, 0x2000):
        for key in (1, 2):
            assert storage.put(context, key, context + key, storage.no_destructor) == SUCCESS
    for context in (0x1000, 0x2000):
        for key in (1, 2):
            assert storage.get(context, key) == (SUCCESS, context + key)
    assert storage.put(0x1000, 1, 77, storage.no_destructor) == SUCCESS
    assert storage.get(0x1000, 1) == (SUCCESS, 77)
    assert storage.get(0x2000, 1) == (SUCCESS, 0x2001)


def test_a_miss_is_an_error_and_leaves_the_value_alone(storage: Storage) -> None:
    assert storage.get(0x1000, 1) == (INVALID_HANDLE, 0xBAD)
    assert storage.delete(0x1000, 1) == INVALID_HANDLE
    assert storage.put(0x1000, 1, 5, storage.destructor) == SUCCESS
    assert storage.delete(0x1000, 1) == SUCCESS
    assert storage.get(0x1000, 1) == (INVALID_HANDLE, 0xBAD)
    storage.drop(0x1000)
    assert storage.destroyed == [], "who deletes frees the value"


def test_no_context_means_the_calling_threads(private: PrivateLibrary, storage: Storage) -> None:
    all_ones = 2**64 - 1
    for context in (None, all_ones):
        assert storage.get(context, 1) == (INVALID_CONTEXT, 0xBAD)
        assert storage.put(context, 1, 5, storage.no_destructor) == INVALID_CONTEXT
        assert storage.delete(context, 1) == INVALID_CONTEXT
    private.library.fake_set_current(0x1000)
    assert storage.put(None, 1, 10, storage.no_destructor) == SUCCESS
    assert storage.get(all_ones, 1) == (SUCCESS, 10)
    assert storage.get(0x1000, 1) == (SUCCESS, 10)

    elsewhere: list[tuple[int, int | None]] = []

    def other_thread() -> None:
        elsewhere.append(storage.get(None, 1))
        private.library.fake_set_current(0x2000)
        assert storage.put(None, 1, 20, storage.no_destructor) == SUCCESS
        elsewhere.append(storage.get(None, 1))

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert elsewhere == [(INVALID_CONTEXT, 0xBAD), (SUCCESS, 20)]
    assert storage.get(None, 1) == (SUCCESS, 10)


def test_destructors_run_once_for_the_dropped_context_alone(storage: Storage) -> None:
    for key in range(1, 40):
        assert storage.put(0x1000, key, 100 + key, storage.destructor) == SUCCESS
    assert storage.put(0x1000, 40, 140, storage.no_destructor) == SUCCESS
    assert storage.put(0x2000, 1, 201, storage.destructor) == SUCCESS
    storage.drop(0x1000)
    assert sorted(storage.destroyed) == [(0x1000, key, 100 + key) for key in range(1, 40)]
    assert storage.get(0x1000, 40) == (INVALID_HANDLE, 0xBAD)
    assert storage.get(0x2000, 1) == (SUCCESS, 201)
    storage.drop(0x1000)
    assert len(storage.destroyed) == 39


def test_an_overwritten_value_keeps_only_the_new_destructor(storage: Storage) -> None:
    assert storage.put(0x1000, 1, 10, storage.destructor) == SUCCESS
    assert storage.put(0x1000, 1, 11, storage.destructor) == SUCCESS
    assert storage.destroyed == []
    storage.drop(0x1000)
    assert storage.destroyed == [(0x1000, 1, 11)]


def test_a_destructor_may_use_the_storage(storage: Storage) -> None:
    seen: list[tuple[int, int | None]] = []

    def reenter(context: int, key: int, value: int) -> None:
        seen.append(storage.get(context, key))
        assert storage.delete(context, key) == INVALID_HANDLE
        assert storage.put(context, 99, value, storage.no_destructor) == SUCCESS

    destructor = DESTRUCTOR(reenter)
    assert storage.put(0x1000, 1, 10, destructor) == SUCCESS
    storage.drop(0x1000)
    assert seen == [(INVALID_HANDLE, 0xBAD)]
    # What is put meanwhile belongs to the context's next life.
    assert storage.get(0x1000, 99) == (SUCCESS, 10)


def test_after_teardown_everything_says_so(private: PrivateLibrary, storage: Storage) -> None:
    private.library.fake_set_current(0x1000)
    assert storage.put(0x1000, 1, 10, storage.no_destructor) == SUCCESS
    private.library.fake_tear_down(1)
    assert storage.get(0x1000, 1) == (DEINITIALIZED, 0xBAD)
    assert storage.put(0x1000, 2, 1, storage.no_destructor) == DEINITIALIZED
    assert storage.delete(0x1000, 1) == DEINITIALIZED
    pointer = ctypes.c_void_p
    out = ctypes.byref(pointer())
    assert private.slot("tls", 2, pointer)(out) == DEINITIALIZED
    assert private.slot("cudart", 2, pointer, ctypes.c_int)(out, 0) == DEINITIALIZED
    assert private.slot("topology", 4, pointer, pointer)(out, out) == DEINITIALIZED
    assert private.slot("tls", 1)() == DEINITIALIZED


def test_a_forked_child_starts_without_the_parents_contexts(
    private: PrivateLibrary, storage: Storage
) -> None:
    assert storage.put(0x1000, 1, 10, storage.destructor) == SUCCESS
    child = os.fork()
    if child == 0:
        private.library.fake_fork_child()
        forgotten = storage.get(0x1000, 1)[0] == INVALID_HANDLE and not storage.destroyed
        usable = storage.put(0x1000, 1, 20, storage.no_destructor) == SUCCESS
        os._exit(0 if forgotten and usable and storage.get(0x1000, 1) == (SUCCESS, 20) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert storage.get(0x1000, 1) == (SUCCESS, 10)


# ---- what cuBLAS, cuFFT and cuBLASLt ask ----


def test_contexts_have_small_numbers_of_their_own_in_four_bytes(private: PrivateLibrary) -> None:
    pointer = ctypes.c_void_p
    number_of = private.slot("tools_context", 4, pointer, pointer)

    def number(context: int | None) -> int:
        room = (ctypes.c_uint32 * 2)(0xAAAAAAAA, 0xBBBBBBBB)
        assert number_of(context, room) == SUCCESS
        assert room[1] == 0xBBBBBBBB, "callers have four bytes"
        return room[0]

    first, second = number(0x1000), number(0x2000)
    assert first != second
    assert 0 < first < 1000
    assert 0 < second < 1000
    assert number(0x1000) == first
    private.library.fake_set_current(0x2000)
    assert number(None) == second
    private.library.fake_set_current(None)
    assert number_of(None, (ctypes.c_uint32 * 2)()) == INVALID_CONTEXT
    for context in (0x1000, 0x2000):
        private.library.fake_context_dropped(context)
    assert number(0x1000) not in (first, second), "a new life is a new number"
    private.library.fake_context_dropped(0x1000)


def test_streams_have_objects_and_numbers(private: PrivateLibrary) -> None:
    pointer = ctypes.c_void_p
    object_of = private.slot("tools_context", 51, pointer, pointer, pointer)
    number_of = private.slot("tools_context", 39, pointer, pointer, pointer)
    numbers = {}
    for stream in (None, 1, 2, 0x7000, 0x8000):
        found, room = pointer(), (ctypes.c_uint32 * 2)(0, 0xBBBBBBBB)
        assert object_of(0x1000, stream, ctypes.byref(found)) == SUCCESS
        assert found.value is not None, "cuBLAS wants a non-null object for the default stream too"
        assert number_of(0x1000, found, room) == SUCCESS
        assert room[1] == 0xBBBBBBBB
        numbers[stream] = room[0]
    assert len(set(numbers.values())) == len(numbers)
    assert object_of(0x1000, 2**64 - 1, ctypes.byref(pointer())) == INVALID_HANDLE
    assert number_of(0x1000, None, (ctypes.c_uint32 * 2)()) == INVALID_VALUE


def test_the_functions_of_a_module_are_visited(private: PrivateLibrary) -> None:
    visitor_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
    seen: list[tuple[int, int, int]] = []
    visitor = visitor_type(lambda *arguments: seen.append(arguments))
    visit = private.slot(
        "tools_module",
        7,
        *(ctypes.c_void_p, ctypes.c_void_p, visitor_type, ctypes.c_void_p),
        result=ctypes.c_uint32,
    )
    assert visit(None, 0x3000, visitor, 0x55) == 3
    assert seen == [(0x55, 0x3000 + i, 0x3000) for i in (1, 2, 3)]
    assert visit(None, 0x4000, visitor, 0x55) == 0
    assert visit(None, 0x3000, visitor_type(), 0x55) == 0


def ask_topology(private: PrivateLibrary, size: int) -> tuple[bytes, bytes]:
    pointer = ctypes.c_void_p
    gpc, index = pointer(), pointer()
    assert private.slot("topology", 4, pointer, pointer)(ctypes.byref(gpc), ctypes.byref(index)) == SUCCESS
    assert gpc.value is not None
    assert index.value is not None
    answer = ctypes.string_at(gpc.value, size), ctypes.string_at(index.value, size)
    assert private.slot("topology", 13, pointer, pointer)(gpc, index) == SUCCESS
    return answer


def test_a_known_topology_is_handed_out_as_it_is(private: PrivateLibrary) -> None:
    gpc = bytes(list(range(8)) * 4 + list(range(1, 8)) * 4 + [6, 7, 11, 14, 17, 19])
    index = bytes(
        [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8 + [4] * 7 + [5] * 7 + [6] * 7 + [7] * 7 + [8] * 2 + [0] * 4
    )
    private.library.fake_set_topology(gpc, index, ctypes.c_size_t(66))
    assert ask_topology(private, 66) == (gpc, index)


def test_an_unknown_topology_is_spread_evenly(private: PrivateLibrary) -> None:
    private.library.fake_set_topology(None, None, ctypes.c_size_t(20))
    assert ask_topology(private, 20) == (
        bytes(i % 8 for i in range(20)),
        bytes(i // 8 for i in range(20)),
    )


def test_no_topology_without_a_device(private: PrivateLibrary) -> None:
    private.library.fake_set_topology(None, None, ctypes.c_size_t(0))
    gpc, index = ctypes.c_void_p(1), ctypes.c_void_p(1)
    ask = private.slot("topology", 4, ctypes.c_void_p, ctypes.c_void_p)
    assert ask(ctypes.byref(gpc), ctypes.byref(index)) == INVALID_CONTEXT
    assert (gpc.value, index.value) == (None, None)
