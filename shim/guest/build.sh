#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# build.sh - builds everything that is installed inside a VM, with sh and gcc alone.
#
#   build.sh [-o FOLDER] [PART ...]
#
# CMakeLists.txt builds the same parts from the same globs (tests/shim/guest/test_build.py holds them together). A part
# whose sources are not there is an error when it was named, and left out with a word when it was not.
# CC and CFLAGS are honoured; JOBS says how many compilers run at once.
set -u
LC_ALL=C
export LC_ALL

here=$(dirname -- "$(readlink -f -- "$0")")
root=$(readlink -f -- "$here/../..")
out=$root/build/guest
CC=${CC:-gcc}
CFLAGS=${CFLAGS:--O2}
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 2)}
common="-std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror=implicit-function-declaration -pthread -fvisibility=hidden -fPIC -ffile-prefix-map=$root=."

say() { printf '%s\n' "build.sh: $*" >&2; }

# part -> what comes out, in which way, from what. A glob stands for itself where nothing matches it.
describe() {
    map='' without=''
    case $1 in
        libcuda) product=libcuda.so.1 kind=library sources='shim/libcuda/*.c' map=shim/libcuda/libcuda.map ;;
        libnvidia-ml)
            product=libnvidia-ml.so.1 kind=library sources='shim/libnvidia_ml/*.c' without='shim/libnvidia_ml/nvidia_smi*.c'
            map=shim/libnvidia_ml/libnvidia_ml.map
            ;;
        nvidia-smi) product=nvidia-smi kind=program sources='shim/libnvidia_ml/nvidia_smi*.c' ;;
        libvgpu-exec) product=libvgpu-exec.so kind=library sources='shim/exec/*.c' ;;
        vgpu-guest-agent) product=vgpu-guest-agent kind=program sources='shim/guest/agent*.c' ;;
        vgpu-guest-probe) product=vgpu-guest-probe kind=program sources='shim/guest/probe*.c' ;;
        *) return 1 ;;
    esac
}
PARTS='libcuda libnvidia-ml nvidia-smi libvgpu-exec vgpu-guest-agent vgpu-guest-probe'

compile() { # product kind map source...
    product=$1 kind=$2 map=$3
    shift 3
    objects=$out/objects/$product
    rm -rf "$objects"
    mkdir -p "$objects" || return 1
    running=0
    for source in "$@"; do
        # shellcheck disable=SC2254 # the glob is meant
        case ${source#"$root"/} in $without) continue ;; esac
        object=$objects/$(basename -- "$source" .c).o
        # shellcheck disable=SC2086 # the flags are words
        { $CC $common $CFLAGS -c "$source" -o "$object" || : >"$objects/failed"; } &
        running=$((running + 1))
        if [ "$running" -ge "$JOBS" ]; then
            wait
            running=0
        fi
    done
    wait
    [ ! -e "$objects/failed" ] || return 1
    link=
    if [ "$kind" = library ]; then
        link="-shared -Wl,-z,relro -Wl,-z,defs"
        case $product in *.so.1) link="$link -Wl,-soname,$product" ;; esac
        [ -z "$map" ] || link="$link -Wl,--version-script=$root/$map"
    fi
    # shellcheck disable=SC2086
    $CC $CFLAGS -pthread $link -o "$out/.$product.new" "$objects"/*.o -ldl || return 1
    mv -f "$out/.$product.new" "$out/$product" || return 1
    case $product in *.so.1) ln -sfn "$product" "$out/${product%.1}" ;; esac
}

build() { # part named(yes|no)
    describe "$1" || { say "no such part: $1 (there are: $PARTS)"; return 2; }
    # shellcheck disable=SC2086 # the glob is meant
    set -- "$2" "$root"/$sources
    named=$1
    shift
    if [ ! -e "$1" ]; then
        say "$product: no sources here ($sources)"
        [ "$named" = no ]
        return
    fi
    compile "$product" "$kind" "$map" "$@" || { say "$product: FAILED"; return 1; }
    say "$product: built"
}

while getopts o:h option; do
    case $option in
        o) out=$OPTARG ;;
        h) printf 'usage: build.sh [-o FOLDER] [PART ...]\nparts: %s\n' "$PARTS"; exit 0 ;;
        *) printf 'usage: build.sh [-o FOLDER] [PART ...]\n' >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
command -v "$CC" >/dev/null 2>&1 || { say "no $CC: install gcc and the C library's headers (Debian, Ubuntu: gcc libc6-dev; Fedora, openSUSE: gcc glibc-devel; Arch: gcc)"; exit 1; }
mkdir -p "$out" || exit 1
status=0
if [ $# -gt 0 ]; then
    for part in "$@"; do build "$part" yes || status=1; done
else
    for part in $PARTS; do build "$part" no || status=1; done
fi
rm -rf "$out/objects"
exit "$status"
