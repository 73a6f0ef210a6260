# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh disable=SC2034,SC2154 # variables of install.sh and its other parts
#
# check.sh - what works and what does not: a line per item, with the remedy behind what is broken. Changes nothing.
#
#   OK    item: what was found
#   WARN  item: what was found; remedy: what to do
#   FAIL  item: what is wrong; remedy: what to do
#   SKIP  item: why it was not looked at
#
# With --json the same as a list of objects: name, state (ok, warning, failed, skipped), text, remedy ("" where there is none).
#
# The remedies for the host are the host's commands. docs/vm/guest.md, "Troubleshooting", goes by complaint instead.

FAILED=0

ok() { tell 'OK  ' ok "$1" "$2" ''; }
skip() { tell SKIP skipped "$1" "$2" ''; }
doubt() { tell WARN warning "$1" "$2" "$3"; }
fail() {
    tell FAIL failed "$1" "$2" "$3"
    FAILED=$((FAILED + 1))
}

SEPARATOR=
tell() { # word state item text remedy
    if [ "$JSON" = no ]; then
        say "$1  $3: $4${5:+; remedy: $5}"
        return
    fi
    object=
    for pair in "name=$3" "state=$2" "text=$4" "remedy=$5"; do
        escape "${pair#*=}"
        object="$object${object:+, }\"${pair%%=*}\": \"$ESCAPED\""
    done
    printf '%s{%s}' "$SEPARATOR" "$object"
    SEPARATOR=',
 '
}

