#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# validate_e2e.sh - the checklist of a new deployment: one line per item, and what to do about what is not right.
#
#   PASS  item: what was found
#   FAIL  item: what is wrong; remedy: what to do
#   SKIP  item: why it was not looked at; remedy: what would make it possible
#
# The exit status is 1 if anything failed, 2 for wrong words on the command line. Nothing is changed; --e2e runs the
# workload that it is told to run. It needs sh, awk, grep and sed, asks commands of the system where they are installed
# (vgpu-admin, nvidia-smi, lspci, ldconfig, python3, journalctl, ssh), and does without those that are not.

set -u
LC_ALL=C
export LC_ALL

usage() {
    cat <<END
usage: $0 --host  [--run-dir DIR] [--qemu PROGRAM]
       $0 --guest [--ollama-log FILE]
       $0 --e2e   [--run-dir DIR] [--ssh VM]... [--with COMMAND]... [--model NAME]

  --host             on the machine that has the GPU
  --guest            in a VM
  --e2e              a VM's programs and the host together; on the host. The first two VMs are told by
                       --ssh VM           run Ollama in that VM, through ssh (user@name)
                       --with COMMAND     or whatever makes a program in a VM compute, as a shell command
                     In a VM, without either, Ollama is run here and the host's items are skipped.
  --run-dir DIR      where the mediator's sockets are (default: VGPU_RUN_DIR, else /var/vgpu, for users
                     \$XDG_RUNTIME_DIR/vgpu)
  --qemu PROGRAM     the QEMU that runs the VMs (default: qemu-system-x86_64, else what distributions call it)
  --ollama-log FILE  what Ollama's server wrote, where it is not in the journal
  --model NAME       the model that Ollama is to run (default llama3.2:1b)

examples:
  $0 --host
  $0 --guest
  $0 --e2e --ssh root@vm1 --ssh root@vm2
  $0 --e2e --with 'vgpu-run --vm red -- python3 train.py'
END
}

FAILED=0
pass() { printf 'PASS  %s: %s\n' "$1" "$2"; }
fail() {
    printf 'FAIL  %s: %s; remedy: %s\n' "$1" "$2" "$3"
    FAILED=1
}
skip() { printf 'SKIP  %s: %s; remedy: %s\n' "$1" "$2" "$3"; }
have() { command -v "$1" >/dev/null 2>&1; }
# The first line of what comes in, without what a terminal would act on.
first_line() { tr -d '\000-\010\013-\037\177' | sed -n '/./{p;q;}'; }

MODE=
RUN_DIR=${VGPU_RUN_DIR:-}
QEMU=
MODEL=llama3.2:1b
PROMPT='Say hello'
OLLAMA_LOG=
COUNT=0 # workloads: WORK_1, WORK_2; how they are called: NAME_1, NAME_2
PREFIX=${VGPU_VALIDATE_PREFIX:-} # another root for /sys and /dev, for tests of this script

add_work() { # name command
    COUNT=$((COUNT + 1))
    case $COUNT in
        1) NAME_1=$1 WORK_1=$2 ;;
        2) NAME_2=$1 WORK_2=$2 ;;
        *)
            echo "$0: two VMs are enough" >&2
            exit 2
            ;;
    esac
}

# One word that a shell reads back as it is.
quoted() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }

# ---- words of the command line --------------------------------------------------------------------------------------

SSH_VMS=
while [ $# -gt 0 ]; do
    case $1 in
        --host | --guest | --e2e)
            if [ -n "$MODE" ]; then
                echo "$0: one of --host, --guest and --e2e" >&2
                exit 2
            fi
            MODE=${1#--}
            shift
            continue
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --run-dir | --qemu | --ollama-log | --model | --ssh | --with) ;;
        *)
            echo "$0: what is $1?" >&2
            usage >&2
            exit 2
            ;;
    esac
    if [ $# -lt 2 ] || [ -z "$2" ]; then
        echo "$0: $1 needs a value" >&2
        exit 2
    fi
    case $1 in
        --run-dir) RUN_DIR=$2 ;;
        --qemu) QEMU=$2 ;;
        --ollama-log) OLLAMA_LOG=$2 ;;
        --model) MODEL=$2 ;;
        --ssh)
            case $2 in -* | *[!A-Za-z0-9_.@:-]*)
                echo "$0: --ssh $2 is no user@name" >&2
                exit 2
                ;;
            esac
            add_work "$2" ''
            SSH_VMS="$SSH_VMS $COUNT"
            ;;
        --with) add_work "\"$2\"" "$2" ;;
    esac
    shift 2
