# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh disable=SC2034 # answers in variables
#
# system.sh - what machine is this: its device, its drivers, its C library, its groups. Reads only, never changes anything.
#
# Everything is looked for below PREFIX, so that an image can be examined, and so that tests can show it any machine.

VENDOR=0x10de DEVICE=0x2331 SUBSYSTEM=0x16c1
BAR0_LARGEST=1048576 # a real card's BAR0 has 16 MiB

# One line of a file into VALUE; empty if it cannot be read.
attribute() {
    VALUE=
    { IFS= read -r VALUE <"$1"; } 2>/dev/null
    [ -n "$VALUE" ]
}

is_ours() { # sysfs folder of a PCI device
    attribute "$1/vendor" && [ "$VALUE" = $VENDOR ] && attribute "$1/device" && [ "$VALUE" = $DEVICE ] || return 1
    attribute "$1/subsystem_vendor" && [ "$VALUE" = $VENDOR ] || return 1
    attribute "$1/subsystem_device" && [ "$VALUE" = $SUBSYSTEM ] || return 1
    size=$(stat -c %s "$1/resource0" 2>/dev/null) || return 1
    [ "$size" -le $BAR0_LARGEST ]
}

# OURS: sysfs folders of virtual GPUs, REAL: of other NVIDIA display devices; one a line.
find_gpus() {
    OURS='' REAL=''
    for folder in "$PREFIX"/sys/bus/pci/devices/*; do
        [ -e "$folder/vendor" ] || continue
        if is_ours "$folder"; then
            OURS="$OURS$folder
"
        elif attribute "$folder/vendor" && [ "$VALUE" = $VENDOR ] && attribute "$folder/class"; then
            case $VALUE in 0x03*) REAL="$REAL$folder
" ;; esac
        fi
    done
}

driver_of() { # sysfs folder; DRIVER is empty if none is bound
    DRIVER=
    [ ! -L "$1/driver" ] || DRIVER=$(basename -- "$(readlink -- "$1/driver")")
}

find_ldconfig() {
    LDCONFIG=
    for candidate in ldconfig /sbin/ldconfig /usr/sbin/ldconfig; do
        if command -v "$candidate" >/dev/null 2>&1; then
            LDCONFIG=$candidate
            return 0
        fi
    done
    return 1
}

ldconfig_here() { # arguments of ldconfig, for the target system
    if [ -n "$PREFIX" ]; then "$LDCONFIG" -r "$PREFIX" "$@"; else "$LDCONFIG" "$@"; fi
}

# The x86-64 libraries of this name that the loader's cache has, in its order, one a line: the first one wins.
cached() { # name
    [ -n "$LDCONFIG" ] && [ -e "$PREFIX/etc/ld.so.cache" ] || return 0
    ldconfig_here -p 2>/dev/null | while read -r name flags rest; do
        case $name$flags in "$1(libc6,x86-64"*) printf '%s\n' "${rest##*=> }" ;; esac
    done
}

# REASON: why this looks like a machine with NVIDIA's own driver. False if it does not.
has_real_driver() {
    if [ -e "$PREFIX/sys/module/nvidia" ]; then
        REASON="the kernel module nvidia is loaded"
        return 0
    fi
    if [ -e "$PREFIX/proc/driver/nvidia" ]; then
        REASON="/proc/driver/nvidia exists"
        return 0
    fi
    for library in $(cached libcuda.so.1) /usr/lib/x86_64-linux-gnu/libcuda.so.1 /usr/lib64/libcuda.so.1 /usr/lib/libcuda.so.1 \
        /usr/lib/wsl/lib/libcuda.so.1; do
        case $library in "$LIBDIR"/* | /usr/lib/vgpu/* | /usr/local/lib/vgpu/*) continue ;; esac
        if [ -e "$PREFIX$library" ] || [ -L "$PREFIX$library" ]; then
            REASON="a driver package put $library there"
            return 0
        fi
    done
    return 1
}

# ---- the C library ----

# PROBLEM: why our libraries cannot be used here.
is_unsuitable() {
    if [ "$(uname -s)" != Linux ] || [ "$(uname -m)" != x86_64 ]; then
        PROBLEM="this is $(uname -s) on $(uname -m), and only Linux on x86-64 will do"
        return 0
    fi
    if [ -e "$PREFIX/etc/alpine-release" ] || { [ -e "$PREFIX/lib/ld-musl-x86_64.so.1" ] && ! has_glibc; }; then
        PROBLEM="this system's C library is musl (Alpine?); CUDA programs and these libraries are made for glibc. Use a guest with glibc (Debian, Ubuntu, Fedora, RHEL, openSUSE, Arch), or run the program in a container with one"
        return 0
    fi
    if [ -e "$PREFIX/etc/NIXOS" ]; then
        PROBLEM="NixOS has no loader cache to install into; unpack the libraries yourself and put their folder into hardware.graphics.extraPackages or LD_LIBRARY_PATH"
        return 0
    fi
    return 1
}

has_glibc() { [ -e "$PREFIX/lib64/ld-linux-x86-64.so.2" ] || [ -e "$PREFIX/usr/lib64/ld-linux-x86-64.so.2" ]; }

# GLIBC: version of the running system's, or empty.
glibc_version() {
    GLIBC=$(getconf GNU_LIBC_VERSION 2>/dev/null) || GLIBC=$(ldd --version 2>/dev/null | head -n 1)
    GLIBC=${GLIBC##* }
    case $GLIBC in [0-9]*.[0-9]*) ;; *) GLIBC= ;; esac
}

at_least() { # version version, each MAJOR.MINOR
    major=${1%%.*} minor=${1#*.}
    [ "$major" -gt "${2%%.*}" ] || { [ "$major" -eq "${2%%.*}" ] && [ "${minor%%.*}" -ge "${2#*.}" ]; }
}

# ---- groups ----

has_group() {
    while IFS=: read -r name _; do
        [ "$name" != "$1" ] || return 0
    done 2>/dev/null <"$PREFIX/etc/group"
    return 1
}

# Who may use GPUs: whom the installer was told, now or before, else as is usual in this distribution: render where it is,
# else video. Empty: neither, so root alone.
pick_group() {
    if [ -z "$GROUP" ] && attribute "$PREFIX$LIBDIR/guest/GROUP" && has_group "$VALUE"; then GROUP=$VALUE; fi
    if [ -n "$GROUP" ]; then
        has_group "$GROUP" || die "there is no group $GROUP; make it (groupadd --system $GROUP) or name another"
        return
    fi
    for candidate in render video; do
        if has_group "$candidate"; then
            GROUP=$candidate
            return
        fi
    done
    warn "this system has neither a group render nor video: only root will be able to use the GPU. Name one with --group"
}

has_systemd() { [ -d "$PREFIX/run/systemd/system" ]; }
