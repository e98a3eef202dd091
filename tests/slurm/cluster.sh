#!/usr/bin/env bash
# A one-node SLURM cluster of its own, for tests: every file, socket and port belongs to DIR.
#
#   cluster.sh start DIR     munged, slurmctld and slurmd; needs root and Debian's slurm-wlm and munge
#   cluster.sh stop DIR      cancels its jobs and ends the three daemons
#   cluster.sh status DIR    daemons, node and jobs
#
# sbatch, squeue and the others reach it with SLURM_CONF=DIR/slurm.conf. Jobs of partition `urgent` preempt those of
# `batch`, which are requeued. The node has two CPUs, whatever the machine has; no cgroups are used.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# A port that nothing listens on.
free_port() {
    local port
    while port=$((20000 + RANDOM % 10000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

pid_of() {
    cat "$dir/$1.pid" 2>/dev/null || true
}

running() {
    local pid
    pid=$(pid_of "$1")
    [[ -n $pid ]] && kill -0 "$pid" 2>/dev/null
}

# Waits up to SECONDS for a command to succeed.
wait_until() {
    local seconds=$1 tries
    shift
    for ((tries = 0; tries < 10 * seconds; tries++)); do
        "$@" && return
        sleep 0.1
    done
    return 1
}

write_config() {
    local host
    host=$(hostname -s)
    cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for its old credential to expire before it starts again.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=600
MessageTimeout=30
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=batch Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=$host MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

node_is_idle() {
    [[ $(sinfo --noheader --partition=batch --format=%T 2>/dev/null) == idle ]]
}

start() {
    local missing
    for missing in munged slurmctld slurmd sbatch; do
        command -v "$missing" >/dev/null || fail "$missing is not installed: apt-get install slurm-wlm munge"
    done
    ((EUID == 0)) || fail "a cluster that starts jobs must be started by root"
    running slurmctld && fail "$dir: a cluster is running there"
    mkdir -p "$dir"/{state,spool}
    chmod 755 "$dir"
    (umask 077 && head --bytes=128 /dev/urandom >"$dir/munge.key")
    write_config

    # --force: the directories above DIR need not be as strict as munged wants them.
    munged --force --num-threads=2 --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>/dev/null || fail "munged: see $dir/munged.log"
    slurmctld -c || fail "slurmctld: see $dir/slurmctld.log"
    slurmd || fail "slurmd: see $dir/slurmd.log"
    wait_until 30 node_is_idle || {
        stop
        fail "the node did not come up in 30 s: see $dir/slurmd.log and $dir/slurmctld.log"
    }
}

no_jobs() {
    [[ -z $(squeue --noheader 2>/dev/null) ]]
}

ended() {
    ! running "$1"
}

stop() {
    local daemon
    if running slurmctld; then
        scancel --state=PENDING --user=root 2>/dev/null || true
        scancel --user=root 2>/dev/null || true
        wait_until 15 no_jobs || echo "warning: jobs are left: $(squeue --noheader | tr '\n' ';')" >&2
    fi
    for daemon in slurmd slurmctld munged; do
        running "$daemon" && kill "$(pid_of "$daemon")"
        wait_until 10 ended "$daemon" || kill -KILL "$(pid_of "$daemon")"
        rm -f "$dir/$daemon.pid"
    done
}

status() {
    local daemon
    for daemon in munged slurmctld slurmd; do
        echo "$daemon: $(running "$daemon" && echo "running, process $(pid_of "$daemon")" || echo "not running")"
    done
    running slurmctld || return 0
    sinfo
    squeue
}

(($# == 2)) && [[ $1 =~ ^(start|stop|status)$ ]] || fail "usage: cluster.sh start|stop|status DIR"
dir=$(realpath --canonicalize-missing "$2")
export SLURM_CONF=$dir/slurm.conf
"$1"