done
if [ -z "$MODE" ]; then
    usage >&2
    exit 2
fi
# Now that the model is known, whatever the order of the words was.
for number in $SSH_VMS; do
    inside="ollama run $(quoted "$MODEL") $(quoted "$PROMPT")"
    case $number in
        1) WORK_1="ssh -n -o BatchMode=yes $NAME_1 $(quoted "$inside")" ;;
        2) WORK_2="ssh -n -o BatchMode=yes $NAME_2 $(quoted "$inside")" ;;
    esac
done
if [ -z "$RUN_DIR" ]; then
    RUN_DIR=/var/vgpu
    if [ "$(id -u)" != 0 ] && [ ! -S /var/vgpu/mediator.sock ]; then
        RUN_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}/vgpu
    fi
fi

# ---- asking the mediator --------------------------------------------------------------------------------------------

ADMIN=
find_admin() {
    here=$(cd "$(dirname "$0")" && pwd)
    for candidate in vgpu-admin "$here/../.venv/bin/vgpu-admin"; do
        if have "$candidate"; then
            ADMIN=$candidate
            return 0
        fi
    done
    return 1
}

# What vgpu-admin says, one field of JSON a line; its complaint on failure.
admin() { "$ADMIN" --run-dir "$RUN_DIR" --json "$@" 2>&1; }

# The value of a field out of that, the first of its name, without quotes.
json_field() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" | sed -n 1p; }

start_mediator='start run-mediator and read what it says'

# ---- the host -------------------------------------------------------------------------------------------------------

check_mediator() {
    GPU_KIND=
    if ! find_admin; then
        skip 'mediator runs' 'there is no vgpu-admin to ask it with' "install this project's package, or call this script from its checkout"
        return 1
    fi
    if ! HEALTH=$(admin show-health); then
        fail 'mediator runs' "$(printf '%s\n' "$HEALTH" | first_line)" "$start_mediator"
        return 1
    fi
    GPU_KIND=$(printf '%s\n' "$HEALTH" | json_field gpu)
    version=$(printf '%s\n' "$HEALTH" | json_field version)
    pid=$(printf '%s\n' "$HEALTH" | json_field pid)
    if [ "$(printf '%s\n' "$HEALTH" | json_field ok)" = true ]; then
        pass 'mediator runs' "version $version, process $pid, $GPU_KIND GPU"
    else
        fail 'mediator runs' 'it says that it is not well' "vgpu-admin show-health and vgpu-admin tree say what; $start_mediator"
    fi
}

check_nvidia_smi() {
    if [ "$GPU_KIND" = software ]; then
        skip 'nvidia-smi shows the GPU' 'the mediator runs on the software GPU' 'on a machine with a GPU: run-mediator --gpu nvidia'
    elif ! have nvidia-smi; then
        fail 'nvidia-smi shows the GPU' 'there is no nvidia-smi' "install NVIDIA's driver on this host"
    elif ! listed=$(nvidia-smi -L 2>&1) || ! printf '%s\n' "$listed" | grep -q '^GPU '; then
        fail 'nvidia-smi shows the GPU' "it says: $(printf '%s\n' "$listed" | first_line)" 'load the driver (modprobe nvidia), and look at dmesg | grep -i nvrm'
    else
        pass 'nvidia-smi shows the GPU' "$(printf '%s\n' "$listed" | first_line)"
    fi
}

check_socket() {
    if [ -S "$RUN_DIR/mediator.sock" ]; then
        pass 'mediator.sock exists' "$RUN_DIR/mediator.sock"
    elif [ -e "$RUN_DIR/mediator.sock" ]; then
        fail 'mediator.sock exists' "$RUN_DIR/mediator.sock is no socket" "remove it, then $start_mediator"
    else
        fail 'mediator.sock exists' "no $RUN_DIR/mediator.sock" "$start_mediator; if its sockets are elsewhere: --run-dir DIR"
    fi
}

