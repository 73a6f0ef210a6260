# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh disable=SC2034,SC2154 # variables of install.sh and its other parts
#
# files.sh - changes to the file system that can be taken back, for install.sh.
#
# Every change is written down in the manifest before it is made, and what it replaces is copied away before that. So an
# install that was interrupted at any point can be finished by the next one, or undone. A line of the manifest is
#
#   kind|path|value|backup
#
#   file       value: SHA-256 of what we wrote; backup: name of the copy of what was there, or -
#   link       value: where it points
#   dir        made by us; removed when it is empty
#   tree       not there before; removed with all it holds
#   node       value: major:minor
#   generated  written by another program (the loader's cache), not there before
#   complete   the last line of an install that ran to its end; value: its version
#
# Later lines of one path replace earlier ones. Paths are those of the target system: PREFIX goes before them. A file that
# somebody changed after us is never thrown away: it is kept beside, as NAME.vgpu-saved.
#
# sh has no local variables: what a function of this file uses inside a loop of another one has a letter before its name.
# Needs PREFIX, DRY, WORK (a folder for temporary files) and the functions say, warn and die.

STATE='' MANIFEST='' TOUCHED='' LOCKED=no

# ---- reading ----

# The last entry of a path: E_KIND, E_VALUE, E_BACKUP. False if there is none.
lookup() {
    E_KIND='' E_VALUE='' E_BACKUP=-
    [ -f "$MANIFEST" ] || return 1
    while IFS='|' read -r l_kind l_path l_value l_backup; do
        [ "$l_path" != "$1" ] || { E_KIND=$l_kind E_VALUE=$l_value E_BACKUP=$l_backup; }
    done <"$MANIFEST"
    [ "$E_KIND" != gone ] || E_KIND='' E_VALUE='' E_BACKUP=-
    [ -n "$E_KIND" ]
}

# Whether we ever wrote this content to this path: an interrupted upgrade leaves the old one.
wrote() { # path sum
    while IFS='|' read -r w_kind w_path w_value _; do
        if [ "$w_kind" = file ] && [ "$w_path" = "$1" ] && [ "$w_value" = "$2" ]; then return 0; fi
    done <"$MANIFEST"
    return 1
}

is_complete() {
    last=
    [ -f "$MANIFEST" ] || return 1
    while IFS='|' read -r i_kind _; do last=$i_kind; done <"$MANIFEST"
    [ "$last" = complete ]
}

sum_of() {
    line=$(sha256sum <"$1") && printf '%s' "${line%% *}"
}

# ---- the journal ----

open_manifest() { # folder of the state, as a path of the target
    STATE=$PREFIX$1
    MANIFEST=$STATE/manifest
    TOUCHED=
}

# Before the first change. Two installers at once would write over each other's backups.
begin_changes() {
    [ "$DRY" = no ] || return 0
    made=
    parent=$STATE
    while [ ! -d "$parent" ]; do
        made="${parent#"$PREFIX"}
$made"
        parent=$(dirname -- "$parent")
    done
    mkdir -p "$STATE/backup" || die "cannot write to $STATE"
    if [ -f "$STATE/pid" ] && read -r other <"$STATE/pid" && [ "$other" != $$ ] && kill -0 "$other" 2>/dev/null; then
        die "process $other is installing or uninstalling right now"
    fi
    printf '%s\n' $$ >"$STATE/pid" || die "cannot write to $STATE"
    LOCKED=yes
    if [ -f "$MANIFEST" ] && ! is_complete; then say "an earlier install or uninstall was interrupted; going on from there"; fi
    record begin - - -
    while IFS= read -r path; do
        [ -z "$path" ] || record dir "$path" - -
    done <<END
$made
END
}

record() { printf '%s|%s|%s|%s\n' "$1" "$2" "$3" "$4" >>"$MANIFEST" || die "cannot write $MANIFEST"; }

touched() {
    TOUCHED="$TOUCHED
$1
"
}

was_touched() {
    case $TOUCHED in *"
$1
"*) return 0 ;; esac
    return 1
}

# ---- writing ----

would() {
    [ "$DRY" = yes ] || return 1
    say "  would $1"
}

make_folders() { # path
    [ ! -d "$PREFIX$1" ] || { keep_folder "$1"; return 0; }
    [ "$1" != / ] || return 0
    make_folders "$(dirname -- "$1")"
    would "make $1" && return
    record dir "$1" - -
    touched "$1"
    { mkdir -- "$PREFIX$1" && chmod 755 -- "$PREFIX$1"; } || die "cannot make $PREFIX$1"
}

