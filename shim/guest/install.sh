#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# install.sh - puts the virtual GPU's libraries into a VM, says what is wrong with them, and takes them out again.
#
# It needs sh, coreutils, and either gcc or libraries that were built elsewhere. `vgpu-guest` is the same program under
# another name. What it writes and why stands in docs/vm/guest.md; the parts are files.sh (changes that can be taken back),
# system.sh (what machine is this), check.sh and ollama.sh.
#
# It must never change a machine that has NVIDIA's own driver without being told to, never leave a file behind that uninstall
# does not know, and never ask a question: it runs in scripts.
set -u
LC_ALL=C
PATH=${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin
export LC_ALL PATH
umask 022

here=$(dirname -- "$(readlink -f -- "$0")")
SELF=${VGPU_GUEST_NAME:-$(basename -- "$0")}

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$SELF: warning: $*" >&2; }
die() {
    printf '%s\n' "$SELF: $*" >&2
    exit 1
}

usage() {
    cat <<END
usage: $SELF [install | check | uninstall] [options]

  install    put the virtual GPU's libraries, rules and service into this VM
  check      say what works and what does not, each with its remedy; status 1 if something is broken
  uninstall  take everything out again and put back what was there before

options:
  --with-ollama          install Ollama too, if it is not there, and let its service use the GPU
  --ollama-archive FILE  Ollama's release archive, for a VM without a network
  --group NAME           who may use the GPU besides root (else the group render, or video)
  --user, --no-root      install for this user alone, below ~/.local (see docs/vm/guest.md for its limits)
  --build                compile the libraries here, even if there are prebuilt ones
  --prefix FOLDER        work on the system whose root this folder is (an image), not on this one
  --dry-run              say what would be done, and do nothing
  --json                 what check finds as JSON, for programs
  --force                install beside a real NVIDIA driver, or without a virtual GPU
  --version, --help

examples:
  sudo ./$SELF install --with-ollama
  $SELF check
  sudo $SELF uninstall
END
}

# The version's one place is the package; a bundle has it in a file.
version() {
    VERSION=unknown
    if [ -r "$here/VERSION" ]; then
        read -r VERSION <"$here/VERSION"
    elif [ -r "$here/../../src/vgpu/__init__.py" ] || [ -r "$here/../../__init__.py" ]; then
        file=$here/../../src/vgpu/__init__.py
        [ -r "$file" ] || file=$here/../../__init__.py
        while IFS=' =' read -r key value; do
            [ "$key" != __version__ ] || VERSION=$(printf '%s' "$value" | tr -d \'\")
        done <"$file"
    fi
}

# ---- the command line ----

ACTION='' PREFIX='' MODE=system DRY=no JSON=no FORCE=no GROUP='' WITH_OLLAMA=no OLLAMA_ARCHIVE='' BUILD=no
set_action() {
    [ -z "$ACTION" ] || [ "$ACTION" = "$1" ] || wrong "$ACTION and $1 at once"
    ACTION=$1
}
wrong() {
    printf '%s\n' "$SELF: $1; see $SELF --help" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
        install | check | uninstall | nodes | boot) set_action "$1" ;;
        --check) set_action check ;;
        --uninstall) set_action uninstall ;;
        --with-ollama) WITH_OLLAMA=yes ;;
        --no-root | --user) MODE=user ;;
        --build) BUILD=yes ;;
        --dry-run) DRY=yes ;;
        --json) JSON=yes ;;
        --force) FORCE=yes ;;
        --prefix | --group | --ollama-archive)
            [ $# -gt 1 ] || wrong "$1 needs a value"
            case $1 in --prefix) PREFIX=$2 ;; --group) GROUP=$2 ;; *) OLLAMA_ARCHIVE=$2 ;; esac
            shift
            ;;
        --prefix=*) PREFIX=${1#*=} ;;
        --group=*) GROUP=${1#*=} ;;
        --ollama-archive=*) OLLAMA_ARCHIVE=${1#*=} ;;
        --version)
            version
            say "$SELF $VERSION"
            exit 0
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) wrong "unknown word $1" ;;
    esac
    shift
done
ACTION=${ACTION:-install}
[ "$JSON" = no ] || [ "$ACTION" = check ] || wrong "--json goes with check alone"
[ -z "$OLLAMA_ARCHIVE" ] || WITH_OLLAMA=yes
if [ -n "$PREFIX" ]; then
    [ -d "$PREFIX" ] || wrong "$PREFIX is no folder"
    PREFIX=$(readlink -f -- "$PREFIX")
    [ "$PREFIX" != / ] || PREFIX=