check_qemu() {
    item='QEMU has the device'
    if [ -z "$QEMU" ]; then
        for candidate in qemu-system-x86_64 /usr/libexec/qemu-kvm /usr/bin/qemu-kvm; do
            if have "$candidate"; then
                QEMU=$candidate
                break
            fi
        done
    fi
    if [ -z "$QEMU" ]; then
        fail "$item" 'no QEMU found' 'install QEMU 10.1 or later; if it lies elsewhere: --qemu PROGRAM'
        return
    fi
    if ! version=$("$QEMU" --version 2>&1); then
        fail "$item" "$QEMU does not run: $(printf '%s\n' "$version" | first_line)" 'install QEMU 10.1 or later; if it lies elsewhere: --qemu PROGRAM'
        return
    fi
    version=$(printf '%s\n' "$version" | sed -n 's/^QEMU emulator version \([0-9][0-9.]*\).*/\1/p' | sed -n 1p)
    if "$QEMU" -device help 2>/dev/null | grep -q '"vfio-user-pci"'; then
        pass "$item" "$QEMU ${version:-of an unknown version} has vfio-user-pci"
    else
        fail "$item" "$QEMU ${version:-} has no vfio-user-pci" 'use QEMU 10.1 or later, built with vfio-user'
    fi
}

check_devices() {
    item="VMs' devices run"
    [ -n "$ADMIN" ] && [ -n "$GPU_KIND" ] || {
        skip "$item" 'no mediator to ask' "$start_mediator"
        return
    }
    number=$(printf '%s\n' "$HEALTH" | json_field vm_devices)
    down=$(printf '%s\n' "$HEALTH" | awk '/"vm_devices_down": \[$/ {inside = 1; next} inside && /\]/ {exit} inside {gsub(/[ ",]/, ""); printf "%s%s", sep, $0; sep = " "}')
    if [ -n "$down" ]; then
        fail "$item" "these do not: $down" 'vgpu-admin show-vm --vm-name=NAME says why'
    elif [ "${number:-0}" = 0 ]; then
        skip "$item" 'no VM is registered' 'vgpu-admin register-vm --vm-name=NAME prints what QEMU needs'
    else
        pass "$item" "$number"
    fi
}

# ---- a VM -----------------------------------------------------------------------------------------------------------

reinstall='vgpu-guest install (see docs/vm/guest.md)'