# A folder of ours from an earlier install, and those above it.
keep_folder() {
    k_path=$1
    while [ "$k_path" != / ] && [ "$k_path" != . ]; do
        if lookup "$k_path" && [ "$E_KIND" = dir ]; then touched "$k_path"; fi
        k_path=$(dirname -- "$k_path")
    done
}

# What stands at a path that is not ours, into the backup; sets E_BACKUP.
set_aside() { # path
    E_BACKUP=-
    if [ ! -e "$PREFIX$1" ] && [ ! -L "$PREFIX$1" ]; then return 0; fi
    [ -L "$PREFIX$1" ] || [ -f "$PREFIX$1" ] || die "$PREFIX$1 is in the way and is no file"
    E_BACKUP=$(printf '%s' "$1" | tr / %)
    rm -f -- "$STATE/backup/$E_BACKUP"
    cp -pP -- "$PREFIX$1" "$STATE/backup/$E_BACKUP" || die "cannot copy $PREFIX$1 away"
}

save_edited() { # path
    cp -pP -- "$PREFIX$1" "$PREFIX$1.vgpu-saved" || die "cannot keep $PREFIX$1"
    warn "$1 was changed after it was installed; the changed one is now $1.vgpu-saved"
}

# A file of ours: path, mode, and the file it is copied from.
put_file() {
    would "write $1" && return
    sum=$(sum_of "$3") || die "cannot read $3"
    make_folders "$(dirname -- "$1")"
    touched "$1"
    if lookup "$1" && [ "$E_KIND" = file ]; then
        if [ -f "$PREFIX$1" ] && [ ! -L "$PREFIX$1" ]; then
            now=$(sum_of "$PREFIX$1")
            if [ "$now" = "$sum" ] && [ "$E_VALUE" = "$sum" ] && [ "$(stat -c %a "$PREFIX$1")" = "${2#0}" ]; then return 0; fi
            [ "$now" = "$sum" ] || wrote "$1" "$now" || same_as_backup "$now" || save_edited "$1"
        fi
    else
        set_aside "$1"
    fi
    record file "$1" "$sum" "$E_BACKUP"
    { cp -- "$3" "$PREFIX$1.vgpu-new" && chmod "$2" "$PREFIX$1.vgpu-new" && mv -f -- "$PREFIX$1.vgpu-new" "$PREFIX$1"; } ||
        die "cannot write $PREFIX$1"
}

same_as_backup() { # sum; E_BACKUP from lookup
    [ "$E_BACKUP" != - ] && [ -f "$STATE/backup/$E_BACKUP" ] && [ "$(sum_of "$STATE/backup/$E_BACKUP")" = "$1" ]
}

# The same with the content from standard input: a here-document, never a pipe, which would lose what `touched` notes.
put_text() { # path mode
    if [ "$DRY" = yes ]; then
        cat >/dev/null
        would "write $1"
        return
    fi
    cat >"$WORK/text" || die "cannot write to $WORK"
    put_file "$1" "$2" "$WORK/text"
}

put_link() { # path target
    would "link $1 to $2" && return
    make_folders "$(dirname -- "$1")"
    touched "$1"
    if lookup "$1" && [ "$E_KIND" = link ]; then
        if [ "$(readlink -- "$PREFIX$1")" = "$2" ]; then return 0; fi
    else
        set_aside "$1"
    fi
    record link "$1" "$2" "$E_BACKUP"
    rm -f -- "$PREFIX$1.vgpu-new"
    { ln -s -- "$2" "$PREFIX$1.vgpu-new" && mv -f -- "$PREFIX$1.vgpu-new" "$PREFIX$1"; } || die "cannot link $PREFIX$1"
}

# Something that another program is about to write, or a tree that is about to be unpacked. False if it was there before us.
claim() { # kind path
    if lookup "$2" && [ "$E_KIND" = "$1" ]; then
        touched "$2"
        return 0
    fi
    if [ -e "$PREFIX$2" ] || [ -L "$PREFIX$2" ]; then return 1; fi
    [ "$1" = generated ] || make_folders "$(dirname -- "$2")"
    record "$1" "$2" - -
    touched "$2"
}

# ---- taking back ----

