# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh disable=SC2034,SC2154 # variables of install.sh and its other parts
#
# ollama.sh - steps 7 and 8 of the installation: Ollama, and its service's permission to use the GPU.
#
# Ollama's release archive is unpacked to where its own installer puts it. That installer itself is not run: where it finds an
# NVIDIA card and no nvidia-smi it fetches NVIDIA's driver, which a VM of ours must not have.
#
# The drop-in sets no LD_LIBRARY_PATH: Ollama starts its engine with one of its own making, and what it does not find there
# comes from the loader's cache, where our libraries are.

OLLAMA_URL=${VGPU_OLLAMA_URL:-https://ollama.com/download}

has_ollama() {
    for place in /usr/local/bin/ollama /usr/bin/ollama /opt/ollama/bin/ollama; do
        [ ! -x "$PREFIX$place" ] || return 0
    done
    [ "$LIVE" = yes ] && command -v ollama >/dev/null 2>&1
}

ollama_unit() { # UNIT: the file, or empty
    UNIT=
    for place in /etc/systemd/system /usr/local/lib/systemd/system /usr/lib/systemd/system /lib/systemd/system; do
        if [ -e "$PREFIX$place/ollama.service" ]; then
            UNIT=$place/ollama.service
            return 0
        fi
    done
    return 1
}

fetch() { # url file
    if command -v curl >/dev/null 2>&1; then
        curl --fail --silent --show-error --location --output "$2" "$1"
    elif command -v wget >/dev/null 2>&1; then
        wget -q -O "$2" "$1"
    else
        say "  neither curl nor wget is here"
        return 1
    fi
}

no_ollama() {
    die "$1
Ollama was not installed; everything else was. Without a network in the VM: fetch $OLLAMA_URL/ollama-linux-amd64.tar.zst (older
releases: .tgz) elsewhere, copy it here, and run: $SELF install --with-ollama --ollama-archive FILE"
}

unpack() { # archive folder
    case $1 in
        *.zst)
            command -v zstd >/dev/null 2>&1 || no_ollama "the archive is compressed with zstd, which is not installed (package zstd)"
            zstd -dcq -- "$1" | tar -xf - -C "$2"
            ;;
        *) tar -xzf "$1" -C "$2" ;;
    esac
}

get_ollama() {
    archive=$OLLAMA_ARCHIVE
    if [ -n "$archive" ]; then
        [ -r "$archive" ] || no_ollama "cannot read $archive"
    else
        command -v zstd >/dev/null 2>&1 && archive=$STATE/ollama-linux-amd64.tar.zst || archive=$STATE/ollama-linux-amd64.tgz
        would "download $OLLAMA_URL/${archive##*/}" && return
        say "  downloading $OLLAMA_URL/${archive##*/} (some gigabytes)"
        fetch "$OLLAMA_URL/${archive##*/}" "$archive" || {
            rm -f -- "$archive"
            no_ollama "the download failed: is there a network, and does a proxy have to be set (https_proxy)?"
        }
    fi
    would "unpack $archive into /usr/local" && return
    # Beside its place, so that what is moved there is whole.
    fresh=/usr/local/.vgpu-ollama
    make_folders /usr/local
    rm -rf -- "$PREFIX$fresh"
    claim tree $fresh || :
    mkdir -- "$PREFIX$fresh" || die "cannot write to $PREFIX/usr/local"
    unpack "$archive" "$PREFIX$fresh" || no_ollama "cannot unpack $archive"
    [ -n "$OLLAMA_ARCHIVE" ] || rm -f -- "$archive"
    [ -x "$PREFIX$fresh/bin/ollama" ] || no_ollama "$archive holds no bin/ollama: it is not Ollama's release archive"
    for part in lib/ollama bin/ollama; do
        [ -e "$PREFIX$fresh/$part" ] || continue
        claim tree "/usr/local/$part" || die "/usr/local/$part is in the way and was not installed by this program"
        rm -rf -- "${PREFIX:?}/usr/local/$part"
        mv -- "$PREFIX$fresh/$part" "$PREFIX/usr/local/$part" || die "cannot write to $PREFIX/usr/local"
    done
    rm -rf -- "$PREFIX$fresh"
}

make_ollama_user() {
    if [ "$LIVE" != yes ]; then
        say "  in the image, make Ollama's user: useradd --system --shell /bin/false --create-home --home-dir /usr/share/ollama --user-group ollama"
        return
    fi
    id ollama >/dev/null 2>&1 && return
    would "make the user ollama" && return
    useradd -r -s /bin/false -U -m -d /usr/share/ollama ollama || die "cannot make the user ollama"
}

install_ollama() {
    lookup /usr/local/bin/ollama || :
    if [ "$E_KIND" = tree ] && [ -x "$PREFIX/usr/local/bin/ollama" ] && [ -z "$OLLAMA_ARCHIVE" ]; then
        say "  Ollama is there from an earlier install"
        for part in /usr/local/bin/ollama /usr/local/lib/ollama; do touched $part; done
        keep_folder /usr/local/bin
        keep_folder /usr/local/lib
    elif [ "$E_KIND" != tree ] && has_ollama; then
        say "  Ollama is there already and stays as it is"
    else
        get_ollama
    fi
    lookup /etc/systemd/system/ollama.service || :
    if [ "$E_KIND" = file ] || ! ollama_unit; then
        make_ollama_user
        put_text /etc/systemd/system/ollama.service 644 <<'END'
[Unit]
Description=Ollama Service
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/usr/local/bin/ollama serve
User=ollama
Group=ollama
Restart=always
RestartSec=3
Environment="PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

[Install]
WantedBy=multi-user.target
END
        put_link /etc/systemd/system/multi-user.target.wants/ollama.service /etc/systemd/system/ollama.service
    fi
}

configure_ollama() {
    {
        printf '%s\n' '# Written by vgpu-guest: lets the service use the virtual GPU.' \
            '# No LD_LIBRARY_PATH here, on purpose: Ollama makes its own, and the libraries are found through the loader'\''s cache.' \
            '[Unit]' 'Wants=vgpu-guest.service' 'After=vgpu-guest.service' '' '[Service]'
        [ -z "$GROUP" ] || printf '%s\n' "SupplementaryGroups=$GROUP"
        printf '%s\n' '# The GPU'\''s memory is mapped through sysfs; some distributions'\'' units make that read-only.' 'ProtectKernelTunables=no'
    } >"$WORK/drop-in"
    put_file /etc/systemd/system/ollama.service.d/vgpu.conf 644 "$WORK/drop-in"
}
