#!/usr/bin/env bash
# Run a command on the first of two machines that are joined to a Ray cluster: namespaces of Linux stand in for them.
#
#   scripts/two_machines.sh COMMAND ...     e.g. eggroll-llm train RECIPE.toml --engine.replicas 2 --engine.threads 1
#
# Each has a network, processes, shared memory, a host name and a /tmp of its own, and one core as Ray counts. The second
# does not see the first one's /tmp, so that a run directory there is not shared, unless Ray or the working directory is
# in it. COMMAND has RAY_ADDRESS; `ip link set cable down`, at any time, cuts the second machine off. No rights are needed
# where users may make namespaces, and nothing is left of either machine when the command has ended, whatever ends it.
# Needs unshare, nsenter and ip.
set -euo pipefail

if [ -z "${TWO_MACHINES:-}" ]; then
    exec env TWO_MACHINES=1 unshare --user --map-root-user --net --mount --uts --pid --fork --kill-child --mount-proc \
        "$0" "$@"
fi
unset TWO_MACHINES
export RAY_AUTH_MODE=disabled  # nobody else is in this network
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=/dev/shm/ray
node=(--num-cpus 1 --object-store-memory 200000000 --disable-usage-stats)

hostname machine-1
mount -t tmpfs tmpfs /dev/shm
unshare --net --mount --uts --pid --fork --kill-child bash -c 'mount -t proc proc /proc; exec sleep infinity' &
until other=$(pgrep -P $! -x sleep); do
    kill -0 $!
    sleep 0.05
done
on_the_other() { nsenter --target "$other" --net --mount --uts --pid "$@"; }

ip link set lo up
ip link add cable type veth peer name cable netns "$other"
ip address add 10.0.0.1/24 dev cable
ip link set cable up
hide="mount -t tmpfs tmpfs /tmp"
case "$(command -v ray):$PWD" in
    /tmp/* | *:/tmp/*) hide=: ;; # what is to run is there
esac
on_the_other bash -c "hostname machine-2; mount -t tmpfs tmpfs /dev/shm; $hide
    ip link set lo up; ip address add 10.0.0.2/24 dev cable; ip link set cable up"

start() {
    "$@" "${node[@]}" >/dev/shm/printed 2>&1 || { cat /dev/shm/printed >&2 && exit 1; }
}
start ray start --head --node-ip-address 10.0.0.1 --port 6379 --include-dashboard false
start on_the_other ray start --address 10.0.0.1:6379 --node-ip-address 10.0.0.2
export RAY_ADDRESS=10.0.0.1:6379
"$@"