check_pci() {
    item='the GPU is on the PCI bus'
    found=
    if [ -z "$PREFIX" ] && have lspci; then
        found=$(lspci -n -d 10de:2331 2>/dev/null | grep -E '(^|[[:space:]])(Class )?0302: ' | first_line)
        seen='lspci'
    else
        seen='sysfs'
        for folder in "$PREFIX"/sys/bus/pci/devices/*; do
            [ -r "$folder/class" ] || continue
            if [ "$(cat "$folder/vendor")" = 0x10de ] && [ "$(cat "$folder/device")" = 0x2331 ]; then
                case $(cat "$folder/class") in 0x0302*) found="$(basename "$folder") 0302: 10de:2331" ;; esac
            fi
        done
    fi
    if [ -n "$found" ]; then
        pass "$item" "$found ($seen)"
    else
        fail "$item" "no device 10de:2331 of class 0302 ($seen)" 'on the host: vgpu-admin show-vm --vm-name=NAME prints the option for QEMU; start the VM again with it'
    fi
}

check_node() {
    if [ -e "$PREFIX/dev/nvidia0" ]; then
        pass '/dev/nvidia0 exists' 'it is there'
    else
        fail '/dev/nvidia0 exists' 'it is missing' "systemctl restart vgpu-guest; else $reinstall"
    fi
}

# Where the loader finds a library, into FOUND: first on the library path, then in its cache.
find_library() {
    FOUND=
    rest=${LD_LIBRARY_PATH:-}:
    while [ -n "$rest" ]; do
        folder=${rest%%:*}
        rest=${rest#*:}
        if [ -n "$folder" ] && [ -e "$folder/$1" ]; then
            FOUND=$folder/$1
            return 0
        fi
    done
    for program in ldconfig /sbin/ldconfig /usr/sbin/ldconfig; do
        have "$program" || continue
        FOUND=$("$program" -p 2>/dev/null | sed -n "s/^[[:space:]]*$1 (.*x86-64.*) => //p" | sed -n 1p)
        [ -n "$FOUND" ]
        return
    done
    return 1
}

check_library() { # name
    item="$1 is ours"
    if ! find_library "$1"; then
        fail "$item" 'the loader does not know it' "run ldconfig; else $reinstall"
    elif [ ! -r "$FOUND" ]; then
        fail "$item" "$FOUND cannot be read" "$reinstall"
    elif grep -q VGPU_RUN_DIR "$FOUND"; then
        target=$(readlink -f "$FOUND" 2>/dev/null) || target=$FOUND
        pass "$item" "$target"
    else
        fail "$item" "the loader finds $FOUND, which is another library" "remove the package it belongs to; else $reinstall"
    fi
}

check_ctypes() {
    item='Python loads libcuda.so.1'
    if ! have python3; then
        skip "$item" 'there is no python3' 'vgpu-guest check tries the library without it'
    elif said=$(python3 -c "import ctypes; ctypes.CDLL('libcuda.so.1')" 2>&1); then
        pass "$item" "python3 -c \"import ctypes; ctypes.CDLL('libcuda.so.1')\" succeeds"
        check_init
    else
        fail "$item" "$(printf '%s\n' "$said" | sed -n '$p' | first_line)" "run ldconfig; else $reinstall"
    fi
}

check_init() {
    item='cuInit succeeds'
    code=$(python3 -c "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))" 2>&1)
    case $code in
        0) pass "$item" 'the host answers' ;;
        100) fail "$item" 'it says 100, no device' 'vgpu-guest check says which step fails' ;;
        803) fail "$item" 'it says 803, versions differ' "install the bundle that belongs to the host's version" ;;
        *) fail "$item" "it says $(printf '%s\n' "$code" | first_line)" "vgpu-guest check; VGPU_LOG=1 makes the library say why" ;;
    esac
}

check_guest_smi() {
    item='nvidia-smi shows the GPU'
    if ! have nvidia-smi; then
        skip "$item" 'there is no nvidia-smi' "$reinstall"
    elif said=$(nvidia-smi -L 2>&1) && printf '%s\n' "$said" | grep -q '^GPU '; then
        pass "$item" "$(printf '%s\n' "$said" | first_line)"
    else
        fail "$item" "it says: $(printf '%s\n' "$said" | first_line)" 'vgpu-guest check'
    fi
}

# What the server said about its GPUs when it started last, on standard output.
ollama_says() {
    if [ -n "$OLLAMA_LOG" ]; then
        cat "$OLLAMA_LOG"
    else
        journalctl -u ollama --no-pager -o cat 2>/dev/null
    fi | grep -i 'inference compute' | sed -n '$p'
}

check_ollama_start() {
    item='Ollama detects the GPU'
    if ! have ollama && [ -z "$OLLAMA_LOG" ]; then
        skip "$item" 'Ollama is not installed' 'vgpu-guest install --with-ollama'
        return
    fi
    if [ -n "$OLLAMA_LOG" ] && [ ! -r "$OLLAMA_LOG" ]; then
        skip "$item" "$OLLAMA_LOG cannot be read" 'give the file that its server writes'
        return
    fi
    line=$(ollama_says)
    case $line in
        *library=[cC][uU][dD][aA]*) pass "$item" "$(printf '%s\n' "$line" | sed -n 's/.*\(library=.*\)/\1/p' | first_line)" ;;
        *library=cpu*) fail "$item" 'it found no GPU when it started, and computes on the CPU' 'vgpu-guest check names the causes; then: systemctl restart ollama' ;;
        *) skip "$item" 'its server has written nothing about it that can be found' 'start it (systemctl start ollama), run this as root, or give --ollama-log FILE' ;;
    esac
}

# ---- both -----------------------------------------------------------------------------------------------------------

# "VM CALLS" for each VM: all calls replayed for it by sessions that live or ended lately.
calls_by_vm() {
    admin list-sessions --all | awk '
        /^    "info": \{/ {vm = ""}
        /^      "vm": "/ && vm == "" {vm = $0; sub(/^ *"vm": "/, "", vm); sub(/",?$/, "", vm)}
        /^      "records": [0-9]+,?$/ {gsub(/[^0-9]/, ""); calls[vm] += $0}
        END {for (vm in calls) print vm, calls[vm]}'
}

# The VMs whose calls have risen from $1 to $2, one a line: VM and by how much.
risen() {
    {
        printf '%s\n' "$1" | sed 's/^/before /'
        printf '%s\n' "$2" | sed 's/^/after /'
    } | awk 'NF == 3 && $1 == "before" {before[$2] = $3} NF == 3 && $1 == "after" && $3 > before[$2] {print $2, $3 - before[$2]}'
}

# Runs a workload; its answer's first line into SAID.
run_work() { # name command file
    sh -c "$2" >"$3" 2>"$3.err" </dev/null
    status=$?
    SAID=$(first_line <"$3")
    [ $status = 0 ] && [ -n "$SAID" ]
}

report_work() { # item name file
    if [ "$status" = 0 ]; then
        why='it said nothing'
    else
        why="status $status: $(sed -n '/./h;${g;p;}' "$3.err" | first_line)"
    fi
    fail "$1" "$2: $why" "vgpu-guest check in that VM; try there: ollama run $MODEL \"$PROMPT\""
}

check_in_guest() {
    item="ollama run $MODEL \"$PROMPT\" answers"
    if ! have ollama; then
        skip "$item" 'there is no Ollama here, and no VM was named' 'on the host: --ssh USER@VM for one or two VMs; in the VM: vgpu-guest install --with-ollama'
    elif run_work here "ollama run $(quoted "$MODEL") $(quoted "$PROMPT")" "$WORK/1"; then
        pass "$item" "$SAID"
    else
        report_work "$item" 'here' "$WORK/1"
    fi
    for item in 'the mediator replays its calls' 'a second VM computes at the same time' "vgpu-admin shows both VMs' activity"; do
        skip "$item" 'that is seen on the host' 'there: --e2e --ssh USER@VM1 --ssh USER@VM2'
    done
}

check_e2e() {
    WORK=$(mktemp -d) || exit 1
    trap 'rm -rf "$WORK"' EXIT
    if [ "$COUNT" = 0 ]; then
        check_in_guest
        return
    fi
    item="a program in the VM answers"
    case $WORK_1 in ssh\ *) item="ollama run $MODEL \"$PROMPT\" answers" ;; esac
    can_ask=no before=
    if find_admin && before=$(admin show-health >/dev/null && calls_by_vm); then
        can_ask=yes
    fi
    if run_work "$NAME_1" "$WORK_1" "$WORK/1"; then
        pass "$item" "$NAME_1: $SAID"
    else
        report_work "$item" "$NAME_1" "$WORK/1"
    fi
    check_dispatched
    check_second
}

check_dispatched() {
    item='the mediator replays its calls'
    if [ $can_ask = no ]; then
        skip "$item" 'no mediator to ask' "$start_mediator; if its sockets are elsewhere: --run-dir DIR"
        return
    fi
    grown=$(risen "$before" "$(calls_by_vm)")
    if [ -n "$grown" ]; then
        pass "$item" "$(printf '%s\n' "$grown" | awk '{printf "%s%s: %d calls", sep, $1, $2; sep = ", "}')"
    else
        fail "$item" 'no call of any VM came while it ran' 'the program computed on its CPU: vgpu-guest check in the VM'
    fi
}

check_second() {
    item='a second VM computes at the same time'
    shown="vgpu-admin shows both VMs' activity"
    if [ "$COUNT" -lt 2 ]; then
        skip "$item" 'only one VM was named' 'name two: --ssh USER@VM1 --ssh USER@VM2'
        skip "$shown" 'only one VM was named' 'name two: --ssh USER@VM1 --ssh USER@VM2'
        return
    fi
    [ $can_ask = no ] || before=$(calls_by_vm)
    (
        run_work "$NAME_1" "$WORK_1" "$WORK/1"
        echo "$status" >"$WORK/status"
    ) &
    other=$!
    run_work "$NAME_2" "$WORK_2" "$WORK/2"
    second=$?
    wait "$other"
    first=$(cat "$WORK/status")
    if [ "$second" != 0 ]; then
        report_work "$item" "$NAME_2" "$WORK/2"
    elif [ "$first" != 0 ]; then
        status=$first
        report_work "$item" "$NAME_1, beside $NAME_2" "$WORK/1"
    else
        pass "$item" "$NAME_2: $SAID"
    fi
    if [ $can_ask = no ]; then
        skip "$shown" 'no mediator to ask' "$start_mediator; if its sockets are elsewhere: --run-dir DIR"
        return
    fi
    grown=$(risen "$before" "$(calls_by_vm)")
    number=$(printf '%s\n' "$grown" | grep -c .)
    text=$(printf '%s\n' "$grown" | awk 'NF == 2 {printf "%s%s: %d calls", sep, $1, $2; sep = ", "}')
    if [ "$number" -ge 2 ]; then
        pass "$shown" "$text"
    else
        fail "$shown" "calls came from ${text:-nobody}" 'vgpu-guest check in the other VM; vgpu-admin list-vms shows which have a device'
    fi
}

# ---------------------------------------------------------------------------------------------------------------------

case $MODE in
    host)
        check_mediator
        check_nvidia_smi
        check_socket
        check_qemu
        check_devices
        ;;
    guest)
        check_pci
        check_node
        check_library libcuda.so.1
        check_library libnvidia-ml.so.1
        check_ctypes
        check_guest_smi
        check_ollama_start
        ;;
    e2e) check_e2e ;;
esac
exit $FAILED