# As it stands in a string of JSON, into ESCAPED. What is not ASCII (a name out of somebody's environment) may be no UTF-8 either.
escape() {
    rest=$(printf '%s' "$1" | tr '\n\t' '  ' | tr -c '\040-\176' '?')
    ESCAPED=
    while :; do
        case $rest in
            *[\"\\]*)
                plain=${rest%%[\"\\]*}
                rest=${rest#"$plain"}
                ESCAPED=$ESCAPED$plain\\${rest%"${rest#?}"}
                rest=${rest#?}
                ;;
            *) break ;;
        esac
    done
    ESCAPED=$ESCAPED$rest
}

# A value out of what the probe printed (OUT), into FIELD; the first of that name.
field() {
    FIELD=
    while IFS= read -r line; do
        case $line in "$1="*)
            FIELD=${line#*=}
            return 0
            ;;
        esac
    done <<END
$OUT
END
    return 1
}

REINSTALL="install it again: $SELF install"

# ---- the machine ----

check_system() {
    if is_unsuitable; then
        fail system "$PROBLEM" "see the message"
        return
    fi
    if [ -n "$PREFIX" ]; then
        ok system "Linux on x86-64"
        return
    fi
    glibc_version
    needed=
    for place in "$here/../GLIBC" "$here/prebuilt/GLIBC" "$here/../../prebuilt/GLIBC"; do
        [ -n "$needed" ] || { [ -r "$place" ] && read -r needed <"$place"; }
    done
    if [ -n "$GLIBC" ] && [ -n "$needed" ] && ! at_least "$GLIBC" "$needed"; then
        fail system "glibc $GLIBC, and the installed libraries need $needed" "build them here: $SELF install --build"
    else
        ok system "Linux on x86-64, glibc ${GLIBC:-unknown}"
    fi
}

check_driver_conflict() {
    if has_real_driver; then
        doubt driver "there is a real NVIDIA driver too ($REASON)" "remove its packages, unless you want both"
    fi
}

# ---- the device ----

check_device() {
    find_gpus
    if [ -z "$OURS" ]; then
        if [ -n "$REAL" ]; then
            fail device "no virtual GPU; $(basename -- "${REAL%%
*}") is a real NVIDIA card" "attach a virtual GPU to this VM (on the host: vgpu-admin show-vm --vm-name=NAME prints the option)"
        else
            fail device "no GPU in this VM: no PCI device 10de:2331 of ours" "on the host: vgpu-admin register-vm --vm-name=NAME, give the option that it prints to QEMU or libvirt, and start the VM again"
        fi
        return
    fi
    printf '%s' "$OURS" >"$WORK/devices"
    while IFS= read -r folder; do
        ok device "$(basename -- "$folder") (10de:2331, subsystem 10de:16c1)"
        check_one_device "$folder" "$(basename -- "$folder")"
    done <"$WORK/devices"
}

check_one_device() { # folder address
    lockdown=
    attribute "$PREFIX/sys/kernel/security/lockdown" && lockdown=$VALUE
    case $lockdown in *'[integrity]'* | *'[confidentiality]'*)
        fail lockdown "the kernel is locked down ($lockdown) and lets nobody map a PCI device" "switch Secure Boot off in the VM's firmware (on the host: a firmware without it), or boot with lockdown=none"
        ;;
    esac
    driver_of "$1"
    if [ -n "$DRIVER" ]; then
        fail driver "the kernel driver $DRIVER holds $2, so programs cannot map it" "echo $2 > /sys/bus/pci/drivers/$DRIVER/unbind; then $REINSTALL (its udev rule keeps the driver away)"
    fi
    if attribute "$1/enable" && [ "$VALUE" != 0 ]; then
        ok enabled "$2 is switched on"
    else
        fail enabled "$2 is switched off (enable is ${VALUE:-missing})" "systemctl restart vgpu-guest, or as root: echo 1 > /sys/bus/pci/devices/$2/enable"
    fi
    check_permission "$1" "$2"
    check_inside "$1" "$2"
}

# Root may always; the question is whether others may who shall.
check_permission() {
    owner=$(stat -c '%G %g %a' "$1/resource1" 2>/dev/null) || owner=
    gid=${owner#* } gid=${gid%% *} mode=${owner##* }
    owner=${owner%% *}
    if [ ! -r "$1/resource0" ] || [ ! -w "$1/resource0" ] || [ ! -r "$1/resource1" ] || [ ! -w "$1/resource1" ]; then
        if [ "$gid" = 0 ] || [ "$mode" = 600 ]; then
            fail permission "only root may use $2" "$REINSTALL; or as root, once a boot: systemctl restart vgpu-guest"
        else
            fail permission "you ($(id -un 2>/dev/null || id -u)) may not use $2: it belongs to the group $owner" "as root: usermod -aG $owner $(id -un 2>/dev/null || echo NAME); then log in again"
        fi
    elif [ "$gid" = 0 ] && [ "$MODE" = system ]; then
        doubt permission "$2 belongs to root alone" "$REINSTALL (with --group NAME, if this system has neither a group render nor video)"
    else
        ok permission "$2 is open to ${owner:+the group $owner}"
    fi
}

PROBE=
find_probe() {
    for place in "$PREFIX$LIBDIR" "$here/.." "$here/prebuilt" "$here/../../prebuilt" "$here/../lib" "$here/../../build/native"; do
        if [ -x "$place/vgpu-guest-probe" ]; then
            PROBE=$place/vgpu-guest-probe
            return 0
        fi
    done
    return 1
}

# What the device itself says. Nobody claims anything for that, so it works also while the host is away.
check_inside() {
    if [ -z "$PROBE" ]; then
        skip host "there is no vgpu-guest-probe to ask the device with"
        return
    fi
    OUT=$("$PROBE" --timeout 10 device "$1" 2>/dev/null)
    field result
    case $FIELD in
        ok | impaired) ;;
        forbidden)
            skip host "not permitted to ask the device"
            return
            ;;
        readonly)
            fail host "sysfs is read-only here, so $2 cannot be mapped" "in a container: mount the device's folder writable (docs/vm/guest.md, \"Containers\"); in a service: ProtectKernelTunables=no"
            return
            ;;
        lockdown)
            fail host "the kernel refuses to map $2" "switch Secure Boot off in the VM's firmware, or boot with lockdown=none"
            return
            ;;
        off | unplugged)
            fail host "$2 does not answer" "systemctl restart vgpu-guest; if that does not help, the device's process on the host has gone: plug the device again (device_del, device_add) or start the VM again"
            return
            ;;
        foreign)
            fail host "$2 has our ids but not our memory" "update the host or the guest; they are of very different versions"
            return
            ;;
        *)
            field detail
            fail host "$2 cannot be read (${FIELD:-no answer})" "run $PROBE device $1"
            return
            ;;
    esac
    field device_process
    if [ "$FIELD" = still ]; then
        fail host "the device's process on the host has stopped; calls will time out" "on the host: vgpu-admin doctor; then plug the device again or start the VM again"
    fi
    stopped=$FIELD
    field host
    if [ "$stopped" = still ]; then
        : # whatever it said last about its mediator is old
    elif [ "$FIELD" = absent ]; then
        fail host "no mediator on the host: calls wait, and new programs wait to start" "on the host: start run-mediator (it takes up running sessions by itself), and read its log if it does not stay"
    else
        ok host "the mediator is there"
    fi
    field quarantined
    quarantined=$FIELD
    field page_quarantined
    if [ "$quarantined" = yes ] || [ "$FIELD" = yes ]; then
        fail quarantine "this VM is quarantined after repeated faults; no new program gets the GPU" "on the host: vgpu-admin show-faults, then vgpu-admin clear-quarantine --vm-name=NAME"
    fi
    field layout
    layout=$FIELD
    field own_layout
    own=$FIELD
    field calls
    same=$FIELD
    field version_refusals
    if [ "$layout" != "$own" ] || [ "$same" != same ] || [ "${FIELD:-0}" != 0 ]; then
        fail version "host and guest are of different versions" "install the bundle that belongs to the host's version (on the host: vgpu-guest bundle)"
    fi
    field slots
    slots=$FIELD
    field slots_used
    if [ -n "$slots" ] && [ "$slots" -gt 0 ] && [ "$FIELD" -ge "$slots" ]; then
        doubt slots "all $slots slots are taken; the next program has to wait" "end programs that use the GPU, or give the VM a larger BAR1 on the host"
    else
        ok slots "$FIELD of $slots in use"
    fi
    field rate_limited
    if [ "$FIELD" = yes ]; then
        doubt rate "calls of this VM are being held back: it is above its rate limit" "normal under load, and nothing is lost: the library waits and goes on. To allow more, on the host: vgpu-admin set-rate-limit --vm-name=NAME --rate=N --queue-depth=N"
    fi
    if field throttle_reasons; then
        # The bits that mean heat or power: software and hardware slow-down, thermal slow-down, power brake.
        [ $((FIELD & 0xe8)) = 0 ] || doubt throttle "the card slows itself down ($FIELD)" "on the host: look at its cooling and power (nvidia-smi -q -d PERFORMANCE)"
    fi
    if field telemetry_age_seconds && { [ "$FIELD" -gt 30 ] || [ "$FIELD" -lt -30 ]; }; then
        doubt telemetry "the card's figures are $FIELD seconds old" "on the host: read run-mediator's log; or set this VM's clock (timedatectl)"
    fi
    field agent
    case $FIELD in
        running) ok agent "vgpu-guest-agent looks after $2" ;;
        absent) [ "$MODE" = user ] || doubt agent "vgpu-guest-agent is not running: slots of programs that were killed stay taken for a while" "systemctl enable --now vgpu-guest (without systemd: $LIBDIR/guest/install.sh boot &)" ;;
    esac
}