put_back() { # path backup
    [ "$2" != - ] || return 0
    if [ ! -e "$STATE/backup/$2" ] && [ ! -L "$STATE/backup/$2" ]; then
        warn "the copy of the former $1 is missing; it cannot be restored"
        return 1
    fi
    rm -f -- "$PREFIX$1.vgpu-new"
    { cp -pP -- "$STATE/backup/$2" "$PREFIX$1.vgpu-new" && mv -f -- "$PREFIX$1.vgpu-new" "$PREFIX$1"; } || {
        warn "cannot restore $PREFIX$1"
        return 1
    }
}

take_back() { # kind path value backup
    target=$PREFIX$2
    rm -f -- "$target.vgpu-new"
    case $1 in
        file)
            if [ -L "$target" ]; then
                warn "$2 is a link now, not ours; left alone"
                return 0
            fi
            if [ -f "$target" ]; then
                now=$(sum_of "$target")
                E_BACKUP=$4
                wrote "$2" "$now" || same_as_backup "$now" || save_edited "$2"
                [ "$4" != - ] || rm -f -- "$target" || return 1
            fi
            put_back "$2" "$4" || return 1
            ;;
        link)
            if [ -L "$target" ] && [ "$(readlink -- "$target")" = "$3" ]; then rm -f -- "$target" || return 1; fi
            if [ ! -e "$target" ] && [ ! -L "$target" ]; then put_back "$2" "$4" || return 1; fi
            ;;
        dir) [ ! -d "$target" ] || rmdir -- "$target" 2>/dev/null || : ;;
        tree) rm -rf -- "$target" || return 1 ;;
        generated) if [ -d "$target" ]; then rmdir -- "$target" 2>/dev/null || :; else rm -f -- "$target"; fi ;;
        node)
            if [ -c "$target" ] && [ "$(stat -c %t:%T "$target")" = "$3" ]; then rm -f -- "$target" || return 1; fi
            ;;
    esac
}

# The end of an install: what an earlier one wrote and this one did not goes, and the manifest becomes short again.
complete_changes() { # version
    [ "$DRY" = no ] || return 0
    tac "$MANIFEST" >"$WORK/reversed" || die "cannot read $MANIFEST"
    seen='
'
    while IFS='|' read -r kind path value backup; do
        # A line that a power cut left half written names nothing.
        case $kind$backup in begin* | complete* | "$kind") continue ;; esac
        case $seen in *"
$path
"*) continue ;; esac
        seen="$seen$path
"
        [ "$kind" != gone ] || continue
        if ! was_touched "$path"; then
            take_back "$kind" "$path" "$value" "$backup" || die "cannot remove $path of the former version"
            [ "$kind" != dir ] || [ ! -d "$PREFIX$path" ] || continue # not empty: it is still ours to remove one day
            record gone "$path" - -
        fi
    done <"$WORK/reversed"
    : >"$WORK/manifest"
    seen='
'
    while IFS='|' read -r _ path _; do
        case $seen in *"
$path
"*) continue ;; esac
        seen="$seen$path
"
        if ! lookup "$path" || [ "$path" = - ]; then continue; fi
        printf '%s|%s|%s|%s\n' "$E_KIND" "$path" "$E_VALUE" "$E_BACKUP" >>"$WORK/manifest"
    done <"$MANIFEST"
    printf 'complete|-|%s|-\n' "$1" >>"$WORK/manifest"
    { cp -- "$WORK/manifest" "$MANIFEST.new" && mv -f -- "$MANIFEST.new" "$MANIFEST"; } || die "cannot write $MANIFEST"
    sync
}

# All of it. True if everything is as it was.
take_all_back() {
    tac "$MANIFEST" >"$WORK/reversed" || die "cannot read $MANIFEST"
    good=yes
    seen='
'
    while IFS='|' read -r kind path value backup; do
        case $kind$backup in begin* | complete* | "$kind") continue ;; esac
        case $seen in *"
$path
"*) continue ;; esac
        seen="$seen$path
"
        [ "$kind" != gone ] || continue
        # The state's own folders go last.
        case $STATE/ in "$PREFIX$path"/*) continue ;; esac
        if would "remove or restore $path"; then continue; fi
        take_back "$kind" "$path" "$value" "$backup" || {
            warn "$path could not be restored"
            good=no
        }
    done <"$WORK/reversed"
    [ "$DRY" = no ] || return 0
    [ "$good" = yes ] || return 1
    rm -rf -- "$STATE"
    while IFS='|' read -r kind path _; do
        [ "$kind" = dir ] || continue
        case $STATE/ in "$PREFIX$path"/*) rmdir -- "$PREFIX$path" 2>/dev/null || : ;; esac
    done <"$WORK/reversed"
}
