#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Makes a test VM's file tree of the host's: its root, read-only over 9p, under a layer in memory that takes the writes.
# Then the agent takes over. What the kernel is told as vm.NAME=VALUE is $NAME here.
/bin/busybox mkdir -p /proc /sys /dev /lower /layer /root /new
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for word in $(cat /proc/cmdline); do
    case "$word" in vm.*=*) eval "${word#vm.}" ;; esac
done
say() { echo "vm: $*" >/dev/console; }
if [ -n "$probe" ]; then
    say "probe passed"
    poweroff -f
fi
for module in $(cat /modules/order); do
    insmod "/modules/$module" || say "cannot load $module"
done
plan9=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o "ro,cache=loose,$plan9" root /lower || say "cannot mount the host's root"
mount -t tmpfs -o size=75%,mode=0755 layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /new || say "cannot lay over it"
for place in proc sys dev run; do mkdir -p "/new/$place"; done
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mount -t tmpfs -o mode=0755 run /new/run
mkdir -p /new/dev/pts /new/dev/shm /new/run/vm/share /new/run/lock
mount -t devpts -o mode=0620,gid=5,ptmxmode=0666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t 9p -o "cache=none,$plan9" share /new/run/vm/share
cp /agent.py /new/run/vm/agent.py
hostname "$name"
ip link set lo up
port=
for entry in /new/sys/class/virtio-ports/*; do
    [ "$(cat "$entry/name")" = agent ] && port=/dev/${entry##*/}
done
[ -n "$port" ] || say "there is no port for the agent"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
exec switch_root -c /dev/console /new "$python" -I -S /run/vm/agent.py "$port"