fi
case $PREFIX${HOME:-} in *'|'* | *'
'*) die "a path with | or a line's end in it will not do" ;; esac
version

# LIVE: this very system, with its devices and services, is meant.
LIVE=no
[ -n "$PREFIX" ] || [ "$MODE" = user ] || LIVE=yes
if [ "$MODE" = user ]; then
    [ -n "${HOME:-}" ] || die "HOME is not set"
    case $HOME in /*) ;; *) die "HOME is not an absolute path" ;; esac
    case $HOME in *[\ :\;]*) die "the loader cannot find libraries in a home folder with spaces or colons in its name" ;; esac
    LIBDIR=$HOME/.local/lib/vgpu BINDIR=$HOME/.local/bin STATE_FOLDER=$HOME/.local/share/vgpu-guest
else
    LIBDIR=/usr/lib/vgpu BINDIR=/usr/bin STATE_FOLDER=/var/lib/vgpu-guest
    # A system whose /usr is read-only (an image-based one) keeps /usr/local writable.
    if [ -e "$PREFIX/usr/local/lib/vgpu/guest/install.sh" ] || { [ "$LIVE" = yes ] && [ "$(id -u)" = 0 ] && [ ! -w /usr/lib ]; }; then
        LIBDIR=/usr/local/lib/vgpu BINDIR=/usr/local/bin
    fi
fi

# shellcheck source=files.sh
. "$here/files.sh"
# shellcheck source=system.sh
. "$here/system.sh"
# shellcheck source=check.sh
. "$here/check.sh"
# shellcheck source=ollama.sh
. "$here/ollama.sh"

clean_up() {
    rm -rf -- "$WORK"
    [ "$LOCKED" = no ] || rm -f -- "$STATE/pid"
}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/vgpu-guest.XXXXXX") || die "cannot make a temporary folder"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
open_manifest "$STATE_FOLDER"

# What is done to the running system rather than to its files: not to an image, and only said in a dry run.
act() { # words command...
    [ "$LIVE" = yes ] || return 0
    would "$1" && return
    shift
    "$@"
}

# ---- 2: the libraries ----

LIBRARIES='libcuda.so.1 libnvidia-ml.so.1'
PROGRAMS='vgpu-guest-agent vgpu-guest-probe'

has_parts() { # folder
    for part in $LIBRARIES libvgpu-exec.so $PROGRAMS; do
        [ -f "$1/$part" ] || return 1
    done
}

# PARTS: a folder with everything built. Prebuilt ones will do where the C library is not older than theirs.
get_parts() {
    PARTS=
    glibc_version
    if [ "$BUILD" = no ]; then
        for folder in "$here/prebuilt" "$here/../../prebuilt" "$here/.." "$here/../lib" "$here/../../build/native"; do
            has_parts "$folder" || continue
            if [ -r "$folder/GLIBC" ] && read -r needed <"$folder/GLIBC" && [ -n "$GLIBC" ] && [ -z "$PREFIX" ] && ! at_least "$GLIBC" "$needed"; then
                say "  the prebuilt libraries need glibc $needed and this system has $GLIBC: building them here"
                continue
            fi
            if [ -r "$folder/SHA256SUMS" ] && ! (cd -- "$folder" && sha256sum -c SHA256SUMS >/dev/null 2>&1); then
                die "the prebuilt libraries in $folder are damaged: their checksums differ. Copy the bundle again, or use --build"
            fi
            PARTS=$folder
            say "  prebuilt ones from $(readlink -f -- "$folder")"
            return
        done
    fi
    [ -r "$here/build.sh" ] && [ -d "$here/../libcuda" ] ||
        die "there are neither prebuilt libraries nor their sources beside $here; copy the whole bundle into the VM (vgpu-guest bundle makes it)"
    would "build the libraries with ${CC:-gcc}" && return
    say "  building them (a minute or so)"
    sh "$here/build.sh" -o "$WORK/parts" >"$WORK/build.log" 2>&1 || {
        cat "$WORK/build.log" >&2
        die "the libraries could not be built. Install a compiler (Debian, Ubuntu: apt install gcc libc6-dev; Fedora, RHEL: dnf install gcc glibc-devel; openSUSE: zypper install gcc glibc-devel; Arch: pacman -S gcc), or copy the prebuilt ones"
    }
    has_parts "$WORK/parts" || die "the build left something out: $(cat "$WORK/build.log")"
    PARTS=$WORK/parts
}

put_parts() {
    for part in $LIBRARIES libvgpu-exec.so; do put_file "$LIBDIR/$part" 755 "$PARTS/$part"; done
    for part in $LIBRARIES; do put_link "$LIBDIR/${part%.1}" "$part"; done
    for part in $PROGRAMS; do put_file "$LIBDIR/$part" 755 "$PARTS/$part"; done
    # This program itself, so that it can check and uninstall when the bundle has gone.
    for part in install.sh files.sh system.sh check.sh ollama.sh; do
        put_file "$LIBDIR/guest/$part" "$([ $part = install.sh ] && echo 755 || echo 644)" "$here/$part"
    done
    put_text "$LIBDIR/guest/VERSION" 644 <<END
$VERSION
END
    put_text "$LIBDIR/guest/GROUP" 644 <<END
$GROUP
END
    put_command vgpu-guest "$LIBDIR/guest/install.sh"
    if [ -n "$PARTS" ] && [ ! -f "$PARTS/nvidia-smi" ]; then
        warn "there is no nvidia-smi in $PARTS; left out"
    elif put_command nvidia-smi "$LIBDIR/nvidia-smi"; then
        put_file "$LIBDIR/nvidia-smi" 755 "$PARTS/nvidia-smi"
    fi
}

# A link in a folder of commands, unless somebody else's command of that name is there.
put_command() { # name target
    lookup "$BINDIR/$1" || :
    if [ "$E_KIND" != link ]; then
        if [ -e "$PREFIX$BINDIR/$1" ] || [ -L "$PREFIX$BINDIR/$1" ] || { [ "$LIVE" = yes ] && command -v "$1" >/dev/null 2>&1; }; then
            say "  there is a command $1 already; it stays"
            return 1
        fi
    fi
    put_link "$BINDIR/$1" "$2"
}

# ---- 3: the loader's cache ----

put_loader_configuration() {
    # 000: the first folder with a library of a name wins.
    put_text /etc/ld.so.conf.d/000-vgpu.conf 644 <<END
# The virtual GPU's libcuda.so.1 and libnvidia-ml.so.1; written by vgpu-guest.
$LIBDIR
END
    included=no
    if [ -r "$PREFIX/etc/ld.so.conf" ]; then
        while IFS= read -r line; do
            case $line in include*ld.so.conf.d/*) included=yes ;; esac
        done <"$PREFIX/etc/ld.so.conf"
    fi
    lookup /etc/ld.so.conf || :
    if [ "$included" = no ] || [ "$E_KIND" = file ]; then
        {
            printf 'include /etc/ld.so.conf.d/*.conf\n'
            if [ "$E_BACKUP" != - ]; then
                cat "$STATE/backup/$E_BACKUP"
            elif [ -z "$E_KIND" ] && [ -r "$PREFIX/etc/ld.so.conf" ]; then
                cat "$PREFIX/etc/ld.so.conf"
            fi
        } >"$WORK/ld.so.conf"
        put_file /etc/ld.so.conf 644 "$WORK/ld.so.conf"
    fi
}

refresh_loader_cache() {
    would "run ldconfig" && return
    for path in /var/cache/ldconfig /var/cache/ldconfig/aux-cache /etc/ld.so.cache; do claim generated $path || :; done
    [ -n "$LDCONFIG" ] || return 0
    # -X: the links are ours already.
    ldconfig_here -X || warn "ldconfig failed"
}

# ---- 4, 6: nodes, rule, service ----

# Software looks for these; what opens them gets ENXIO, as no driver has claimed NVIDIA's major number 195. The numbers of
# nvidia-uvm are handed out at run time where there is a driver; 252 and 253 of major 195 are used by nobody, with a driver
# or without, while a number out of the dynamic range could one day be another driver's device.
NODES='nvidia0:0 nvidiactl:255 nvidia-uvm:252 nvidia-uvm-tools:253'

make_nodes() { # recorded(yes|no)
    if [ -e "$PREFIX/sys/module/nvidia" ]; then
        say "  NVIDIA's driver is loaded and keeps its own nodes"
        return 0
    fi
    for pair in $NODES; do
        path=/dev/${pair%%:*}
        number=$(printf 'c3:%x' "${pair##*:}")
        if [ -e "$PREFIX$path" ]; then
            [ "$1" = no ] || ! lookup "$path" || touched "$path"
            continue
        fi
        would "make $path" && continue
        if [ "$1" = yes ]; then
            record node "$path" "$number" -
            touched "$path"
        fi
        { mknod "$PREFIX$path" c 195 "${pair##*:}" && chmod 666 "$PREFIX$path"; } || warn "cannot make $path; only software that looks for it will miss it"
    done
}

put_rule() {
    wanted=
    [ -z "$GROUP" ] || wanted="--group $GROUP "
    put_text /etc/udev/rules.d/71-vgpu.rules 644 <<END
# The virtual GPU: its memory belongs to the group that may use GPUs, and no display driver takes it for a card of its own.
# Written by vgpu-guest.
ACTION!="add|change", GOTO="vgpu_end"
SUBSYSTEM!="pci", GOTO="vgpu_end"
ATTR{vendor}!="$VENDOR", GOTO="vgpu_end"
ATTR{device}!="$DEVICE", GOTO="vgpu_end"
ATTR{subsystem_vendor}!="$VENDOR", GOTO="vgpu_end"
ATTR{subsystem_device}!="$SUBSYSTEM", GOTO="vgpu_end"
ACTION=="add", ATTR{driver_override}="vgpu-none"
RUN+="$LIBDIR/vgpu-guest-agent ${wanted}--permit \$sys\$devpath"
LABEL="vgpu_end"
END
}

put_service() {
    wanted=
    [ -z "$GROUP" ] || wanted=" --group $GROUP"
    put_text /etc/systemd/system/vgpu-guest.service 644 <<END
[Unit]
Description=Virtual GPU: device nodes, permissions, and slots of processes that died
After=local-fs.target systemd-udevd.service
Before=ollama.service
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStartPre=-$LIBDIR/guest/install.sh nodes
ExecStart=$LIBDIR/vgpu-guest-agent$wanted
# It ends when a device is unplugged, to start with a clean view.
Restart=always
RestartSec=1
NoNewPrivileges=yes
ProtectHome=yes
ProtectSystem=full
PrivateTmp=yes
RestrictAddressFamilies=AF_UNIX
MemoryDenyWriteExecute=yes
CapabilityBoundingSet=CAP_CHOWN CAP_FOWNER CAP_DAC_OVERRIDE CAP_MKNOD CAP_SYS_ADMIN

[Install]
WantedBy=multi-user.target
END
    put_link /etc/systemd/system/multi-user.target.wants/vgpu-guest.service /etc/systemd/system/vgpu-guest.service
}

# ---- 5: the environment ----

# Nothing has to be set where the loader's cache has our libraries. One thing is mended: a LD_LIBRARY_PATH that was set before
# and names another libcuda.so.1 (CUDA's compat folder, say) goes before the cache and hides ours. There is no environment.d
# file, since services have no such path unless their unit says so.
put_environment() {
    put_text /etc/profile.d/vgpu.sh 644 <<END
# Virtual GPU, written by vgpu-guest. Its libraries are in the loader's cache, so nothing has to be set - unless
# LD_LIBRARY_PATH leads to another libcuda.so.1, which would hide ours: then ours goes first.
if [ -n "\${LD_LIBRARY_PATH:-}" ]; then
    vgpu_rest=\$LD_LIBRARY_PATH:
    while [ -n "\$vgpu_rest" ]; do
        vgpu_folder=\${vgpu_rest%%:*}
        vgpu_rest=\${vgpu_rest#*:}
        if [ "\$vgpu_folder" = $LIBDIR ]; then
            break
        elif [ -n "\$vgpu_folder" ] && [ -e "\$vgpu_folder/libcuda.so.1" ]; then
            LD_LIBRARY_PATH=$LIBDIR:\$LD_LIBRARY_PATH
            export LD_LIBRARY_PATH
            break
        fi
    done
    unset vgpu_rest vgpu_folder
fi
END
}

put_user_environment() {
    put_text "$LIBDIR/environment.sh" 644 <<END
# Virtual GPU without root, written by vgpu-guest. Read it into a shell: . $LIBDIR/environment.sh
case :\${LD_LIBRARY_PATH:-}: in
    *:$LIBDIR:*) ;;
    *) LD_LIBRARY_PATH=$LIBDIR\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH} ;;
esac
# Carries both variables into children whose parents build a fresh environment for them.
case :\${LD_PRELOAD:-}: in
    *libvgpu-exec.so*) ;;
    *) LD_PRELOAD=$LIBDIR/libvgpu-exec.so\${LD_PRELOAD:+:\$LD_PRELOAD} ;;
esac
export LD_LIBRARY_PATH LD_PRELOAD
END
    put_text "$BINDIR/vgpu-env" 755 <<END
#!/bin/sh
# Runs a program with the virtual GPU: vgpu-env PROGRAM ARGUMENTS. Written by vgpu-guest.
. $LIBDIR/environment.sh
exec "\$@"
END
}

# ---- install ----

permit_now() {
    find_gpus
    printf '%s' "$OURS" | while IFS= read -r folder; do
        if [ -n "$GROUP" ]; then
            "$LIBDIR/vgpu-guest-agent" --group "$GROUP" --permit "$folder"
        else
            "$LIBDIR/vgpu-guest-agent" --permit "$folder"
        fi || warn "$folder could not be opened to group ${GROUP:-root}"
    done
}

reload_udev() { ! command -v udevadm >/dev/null 2>&1 || udevadm control --reload || :; }

start_service() { # unit
    { systemctl daemon-reload && systemctl restart "$1"; } || warn "$1 did not start; see: systemctl status $1"
}

label_files() { # SELinux's idea of what the files are
    ! command -v restorecon >/dev/null 2>&1 || restorecon -RF "$LIBDIR" /etc/ld.so.conf.d /etc/udev/rules.d /etc/systemd/system 2>/dev/null || :
}

refuse_unfit() {
    if is_unsuitable; then die "$PROBLEM"; fi
    find_ldconfig || [ "$MODE" = user ] || [ "$FORCE" = yes ] ||
        die "there is no ldconfig, which puts libraries where programs find them. Install it (Debian, Ubuntu: libc-bin; others: glibc), or use --user"
    if [ "$LIVE" = yes ] && [ "$DRY" = no ] && [ "$(id -u)" != 0 ]; then die "this needs root: run it with sudo, or with --user for an install into ~/.local"; fi
    if has_real_driver; then
        [ "$FORCE" = yes ] || die "this system has a real NVIDIA driver ($REASON); nothing was changed. The virtual GPU is for VMs without one: remove the driver, or, if you know that you want both, add --force"
        warn "this system has a real NVIDIA driver ($REASON); going on because of --force"
    fi
}

look_for_device() {
    find_gpus
    if [ -n "$OURS" ]; then
        printf '%s' "$OURS" | while IFS= read -r folder; do say "  $(basename -- "$folder") is a virtual GPU"; done
    elif [ -n "$PREFIX" ] || [ "$MODE" = user ]; then
        say "  none here; \`check\` will look again in the running VM"
    elif [ "$FORCE" = yes ]; then
        warn "there is no virtual GPU in this VM yet; going on because of --force"
    else
        [ -z "$REAL" ] || say "  (there is an NVIDIA card, but it is a real one: $(basename -- "${REAL%%
*}"))"
        die "there is no virtual GPU in this VM (PCI device 10de:2331, subsystem 10de:16c1). On the host: \`vgpu-admin register-vm --vm-name=NAME\` prints the option that QEMU or libvirt needs; then start the VM again. --force installs without one"
    fi
}

install_system() {
    refuse_unfit
    say "1/8 the virtual GPU"
    look_for_device
    pick_group
    say "2/8 the libraries"
    get_parts
    begin_changes
    say "3/8 into $LIBDIR and the loader's cache"
    put_parts
    put_loader_configuration
    refresh_loader_cache
    say "4/8 device nodes, and the rule that opens the GPU to the group ${GROUP:-root}"
    put_rule
    act "reload udev's rules" reload_udev
    act "open the device" permit_now
    [ "$LIVE" != yes ] || make_nodes yes
    say "5/8 the environment"
    put_environment
    say "6/8 the service that keeps nodes and slots"
    put_service
    [ "$LIVE" != yes ] || [ "$DRY" = yes ] || label_files
    if [ "$LIVE" = yes ] && ! has_systemd; then
        say "  this system is not run by systemd: have it run \`$LIBDIR/guest/install.sh boot &\` at every boot (as root)"
    else
        act "start vgpu-guest.service" start_service vgpu-guest.service
    fi
    # This much stands by itself: a download that fails must not take it along.
    keep_ollama
    complete_changes "$VERSION"
    if [ "$WITH_OLLAMA" = yes ]; then
        begin_changes
        say "7/8 Ollama"
        install_ollama
        say "8/8 Ollama's service"
        configure_ollama
        if has_systemd; then act "start ollama.service" start_service ollama.service; fi
        complete_changes "$VERSION"
    else
        say "7/8 Ollama: not asked for (--with-ollama)"
        say "8/8 Ollama's service: not asked for"
    fi
    [ "$DRY" = no ] || return 0
    say "installed."
    if [ "$LIVE" = yes ] && [ -n "$GROUP" ]; then
        say "Users who shall use the GPU have to be in the group $GROUP: usermod -aG $GROUP NAME, and a new login. What works: vgpu-guest check"
    fi
}

# An update without --with-ollama does not remove what an earlier install did with it.
keep_ollama() {
    for path in /usr/local/bin/ollama /usr/local/lib/ollama /etc/systemd/system/ollama.service \
        /etc/systemd/system/multi-user.target.wants/ollama.service /etc/systemd/system/ollama.service.d/vgpu.conf; do
        if lookup "$path"; then
            touched "$path"
            keep_folder "$(dirname -- "$path")"
        fi
    done
}

install_user() {
    [ "$WITH_OLLAMA" = no ] || die "--with-ollama needs the system-wide install: Ollama starts its engine by raw system calls, which libvgpu-exec.so cannot reach"
    refuse_unfit
    say "1/4 the virtual GPU"
    look_for_device
    say "2/4 the libraries"
    get_parts
    begin_changes
    say "3/4 into $LIBDIR"
    put_parts
    say "4/4 the environment"
    put_user_environment
    complete_changes "$VERSION"
    [ "$DRY" = no ] || return 0
    say "installed. Run programs with \`$BINDIR/vgpu-env PROGRAM\`, or read the environment into a shell: . $LIBDIR/environment.sh
The device itself has to be open to you, which only root can do (once, or at every boot): $SELF check says whether it is.
Programs written in Go (Ollama) need the system-wide install."
}

# ---- uninstall ----

# The kernel's own permissions again.
close_devices() {
    find_gpus
    printf '%s' "$OURS" | while IFS= read -r folder; do
        for file in "$folder/resource0" "$folder/resource1" "$folder/resource1_wc"; do
            [ ! -e "$file" ] || { chown 0:0 "$file" && chmod 600 "$file"; } || warn "cannot close $file"
        done
    done
}

uninstall() {
    if [ ! -f "$MANIFEST" ]; then
        say "nothing is installed${PREFIX:+ in $PREFIX}"
        return 0
    fi
    if [ "$LIVE" = yes ] && [ "$DRY" = no ] && [ "$(id -u)" != 0 ]; then die "this needs root: run it with sudo"; fi
    find_ldconfig || :
    begin_changes
    had_ollama=no
    if lookup /etc/systemd/system/ollama.service && [ "$E_KIND" = file ]; then had_ollama=yes; fi
    if lookup /etc/systemd/system/ollama.service.d/vgpu.conf && [ "$had_ollama" = no ]; then had_ollama=dropin; fi
    if has_systemd; then
        act "stop vgpu-guest.service" systemctl stop vgpu-guest.service
        [ "$had_ollama" != yes ] || act "stop ollama.service" systemctl stop ollama.service
    fi
    act "close the device" close_devices
    status=0
    take_all_back || status=1
    if [ "$MODE" = system ]; then
        # A cache that was not there before has just gone.
        [ -z "$LDCONFIG" ] || [ ! -e "$PREFIX/etc/ld.so.cache" ] || would "run ldconfig" || ldconfig_here -X || warn "ldconfig failed"
        act "reload udev's rules" reload_udev
        if has_systemd; then
            act "reload systemd" systemctl daemon-reload
            [ "$had_ollama" != dropin ] || act "restart ollama.service" systemctl try-restart ollama.service
        fi
    fi
    [ "$DRY" = no ] || return 0
    [ "$status" = 0 ] || die "something could not be restored; see above. $MANIFEST and the copies beside it are still there"
    say "uninstalled; every file is as it was before"
    [ "$had_ollama" != yes ] || say "The user ollama and its models are kept; to remove them: userdel -r ollama"
}

# ---- the rest ----

boot() {
    make_nodes no
    pick_group
    clean_up # what follows takes this process's place
    if [ -n "$GROUP" ]; then exec "$LIBDIR/vgpu-guest-agent" --stay --group "$GROUP"; fi
    exec "$LIBDIR/vgpu-guest-agent" --stay
}

case $ACTION in
    install) if [ "$MODE" = user ]; then install_user; else install_system; fi ;;
    check) check ;;
    uninstall) uninstall ;;
    nodes) make_nodes no ;;
    boot) boot ;;
esac