# ---- what is installed ----

check_files() {
    if [ ! -f "$MANIFEST" ]; then
        fail files "nothing is installed here" "$SELF install"
        return
    fi
    is_complete || doubt files "an install or uninstall was interrupted" "run it again: $SELF install, or $SELF uninstall"
    broken=
    while IFS='|' read -r kind path _ _; do
        case $kind in file | link) ;; *) continue ;; esac
        lookup "$path" && [ "$E_KIND" = "$kind" ] || continue
        if [ "$kind" = file ]; then
            [ -f "$PREFIX$path" ] && [ "$(sum_of "$PREFIX$path")" = "$E_VALUE" ] || broken="$broken $path"
        else
            [ "$(readlink -- "$PREFIX$path")" = "$E_VALUE" ] || broken="$broken $path"
        fi
    done <"$MANIFEST"
    if [ -n "$broken" ]; then
        doubt files "changed or missing since they were installed:$broken" "if you did not mean to: $REINSTALL"
    else
        ok files "all as installed in $LIBDIR"
    fi
}

check_loader() {
    if [ -z "$LDCONFIG" ]; then
        fail loader "there is no ldconfig" "install libc-bin (Debian, Ubuntu) or glibc"
        return
    fi
    for library in $LIBRARIES; do
        first=$(cached "$library" | head -n 1)
        if [ "$first" = "$LIBDIR/$library" ]; then
            ok loader "$library is ours ($first)"
        elif [ -z "$first" ]; then
            fail loader "the loader does not know $library" "run ldconfig; if that does not help: $REINSTALL"
        else
            fail loader "the loader finds another $library first: $first" "remove the package it belongs to, or the line before ours in /etc/ld.so.conf; then run ldconfig"
        fi
    done
}

