#!/usr/bin/env bash
# A real SLURM cluster on one machine, for tests: one slurmctld and several slurmd, as any user, without systemd.
#
#   slurm/emulate.sh start            install what is missing (Debian, root), start, wait until all nodes are idle
#   eval "$(slurm/emulate.sh env)"    make sbatch, srun, squeue, ... of this shell use it
#   slurm/emulate.sh status|stop|restart
#   slurm/emulate.sh killnode n2      lose a node as hardware does: its daemons and tasks get SIGKILL
#   slurm/emulate.sh startnode n2     bring it back
#
# Settings, by environment: SLURM_EMU_DIR (everything is kept there, nothing under /etc), NODES, CPUS (per node),
# GPUS (per node; null devices that the scheduler counts), MEM (MB per node), CTLD_PORT, NODE_PORT (node i listens
# on NODE_PORT+i), KILL_WAIT (seconds between SIGTERM and SIGKILL).
set -euo pipefail

dir=${SLURM_EMU_DIR:-${TMPDIR:-/var/tmp}/slurm-emu}
nodes=${NODES:-2} cpus=${CPUS:-4} gpus=${GPUS:-0} mem=${MEM:-8000}
ctld_port=${CTLD_PORT:-26817} node_port=${NODE_PORT:-26820} kill_wait=${KILL_WAIT:-5}
export SLURM_CONF=$dir/slurm.conf
# Debian keeps daemons where the PATH of an ordinary user does not look.
export PATH=$PATH:/usr/sbin:/sbin

say() { echo "[slurm] $*" >&2; }

alive() { # alive NAME: the daemon that `spawn` recorded still runs
  local pid
  pid=$(cat "$dir/pid/$1" 2>/dev/null) || return 1
  # By its command line too: the system may have given the number to another process.
  case $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") in *"${1%%-*}"*) return 0 ;; *) return 1 ;; esac
}

spawn() { # spawn NAME COMMAND...: a detached daemon with its pid on record
  local name=$1
  shift
  if alive "$name"; then return 0; fi
  setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/pid/$name"
}

wait_until() { # wait_until TENTHS COMMAND...: true as soon as COMMAND is, false after TENTHS of a second
  local tries=$1
  shift
  while ! "$@"; do
    ((tries-- > 0)) || return 1
    sleep 0.1
  done
}

