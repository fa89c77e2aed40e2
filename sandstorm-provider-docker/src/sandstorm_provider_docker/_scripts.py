r"""The POSIX-sh programs that run in a container. They need `sh`, `sleep`, `chmod`, `mkdir` and, for files, coreutils or busybox.

The first line that a script of a user's program or of a file writes to stderr is its word on how it began; what follows is payload.

A program's tree is known by its group id: every start has one of its own, which is inherited, and which nothing without
capabilities can take off. What kills runs as root with `CAP_KILL` alone, so that user 1000 can neither signal it nor stop
the clock of the lifetime. It uses only what is built into the shell: it must work where nothing can be forked any more.
"""

from __future__ import annotations

STATE = "/run/sandstorm"
"""A small file system in the container: gates of starts, and secrets."""

_AGENT = r"""
group_of() {
  state='' group=''
  { while read -r key value rest; do
      case $key in State:) state=$value ;; Gid:) group=$value; break ;; esac
    done <"$1"; } 2>/dev/null
}
sweep() {
  tries=0 frozen=''
  while [ "$tries" -lt 2000 ]; do
    tries=$((tries + 1)) alive='' moving=''
    for status in /proc/[0-9]*/status; do
      group_of "$status"
      [ "$group" = "$1" ] || continue
      case $state in Z | X) continue ;; esac
      alive=1 pid=${status#/proc/} pid=${pid%/status}
      case $state in T | t) ;; *) moving=1; kill -STOP "$pid" 2>/dev/null ;; esac
      [ -z "$frozen" ] || kill -KILL "$pid" 2>/dev/null
    done
    [ -n "$alive" ] || return 0
    [ -n "$moving" ] || frozen=1
  done
  return 1
}
signal() {
  group_of "/proc/$2/status"
  [ "$group" = "$1" ] && kill -"$3" "$2" 2>/dev/null
}
count_ooms() {
  ooms=0
  for file in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
    [ -r "$file" ] || continue
    while read -r key value; do [ "$key" != oom_kill ] || ooms=$value; done <"$file"
  done
}
first_line() {
  line=''
  for file in "$@"; do [ ! -r "$file" ] || { read -r line <"$file"; break; }; done
}
introduce() {
  privileges='' filter='' interfaces=0
  while read -r key value rest; do
    case $key in NoNewPrivs:) privileges=$value ;; Seccomp:) filter=$value ;; esac
  done </proc/self/status
  while read -r key rest; do case $key in *:*) interfaces=$((interfaces + 1)) ;; esac; done </proc/net/dev
  first_line /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; memory=$line
  first_line /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max; tasks=$line
  first_line /proc/version
  echo "ready no_new_privs=$privileges seccomp=$filter memory=$memory tasks=$tasks interfaces=$interfaces kernel=$line"
}
serve() {
  introduce
  while read -r id verb group_id pid number; do
    case $verb in
      sweep) sweep "$group_id"; result=$?; count_ooms; echo "done $id $result $ooms" ;;
      signal) signal "$group_id" "$pid" "$number"; echo "done $id $? 0" ;;
    esac
  done
}
"""

SERVE = _AGENT + "serve\n"
"""The agent alone, for the containers that outlive their router."""

_OPEN = f'chmod 1777 /work /tmp /dev/shm {STATE} 2>/dev/null\nexec 3<&0 </dev/null\nsleep "$1" &\nclock=$!\n'

MAIN_KEPT = _OPEN + 'wait "$clock"\n'
"""The main process of a container that outlives its router: it ends after `$1` seconds, and reaps meanwhile."""

MAIN_LEASHED = _AGENT + _OPEN + '( serve <&3; kill -KILL "$clock" ) &\nwait "$clock"\n'
"""The same with the agent; the end of its stdin, which is the end of the router's connection, ends the container."""

RUN = f"""umask 022
gate=$1 directory=$2 columns=$3 rows=$4
shift 4
say() {{ printf '%s\\n' "$1" >&2; }}
cd "./$directory" 2>/dev/null || {{ say 'no-directory'; exit 0; }}
if [ -n "$gate" ] && ! mkdir "{STATE}/$gate" 2>/dev/null; then
  if [ -d "{STATE}/$gate" ]; then say repeated; else say full; fi
  exit 0
fi
[ ! -f {STATE}/secrets ] || . {STATE}/secrets
[ -z "$columns" ] || stty cols "$columns" rows "$rows" 2>/dev/null
say "started $$"
exec "$@"
"""
"""Starts a program once: gate, directory, columns and rows, then its argv."""

