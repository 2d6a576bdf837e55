# The steps of the guests, each a function that fails with a status other than 0. Sourced by init for each step anew, with
# `set -e`. What must outlive a step is in /tmp.

fail() { echo "$*"; exit 1; }

# ---- waiting ----

await() { # SECONDS COMMAND…: until the command succeeds
    end=$(($(date +%s) + $1)); shift
    while ! "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt $end ] || fail "in vain: $*"
        usleep 200000
    done
}

# ---- disks ----

pci_disk() { # [SERIAL]: the block device of an NVMe controller on the PCI bus is remembered
    await 60 find_disk pcie serial "${1:-}"
    find_disk pcie serial "${1:-}" >/tmp/disk
    cat /tmp/disk
}

fabric_disk() { # NQN: the same for one over TCP
    await 60 find_disk tcp subsysnqn "$1"
    find_disk tcp subsysnqn "$1" >/tmp/disk
    cat /tmp/disk
}

find_disk() { # TRANSPORT ATTRIBUTE [VALUE]
    for controller in /sys/class/nvme/nvme*; do
        [ "$(cat "$controller/transport")" = "$1" ] || continue
        case "$(cat "$controller/$2")" in "$3"*) ;; *) continue ;; esac
        for path in "$controller"/nvme*n*; do
            # A path of a namespace (nvme0c1n1) belongs to the block device nvme0n1.
            name=$(basename "$path" | sed 's/c[0-9]*n/n/')
            if [ -b "/dev/$name" ] && [ "$(cat "/sys/block/$name/size")" -gt 0 ]; then echo "/dev/$name"; return 0; fi
        done
    done
    return 1
}

disk() { cat /tmp/disk; }

identify() { nvme id-ctrl "$(disk)"; nvme id-ns "$(disk)"; }

interrupts() { # NAME: the lines of whoever has that name; each must have come
    grep "$1" /proc/interrupts || fail "$1 has no interrupt"
    grep "$1" /proc/interrupts | awk '{ if ($2 + $3 == 0) exit 1 }' || fail "$1 has never been interrupted"
}

# ---- file systems ----

mkfs() { mkfs.ext4 -q -F "$(disk)"; }
mounted() { mount -t ext4 "$(disk)" /mnt; }
unmounted() { umount /mnt; }
# Reads all of it, changes nothing: any mistake, even one that could be mended, is a failure.
fsck() { e2fsck -f -n "$(disk)"; }
# After a guest that did not unmount: the journal is replayed, then there must be no mistake.
fsck_journal() { e2fsck -p "$(disk)" || [ $? = 1 ]; fsck; }

tree_make() { # [FILES]: files of many sizes with their sums, in memory
    rm -rf /tmp/tree; mkdir -p /tmp/tree
    dd if=/dev/urandom of=/tmp/noise bs=64k count=64 2>/dev/null
    at=0
    while [ $at -lt "${1:-60}" ]; do
        mkdir -p "/tmp/tree/$((at % 7))"
        dd if=/tmp/noise of="/tmp/tree/$((at % 7))/$at" bs=1k skip=$((at * 13)) count=$((at * at % 173)) 2>/dev/null
        at=$((at + 1))
    done
    (cd /tmp/tree && find . -type f | sort | xargs sha256sum) >/tmp/sums
}

tree_copy() { # NAME: onto the disk, with the sums beside it
    cp -a /tmp/tree "/mnt/$1"
    cp /tmp/sums "/mnt/$1.sums"
    sync
}

tree_check() { # NAME: read from the disk, not from memory
    sync; echo 3 >/proc/sys/vm/drop_caches
    (cd "/mnt/$1" && sha256sum -c "../$1.sums") >/tmp/checked || { grep -v ': OK$' /tmp/checked; fail "$1 is damaged"; }
    wc -l </tmp/checked
}

# ---- load ----

fio_verified() { # FILE SIZE [SECONDS]: random writes, read back and compared; overwrites for SECONDS first
    fio --name=verified --filename="$1" --size="$2" --ioengine=libaio --direct=1 --iodepth=16 --rw=randwrite --bs=4k \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 --randrepeat=0 \
        ${3:+--time_based --runtime="$3"} --output-format=terse --terse-version=3 >/tmp/fio.$$ 2>&1 \
        || { cat /tmp/fio.$$; fail "fio failed"; }
    # Field 5 is the error.
    awk -F';' '/^3;/ { print "fio error " $5 ", read KiB " $6 ", written KiB " $47; if ($5 != 0) exit 1 }' /tmp/fio.$$
}

# ---- beside each other ----

start() { # NAME COMMAND…: a step that goes on while others run
    name=$1; shift
    rm -f "/tmp/$name.code"
    ( set +e; ( set -e -o pipefail; eval "$*" ) >"/tmp/$name.log" 2>&1 </dev/null; echo $? >"/tmp/$name.code" ) &
}

running() { [ ! -e "/tmp/$1.code" ] || { cat "/tmp/$1.log"; fail "$1 has ended"; }; }

stop() { # WORDS: who has them in its command line is told to end
    for program in /proc/[0-9]*; do
        words=" $(tr '\0' ' ' <"$program/cmdline" 2>/dev/null) "
        case "$words" in *" $* "*) kill -TERM "${program#/proc/}"; return 0 ;; esac
    done
    fail "nobody runs $*"
}