check_environment() {
    hidden=no
    rest=${LD_LIBRARY_PATH:-}
    [ -z "$rest" ] || rest=$rest:
    while [ -n "$rest" ]; do
        folder=${rest%%:*}
        rest=${rest#*:}
        [ "$folder" != "$LIBDIR" ] || break
        for library in $LIBRARIES; do
            if [ -n "$folder" ] && [ -e "$folder/$library" ]; then
                fail environment "LD_LIBRARY_PATH leads to $folder/$library before ours" "take $folder out of LD_LIBRARY_PATH, or: . /etc/profile.d/vgpu.sh"
                hidden=yes
            fi
        done
    done
    case ${CUDA_VISIBLE_DEVICES-unset} in
        unset | 0*) ;;
        '' | -1 | none | NoDevFiles) doubt environment "CUDA_VISIBLE_DEVICES is \"$CUDA_VISIBLE_DEVICES\", which hides every GPU" "unset CUDA_VISIBLE_DEVICES" ;;
    esac
    if [ "$MODE" = user ]; then
        case :${LD_LIBRARY_PATH:-}: in
            *:"$LIBDIR":*) ;;
            *) doubt environment "this shell does not have $LIBDIR in its LD_LIBRARY_PATH" ". $LIBDIR/environment.sh, or run programs with $BINDIR/vgpu-env" ;;
        esac
    elif [ "$hidden" = no ]; then
        ok environment "LD_LIBRARY_PATH hides nothing"
    fi
}

check_nodes() {
    for pair in $NODES; do
        if [ ! -c "$PREFIX/dev/${pair%%:*}" ]; then
            doubt nodes "/dev/${pair%%:*} is missing; some software looks for it" "systemctl restart vgpu-guest, or: $LIBDIR/guest/install.sh nodes"
            return
        fi
    done
    ok nodes "/dev/nvidia0 and its kin are there"
}

# ---- libraries at work ----