KEEP_SECRETS = f"umask 077; cat >{STATE}/secrets && echo done >&2"

WATCHDOG = (
    _AGENT
    + """seconds=0
while [ "$seconds" -lt "$2" ]; do
  sleep 1
  seconds=$((seconds + 1)) found=''
  for status in /proc/[0-9]*/status; do group_of "$status"; [ "$group" != "$1" ] || { found=1; break; }; done
  [ -n "$found" ] || exit 0
done
sweep "$1"
"""
)
"""Kills the group `$1` after `$2` seconds, whoever is connected then."""

_WAY = r"""say() { printf '%s\n' "$1" >&2; }
cd /work || { say lost; exit 0; }
walk() {
  rest=$1 place=.
  while :; do
    case $rest in */*) step=${rest%%/*} rest=${rest#*/} ;; *) step=$rest rest='' ;; esac
    if [ -n "$step" ] && [ "$step" != . ]; then
      place=$place/$step
      if [ -n "$rest" ]; then
        [ ! -L "$place" ] || { say link; exit 0; }
        [ -z "$2" ] || [ -d "$place" ] || mkdir "$place" 2>/dev/null || { say refused; exit 0; }
      fi
    fi
    [ -n "$rest" ] || break
  done
}
"""

UPLOAD = (
    _WAY
    + r"""umask 022
walk "$1" make
if [ -L "$place" ]; then say link; exit 0; fi
if [ -e "$place" ] && [ ! -f "$place" ]; then say special; exit 0; fi
part=$place.$2
trap 'rm -f "$part"' EXIT
: >"$part" 2>/dev/null || { say refused; exit 0; }
say ready
cat >"$part" || exit 28
size=$(($(wc -c <"$part") - 32))
[ "$size" -ge 0 ] && [ "$(tail -c 32 "$part")" = "$2" ] || exit 29
dd if=/dev/null of="$part" bs=1 seek="$size" 2>/dev/null || exit 28
mv -f "$part" "$place" || exit 28
"""
)
"""Writes stdin to the path `$1`. It must end with the token `$2`, so that a cut upload leaves nothing behind."""

DOWNLOAD = (
    _WAY
    + r"""walk "$1"
if [ -L "$place" ]; then say link; exit 0; fi
if [ ! -e "$place" ]; then say missing; exit 0; fi
if [ ! -f "$place" ]; then say special; exit 0; fi
[ -r "$place" ] || { say refused; exit 0; }
say ready
exec cat "$place"
"""
)

UNPACK = _WAY + "umask 022\nsay ready\nexec tar -xf -\n"

MAKE_DIRECTORY = _WAY + 'walk "$1/." make\nif [ -d "$place" ] && [ ! -L "$place" ]; then say ready; else say special; fi\n'

REMOVE = (
    _WAY
    + r"""walk "$1"
if [ ! -e "$place" ] && [ ! -L "$place" ]; then say missing; exit 0; fi
rm -rf "$place" 2>/dev/null || { chmod -R u+rwX "$place" && rm -rf "$place"; } 2>/dev/null || { say refused; exit 0; }
say ready
"""
)

_SHOW = r"""sh -c 'printf "%s\0" "$@"; printf "\0"; stat -c "%f %s %Y %n" "$@" 2>/dev/null; printf "\0"' sh"""

STAT = (
    _WAY
    + rf"""walk "$1"
if [ ! -e "$place" ] && [ ! -L "$place" ]; then say missing; exit 0; fi
say ready
{_SHOW} "$place"
"""
)

LIST = (
    _WAY
    + rf"""walk "$1"
if [ -L "$place" ]; then say link; exit 0; fi
if [ ! -e "$place" ]; then say missing; exit 0; fi
if [ ! -d "$place" ]; then say special; exit 0; fi
say ready
exec find "$place" -mindepth 1 ${{2:+-maxdepth "$2"}} -exec {_SHOW} {{}} + 2>/dev/null
"""
)
"""What is in the directory `$1`; `$2` is empty, or the depth of the listing."""