finish() { # NAME [SECONDS]: its end
    await "${2:-300}" test -s "/tmp/$1.code"
    cat "/tmp/$1.log"
    return "$(cat "/tmp/$1.code")"
}

# ---- a guest that does not keep to the rules ----

misbehave() { # the disk's controller is taken from its driver, and its registers get nonsense
    device=$(readlink -f /sys/class/nvme/nvme0/device)
    basename "$device" >/sys/bus/pci/drivers/nvme/unbind
    echo 1 >"$device/enable"
    # Memory space and bus master.
    printf '\006\000' | dd of="$device/config" bs=1 seek=4 conv=notrunc 2>/dev/null
    bar=$(head -n 1 "$device/resource" | cut -d' ' -f1)
    for round in 1 2 3; do
        put() { devmem $((bar + $1)) 32 "$2"; }
        put 0x14 0                                          # CC.EN = 0
        put 0x24 0x0fff0fff                                 # AQA: 4,096 entries
        put 0x28 0xfffff000; put 0x2c 0x00ffffff            # ASQ: where nothing is
        put 0x30 0x00000001; put 0x34 0                     # ACQ: not aligned
        put 0x14 0x00460001                                 # CC.EN = 1
        at=0x1000
        while [ $((at)) -lt $((0x1040)) ]; do put $at 0xffffffff; at=$((at + 4)); done
        put 0x14 0; put 0x28 0x00001000; put 0x2c 0; put 0x30 0x00002000
        put 0x14 0x00460001; put 0x1000 1; put 0x1000 0xfff; put 0x1004 0xfff; put 0x1008 7
        put 0x20 0x4e564d65                                 # NSSR: "NVMe"
    done
}

# ---- the machine ----

restart() { sync; reboot -f; sleep 60; }
off() { sync; poweroff -f; sleep 60; }

# ---- NVMe/TCP ----

HOSTNQN=nqn.2014-08.org.nvmexpress:uuid:d7a10000-0000-4000-8000-000000000001
HOSTID=d7a10000-0000-4000-8000-000000000001
who() { echo "--hostnqn=$HOSTNQN --hostid=$HOSTID"; }

net() { # QEMU's user network: the machine's loopback is 10.0.2.2
    ip link set lo up; ip link set eth0 up
    ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
}

discover() { # ADDRESS PORT NQN [OPTIONS]: the NQN must be listed
    address=$1; port=$2; nqn=$3; shift 3
    nvme discover -t tcp -a "$address" -s "$port" $(who) "$@" >/tmp/discovered 2>&1 || { cat /tmp/discovered; fail "no discovery"; }
    cat /tmp/discovered
    grep -q "^subnqn: *$nqn\$" /tmp/discovered || fail "$nqn is not listed"
}

connect() { # ADDRESS PORT NQN [OPTIONS]; later options win, so the host's name can be another one
    address=$1; port=$2; nqn=$3; shift 3
    nvme connect -t tcp -a "$address" -s "$port" -n "$nqn" $(who) --reconnect-delay=2 --ctrl-loss-tmo=300 --keep-alive-tmo=5 \
        --nr-io-queues=2 "$@"
}

refused() { # the same arguments: must not work, and must end
    if connect "$@" >/tmp/refused 2>&1; then cat /tmp/refused; fail "connected"; fi
    cat /tmp/refused; dmesg | grep nvme | tail -n 3
}

disconnect() { nvme disconnect -n "$1"; }

state() { # NQN STATE: waits until its controller is in that state
    await 120 is_state "$1" "$2"
}

is_state() {
    for controller in /sys/class/nvme/nvme*; do
        [ "$(cat "$controller/subsysnqn")" = "$1" ] && [ "$(cat "$controller/state")" = "$2" ] && return 0
    done
    return 1
}

# ---- Linux's own target, to tell a mistake of these steps from one of ours ----

nvmet() { # PORT NQN [SECRET], a port for each NQN: a file of 64 MiB on the guest's loopback
    ip link set lo up
    subsystem=/sys/kernel/config/nvmet/subsystems/$2; port=/sys/kernel/config/nvmet/ports/$1
    host=/sys/kernel/config/nvmet/hosts/$HOSTNQN
    truncate -s 64M "/tmp/backing-$1"
    loop=$(losetup -f); losetup "$loop" "/tmp/backing-$1"
    mkdir -p "$subsystem/namespaces/1" "$port" "$host"
    [ -z "${3:-}" ] || { echo "$3" >"$host/dhchap_key"; echo 'hmac(sha256)' >"$host/dhchap_hash"; }
    echo 0 >"$subsystem/attr_allow_any_host"
    ln -s "$host" "$subsystem/allowed_hosts/"
    echo "$loop" >"$subsystem/namespaces/1/device_path"
    echo 1 >"$subsystem/namespaces/1/enable"
    echo tcp >"$port/addr_trtype"; echo ipv4 >"$port/addr_adrfam"
    echo 127.0.0.1 >"$port/addr_traddr"; echo "$1" >"$port/addr_trsvcid"
    ln -s "$subsystem" "$port/subsystems/"
}