install_packages() {
  local program missing=0
  for program in slurmctld slurmd munged sbatch; do command -v "$program" >/dev/null || missing=1; done
  if [ "$missing" = 0 ]; then return 0; fi
  say "installing slurmctld slurmd slurm-client munge"
  # RUNLEVEL=1 keeps the packages from starting daemons of their own.
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  if ! { apt-get update -qq &&
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >"$dir/log/apt.out" 2>&1 </dev/null; then
    tail -5 "$dir/log/apt.out" >&2
    say "could not install SLURM; as root: apt-get install slurmctld slurmd slurm-client munge"
    return 1
  fi
}

write_conf() {
  if [ ! -f "$dir/munge/key" ]; then
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    chmod 400 "$dir/munge/key" # munged refuses a key that others may read
  fi
  local host user i
  host=$(hostname -s) user=$(id -un)
  {
    cat <<CONF
ClusterName=emulated
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again; the default is 120 s.
AuthInfo=socket=$dir/sock/munge.socket,cred_expire=8
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/spool/%n
# A node may claim more CPUs and memory than this machine has.
SlurmdParameters=config_overrides
# No cgroups: they need rights that a container seldom has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Final states of jobs, since sacct needs a database.
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Without it a job takes all memory of its nodes.
DefMemPerCPU=256
GresTypes=gpu
ReturnToService=2
# As on sites where a job that wants to be queued again must say so, and where a log is begun anew.
JobRequeue=0
JobFileAppend=0
KillWait=$kill_wait
MinJobAge=600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
CompleteWait=0
MailProg=/bin/true
CONF
    local gres=""
    if [ "$gpus" -gt 0 ]; then gres="Gres=gpu:$gpus"; fi
    for ((i = 1; i <= nodes; i++)); do
      echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((node_port + i)) CPUs=$cpus Sockets=1" \
        "CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$mem $gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP"
  } >"$dir/slurm.conf"
  write_gres
}

write_gres() {
  : >"$dir/gres.conf"
  local i
  for ((i = 0; i < gpus; i++)); do
    # CUDA_VISIBLE_DEVICES is set for character devices only: a twin of /dev/null serves (root may make it).
    [ -e "$dir/run/gpu$i" ] || mknod "$dir/run/gpu$i" c 1 3 2>/dev/null || : >"$dir/run/gpu$i"
    echo "NodeName=n[1-$nodes] Name=gpu File=$dir/run/gpu$i" >>"$dir/gres.conf"
  done
}

write_sacct() {
  # Launchers such as submitit poll sacct, which fails without a database; squeue knows the same for young jobs.
  cat >"$dir/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
# JobID|State|NodeList of the jobs asked for, by squeue.
jobs=""
while [ $# -gt 0 ]; do
  case $1 in
    -j | --jobs) jobs+=${jobs:+,}$2 && shift ;;
    -j*) jobs+=${jobs:+,}${1#-j} ;;
    --jobs=*) jobs+=${jobs:+,}${1#*=} ;;
  esac
  shift
done
echo "JobID|State|NodeList"
for job in ${jobs//,/ }; do squeue -h -r -t all -j "$job" -o '%i|%T|%N' 2>/dev/null || true; done
SACCT
  chmod +x "$dir/bin/sacct"
}

munge_answers() { munge -n -S "$dir/sock/munge.socket" >/dev/null 2>&1; }
controller_answers() { scontrol ping 2>/dev/null | grep -q UP; }
nodes_are_up() { [ "$(sinfo -h -N -t idle,mix,alloc -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ]; }

start() {
  local began=$SECONDS i
  mkdir -p "$dir"/{bin,log,munge,pid,run,sock,spool,state}
  # Tasks of other users reach the socket; the key is for munged alone.
  chmod 755 "$dir" "$dir/sock" && chmod 700 "$dir/munge"
  install_packages
  write_conf
  write_sacct
  if ! alive munged; then rm -f "$dir"/sock/*; fi
  spawn munged munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/sock/munge.socket" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2
  wait_until 100 munge_answers || fail munged
  spawn slurmctld slurmctld -D -i -f "$SLURM_CONF"
  wait_until 150 controller_answers || fail slurmctld
  for ((i = 1; i <= nodes; i++)); do start_node "n$i"; done
  if ! wait_until 100 nodes_are_up; then
    # A node that was lost in an earlier life of this cluster stays down until somebody says otherwise.
    scontrol update "nodename=n[1-$nodes]" state=resume >/dev/null 2>&1 || true
    wait_until 200 nodes_are_up || fail 'slurmd-*'
  fi
  sinfo -N -o '%N %T %c %m %G' >&2
  say "up in $((SECONDS - began)) s; use it: eval \"\$(SLURM_EMU_DIR=$dir $0 env)\""
}

start_node() {
  mkdir -p "$dir/spool/$1"
  spawn "slurmd-$1" slurmd -D -N "$1" -f "$SLURM_CONF"
}

fail() { # fail NAME: the last words of a daemon, then the end
  tail -n 5 "$dir"/log/$1.out "$dir"/log/$1.log >&2 2>/dev/null || true
  say "$1 did not come up; see $dir/log"
  exit 1
}

recorded() { find "$dir/pid" -type f -printf '%f\n' 2>/dev/null | sort -r; }

all_ended() {
  local name
  for name in $(recorded); do if alive "$name"; then return 1; fi; done
}

no_jobs() { [ -z "$(timeout 2 squeue -h 2>/dev/null)" ]; }

stop() { # ends what `start` recorded, and the step daemons of this cluster; nothing by name alone
  local name pid
  if alive slurmctld; then
    timeout 5 squeue -h -o %A 2>/dev/null | sort -u | timeout 10 xargs -r scancel 2>/dev/null || true
    wait_until 80 no_jobs || true
  fi
  for name in $(recorded); do if alive "$name"; then kill "$(cat "$dir/pid/$name")" 2>/dev/null || true; fi; done
  wait_until 50 all_ended || true
  for name in $(recorded); do
    if alive "$name"; then kill -9 "$(cat "$dir/pid/$name")" 2>/dev/null || true; fi
    rm -f "$dir/pid/$name"
  done
  for pid in $(pgrep slurmstepd || true); do
    if grep -qzx "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null; then kill -9 "$pid" || true; fi
  done
  say stopped
}

kill_node() {
  local pid child
  pid=$(cat "$dir/pid/slurmd-$1")
  kill -9 "$pid" 2>/dev/null || true
  for pid in $(pgrep slurmstepd || true); do
    # A step daemon shows its node by the files that it holds open.
    if ! find "/proc/$pid/fd" -lname "$dir/spool/$1/*" -o -lname "$dir/log/slurmd-$1.log" 2>/dev/null |
      grep -q .; then continue; fi
    for child in $(pgrep -P "$pid" || true); do
      kill -9 -- "-$child" 2>/dev/null || kill -9 "$child" 2>/dev/null || true
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  restart) stop && start ;;
  status)
    for name in $(recorded); do
      if alive "$name"; then echo "$name runs as $(cat "$dir/pid/$name")"; else echo "$name is down"; fi
    done
    sinfo -N
    ;;
  env)
    echo "export SLURM_CONF=$SLURM_CONF"
    echo "case :\$PATH: in *:$dir/bin:*) ;; *) export PATH=$dir/bin:\$PATH ;; esac"
    ;;
  killnode) kill_node "${2:?name a node}" ;;
  startnode) start_node "${2:?name a node}" ;;
  *)
    echo "usage: $0 start|stop|restart|status|env|killnode NODE|startnode NODE" >&2
    exit 64
    ;;
esac
