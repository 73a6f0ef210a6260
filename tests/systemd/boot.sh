#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Starts systemd as process 1 of its own namespaces. Its files are this machine's, under a layer in memory that takes the writes.
# Runs in the new namespaces (tests/systemd/host.py): boot.sh FOLDER SYSTEMD NEEDED...: FOLDER has "etc", laid over /etc, and "share";
# the needed folders are there too, wherever they lie.
set -e
folder=$1 systemd=$2
shift 2
new=$folder/root
mount -t tmpfs -o mode=0755 layer "$folder/layer"
mkdir "$folder/layer/upper" "$folder/layer/work" "$new"
mount -t overlay -o "lowerdir=/,upperdir=$folder/layer/upper,workdir=$folder/layer/work" overlay "$new"
mount -t proc proc "$new/proc"
# The kernel is the machine's own, and its settings are not ours.
mount --bind "$new/proc/sys" "$new/proc/sys"
mount -o remount,bind,ro "$new/proc/sys"
# Read-only, as every container manager has it: udev leaves the hardware alone.
mount -t sysfs -o ro sysfs "$new/sys"
mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup"
mount -t tmpfs -o mode=0755 run "$new/run"
mount -t tmpfs -o mode=1777 tmp "$new/tmp"
mount -t tmpfs -o mode=0755 dev "$new/dev"
for node in null zero full random urandom tty; do
    cp -a "/dev/$node" "$new/dev/$node"
done
mkdir -p "$new/dev/pts" "$new/dev/shm" "$new/run/share" "$new/etc/systemd"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$new/dev/pts"
ln -s pts/ptmx "$new/dev/ptmx"
ln -s /proc/self/fd "$new/dev/fd"
mount -t tmpfs -o mode=1777 shm "$new/dev/shm"
mount --bind "$folder/share" "$new/run/share"
# A checkout or a Python on another file system is not under the layer; nothing there is to be written.
for place in "$@"; do
    if [ -z "$(ls -A "$new$place" 2>/dev/null)" ]; then
        mkdir -p "$new$place"
        mount --bind "$place" "$new$place"
        mount -o remount,bind,ro "$new$place"
    fi
done
# What belongs to the machine and not to its files.
rm -rf "$new/var/log/journal" "$new/var/lib/vgpu" "$new/var/cache/vgpu" "$new/var/vgpu" "$new/etc/vgpu"
: >"$new/etc/fstab"
cp -r "$folder/etc/." "$new/etc/"
# Mounts that would show the machine's kernel; and no more of its services than the basic target has.
for unit in sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount dev-hugepages.mount \
    proc-sys-fs-binfmt_misc.automount getty.target timers.target systemd-timesyncd.service; do
    ln -sf /dev/null "$new/etc/systemd/system/$unit"
done
echo vgpu-test >"$new/etc/hostname"
ip link set lo up 2>/dev/null || true

cd "$new"
mkdir -p old
pivot_root . old
umount -l /old
without=-sys_module,-sys_time,-sys_rawio,-syslog
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec setpriv --bounding-set "$without" --inh-caps "$without" env -i container=vgpu-test PATH="$path" LANG=C.UTF-8 "$systemd" \
    --system --unit=basic.target --show-status=no --log-target=journal