# cuda or nvml, as a program of the caller's would meet them.
ask_library() { # cuda|nvml words
    if [ "$MODE" = user ]; then
        OUT=$(LD_LIBRARY_PATH=$LIBDIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$PROBE" --timeout 20 "$1" 2>/dev/null)
    else
        OUT=$("$PROBE" --timeout 20 "$1" 2>/dev/null)
    fi
    field library
    library=$FIELD
    case $library in
        '' | "$(readlink -f -- "$LIBDIR")"/*) ;;
        *)
            fail "$2" "a program gets $library, which is not ours" "see the lines about the loader and the environment"
            return 1
            ;;
    esac
    field result
    case $FIELD in
        ok) return 0 ;;
        timeout)
            field asking
            fail "$2" "${FIELD:-the call} did not come back within 20 seconds" "the host does not answer: see the line about the host; on the host: vgpu-admin show-health, and run-mediator's log"
            ;;
        not-loaded)
            field detail
            fail "$2" "${FIELD:-it cannot be loaded}" "$REINSTALL"
            ;;
        no-function)
            field detail
            fail "$2" "the library has no ${FIELD:-such function}" "$REINSTALL"
            ;;
        no-device) fail "$2" "it says that there is no GPU" "see the lines about the device; and unset CUDA_VISIBLE_DEVICES" ;;
        error) explain_code "$2" ;;
        *) fail "$2" "the probe ended without an answer" "run $PROBE $1" ;;
    esac
    return 1
}

explain_code() { # words
    field call
    call=$FIELD
    field error
    text=$FIELD
    field code
    case $1:$FIELD in
        CUDA:100) remedy="the library found no device that it may use: see the lines about device, enabled and permission" ;;
        CUDA:46 | CUDA:2) remedy="every slot or all memory is taken, or the host refused: see the lines about slots and quarantine; on the host: vgpu-admin show-vm --vm-name=NAME" ;;
        CUDA:803 | CUDA:35) remedy="host and guest are of different versions: install the bundle of the host's version" ;;
        CUDA:801) remedy="the host refused: see the line about quarantine" ;;
        NVML:9 | NVML:6) remedy="the library found no device that it may use: see the lines about device, enabled and permission" ;;
        *) remedy="set VGPU_LOG=1 and run $PROBE again to see why; on the host: run-mediator's log" ;;
    esac
    fail "$1" "$call says $FIELD ($text)" "$remedy"
}

check_libraries() {
    if [ -z "$PROBE" ]; then
        skip CUDA "there is no vgpu-guest-probe"
        return
    fi
    if ask_library cuda CUDA; then
        field name
        card=$FIELD
        field memory_mib
        memory=$FIELD
        field cuda_version
        ok CUDA "$card, $memory MiB, CUDA $((FIELD / 1000)).$((FIELD % 1000 / 10))"
    fi
    if ask_library nvml NVML; then
        field driver
        ok NVML "driver $FIELD"
    fi
    smi=$(command -v nvidia-smi) || smi=
    [ -n "$smi" ] || [ ! -x "$BINDIR/nvidia-smi" ] || smi=$BINDIR/nvidia-smi
    if [ -z "$smi" ]; then
        doubt nvidia-smi "there is no nvidia-smi" "$REINSTALL"
    elif (
        [ "$MODE" != user ] || export LD_LIBRARY_PATH="$LIBDIR"
        "$smi" -L
    ) >"$WORK/smi" 2>&1; then
        read -r line <"$WORK/smi"
        ok nvidia-smi "$line"
    else
        read -r line <"$WORK/smi"
        fail nvidia-smi "$smi says: $line" "see the lines about NVML and the device"
    fi
}

# ---- Ollama ----

service_property() { # unit property
    systemctl show "$1" -p "$2" --value 2>/dev/null
}

check_ollama() {
    if ! has_ollama; then
        skip Ollama "not installed"
        return
    fi
    backend=no stray=
    for place in /usr/local/lib/ollama /usr/lib/ollama /opt/ollama/lib/ollama; do
        for folder in "$PREFIX$place"/cuda_v*; do [ ! -e "$folder/libggml-cuda.so" ] || backend=yes; done
        for file in "$PREFIX$place"/libcuda.so* "$PREFIX$place"/cuda_v*/libcuda.so.1 "$PREFIX$place"/libnvidia-ml.so*; do
            [ ! -e "$file" ] || stray="$stray ${file#"$PREFIX"}"
        done
    done
    if [ "$backend" = yes ]; then
        ok Ollama "its CUDA engine is there"
    else
        fail Ollama "it falls back to the CPU: no cuda_v12 or cuda_v13 folder with libggml-cuda.so beside it" "install the full release (not a distribution's package without CUDA): $SELF install --with-ollama"
    fi
    [ -z "$stray" ] || fail Ollama "it falls back to the CPU or sees a wrong GPU: other driver libraries lie in its folder and are found first:$stray" "remove them"
    if ! ollama_unit; then
        skip Ollama "no service of that name; started by hand it uses the GPU if its user may"
        return
    fi
    check_ollama_unit
}

check_ollama_unit() {
    lines=
    for file in "$PREFIX$UNIT" "$PREFIX/etc/systemd/system/ollama.service.d"/*.conf "$PREFIX/usr/lib/systemd/system/ollama.service.d"/*.conf; do
        [ -r "$file" ] || continue
        while IFS= read -r line; do
            case $line in \#* | \;* | '') ;; *) lines="$lines
$line" ;; esac
        done <"$file"
    done
    troubled=no
    case $lines in *LD_PRELOAD*)
        doubt Ollama "its service sets LD_PRELOAD, which its engine does not need and may not survive" "take it out: systemctl edit ollama"
        troubled=yes
        ;;
    esac
    case $lines in *CUDA_VISIBLE_DEVICES=-1* | *'CUDA_VISIBLE_DEVICES="'* | *OLLAMA_LLM_LIBRARY=cpu*)
        fail Ollama "it falls back to the CPU: its service's environment hides the GPU (CUDA_VISIBLE_DEVICES or OLLAMA_LLM_LIBRARY)" "take that out (systemctl edit ollama), then: systemctl restart ollama"
        troubled=yes
        ;;
    esac
    case $lines in *ProtectKernelTunables=no*) ;; *ProtectKernelTunables=[yt1]*)
        fail Ollama "it falls back to the CPU: its service has ProtectKernelTunables, which makes the GPU's memory read-only" "$SELF install --with-ollama (writes a drop-in), then: systemctl restart ollama"
        troubled=yes
        ;;
    esac
    check_ollama_group
    [ "$troubled" = yes ] || ok Ollama "its service's environment is fine"
    [ "$LIVE" = yes ] && has_systemd && check_ollama_running
}

check_ollama_group() {
    user=root wanted=
    while IFS= read -r line; do
        case $line in
            User=*) user=${line#*=} ;;
            SupplementaryGroups=*) wanted="$wanted ${line#*=} " ;;
        esac
    done <<END
$lines
END
    [ "$user" != root ] || return 0
    gpu_group=$GROUP
    find_gpus
    [ -z "$OURS" ] || gpu_group=$(stat -c %G "${OURS%%
*}/resource1" 2>/dev/null)
    if [ -z "$gpu_group" ] || [ "$gpu_group" = root ]; then return 0; fi
    member=no
    case $wanted in *" $gpu_group "*) member=yes ;; esac
    while IFS=: read -r group _ _ members; do
        if [ "$group" = "$gpu_group" ]; then case ,$members, in *,"$user",*) member=yes ;; esac fi
    done 2>/dev/null <"$PREFIX/etc/group"
    if [ "$member" = yes ]; then
        ok Ollama "its user $user is in the group $gpu_group"
    else
        fail Ollama "it falls back to the CPU: its user $user is not in the group $gpu_group and may not open the GPU" "$SELF install --with-ollama (writes a drop-in), or: usermod -aG $gpu_group $user; then: systemctl restart ollama"
        troubled=yes
    fi
}

check_ollama_running() {
    if [ "$(service_property ollama ActiveState)" != active ]; then
        doubt Ollama "its service is not running" "systemctl start ollama; and: journalctl -u ollama"
        return
    fi
    command -v journalctl >/dev/null 2>&1 || return 0
    found=
    journalctl -u ollama -n 2000 -o cat --no-pager 2>/dev/null >"$WORK/journal"
    while IFS= read -r line; do
        case $line in *'inference compute'*) found=$line ;; esac
    done <"$WORK/journal"
    case $found in
        '') ;;
        *library=cpu*) fail Ollama "when it started it found no GPU and fell back to the CPU" "if everything above is OK: systemctl restart ollama. If that does not help: OLLAMA_DEBUG=2 in its environment makes it print its engine's own words" ;;
        *) ok Ollama "it found the GPU: ${found#*msg=}" ;;
    esac
}

# ---- all of it ----

check() {
    [ "$JSON" = no ] || printf '['
    find_ldconfig || :
    find_probe || :
    pick_group 2>/dev/null
    check_system
    check_driver_conflict
    check_device
    check_files
    if [ "$MODE" = system ]; then check_loader; fi
    check_environment
    if [ "$MODE" = system ]; then check_nodes; fi
    if [ -n "$PREFIX" ] && [ "$MODE" = system ]; then
        skip CUDA "this is an image, not the running system"
    else
        check_libraries
    fi
    if [ "$MODE" = system ]; then check_ollama; fi
    if [ "$JSON" = yes ]; then
        say ']'
        [ "$FAILED" = 0 ] || exit 1
        return 0
    fi
    if [ "$FAILED" -gt 0 ]; then
        say "$FAILED broken; docs/vm/guest.md has more on each"
        exit 1
    fi
    say "no item is broken"
}
