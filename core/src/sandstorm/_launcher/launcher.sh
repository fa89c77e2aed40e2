#!/bin/sh
# The launcher: runs inside a sandbox and starts a program at most once, detached from the exec that asked for it.
#
#   launcher.sh install ROOT TEXT              keeps this script below ROOT (0700) and says what the image can do
#   launcher.sh start ID FILE HASH HEAD SECONDS BYTES INPUT    starts what FILE describes, unless ID was started or burned
#   launcher.sh poll ID OUT ERR BLOCKS         state and output from two offsets
#   launcher.sh burn ID WHO                    sees to it that ID never starts, in the name of WHO
#   launcher.sh kill ID | signal ID NUMBER | input ID NUMBER FILE HASH
#
# Every answer is text between the lines `sandstorm-launcher` and `end`, so that a truncated one is recognised.
# Below ROOT/ID: `sup.*` those who want to start it, `gate/` the lock (who makes it, wins), `gate/owner` the supervisor
# that won, `gate/burned` (by whom) instead where nothing may ever start, `status` how it ended.
# shellcheck disable=SC2046,SC2086,SC1091,SC2317,SC2034 # numbers and pids are split on purpose; the head calls functions
set -u
exec 2>/dev/null
before=$(umask)
umask 077

# --- tools -----------------------------------------------------------------------------------------------------------

has() { command -v "$1" >/dev/null; }

digest() { # of stdin; the same tool on every call, so that a digest means one thing
    if has sha256sum; then sum=$(sha256sum); else sum=$(cksum); fi
    echo "${sum%% *}"
}

encode() { if has base64; then base64; else od -An -v -tx1; fi; }

nap() { sleep 0.02 || sleep 1; }

sizes() { # of stdout and stderr so far; `ls` asks the inode where some `wc` read the file
    set -- $(ls -ln "$dir/stdout") - $(ls -ln "$dir/stderr")
    out=0 err=0
    [ $# -gt 9 ] || return
    out=$5
    while [ "$1" != - ]; do shift; done
    err=$6
}

answer() { echo sandstorm-launcher; "$@"; echo end; }

# --- processes -------------------------------------------------------------------------------------------------------

stat_of() { # sets `stat` to the fields of /proc/PID/stat from the third on; a name may hold newlines and brackets
    stat='' line=''
    [ -r "/proc/$1/stat" ] || return 1
    while read -r part; do line="$line $part"; done <"/proc/$1/stat"
    stat=${line##*) }
    [ -n "$stat" ]
}

identity() { # "PID START" of a live process: a pid alone may be another process by now
    if [ -r /proc/self/stat ]; then
        stat_of "$1" || return 1
        set -- "$1" $stat
        case $2 in Z | X) return 1 ;; esac
        echo "$1 ${21}"
    else
        kill -0 "$1" && echo "$1 -"
    fi
}

lives() { # whether the process that FILE names is still that process
    [ -f "$1" ] && read -r pid began _ <"$1" && [ "$(identity "$pid")" = "$pid $began" ]
}

processes() { # "PID PARENT SESSION" of every process that is not dead
    if [ ! -r /proc/self/stat ]; then
        ps -A -o pid= -o ppid= -o pgid=
        return
    fi
    for entry in /proc/[0-9]*; do
        stat_of "${entry#/proc/}" || continue
        set -- $stat
        case $1 in Z | X) ;; *) echo "${entry#/proc/} $2 $4" ;; esac
    done
}

marked() { # the pids whose environment carries the mark of this start
    if printf 'a\0mark=b\0' | grep -qF mark=b; then
        set -- $(grep -lF "SANDSTORM_START=$id" /proc/[0-9]*/environ)
    else # a grep that stops at the first NUL
        set -- /proc/[0-9]*/environ
    fi
    for entry; do
        tr '\0' '\n' <"$entry" | grep -qxF "SANDSTORM_START=$id" || continue
        entry=${entry#/proc/}
        echo "${entry%/environ}"
    done
}

collect() { # sets `tree` to the pids of the program, what descends from it, its session, and what carries its mark
    tree=' ' session=none
    for pid in $(marked); do tree="$tree$pid "; done
    if [ -f "$dir/program" ] && read -r pid began <"$dir/program"; then
        now=$(identity "$pid")
        case $now in
        "$pid $began") tree="$tree$pid " session=$pid ;;
        '') session=$pid ;; # a session's number is not given away while it has members
        esac
    fi
    all=$(processes) grown=yes
    while [ -n "$grown" ]; do
        grown=''
        while read -r pid parent group; do
            case $tree in
            *" $pid "*) continue ;;
            *" $parent "*) ;;
            *) [ "$group" = "$session" ] || continue ;;
            esac
            tree="$tree$pid " grown=yes
        done <<END
$all
END
    done
}

stop_tree() { # stops all first, so that nothing forks away or reacts; then ends it
    rounds=0
    while [ $rounds -lt 50 ]; do
        rounds=$((rounds + 1))
        halted=' '
        while :; do
            collect
            fresh=''
            for pid in $tree; do
                case $halted in *" $pid "*) ;; *) kill -STOP "$pid"; fresh=yes halted="$halted$pid " ;; esac
            done
            [ -n "$fresh" ] || break
        done
        [ "$halted" != ' ' ] || return 0
        for pid in $halted; do kill -KILL "$pid"; done
        nap
    done
}

# --- state -----------------------------------------------------------------------------------------------------------

read_status() { # sets code, why, out, err; fails where there is none, or a torn one
    read -r code why out err sum _ <"$dir/status" && [ -n "$sum" ] && [ "$sum" = "$(echo "$code $why $out $err" | digest)" ]
}

look() { # sets `state`
    state=absent
    [ -d "$dir/gate" ] || return 0
    if [ -f "$dir/gate/burned" ]; then
        state=burned
    elif [ -f "$dir/gate/owner" ]; then
        state=started
        read_status && state="done" && return
        lives "$dir/gate/owner" && return
        # It may have written its status and ended between the two looks.
        if read_status; then state="done"; else state=lost; fi
    else
        state=locked
    fi
}

contended() { # whether one who may still win the gate, or has just won it, lives
    for entry in "$dir"/sup.*; do lives "$entry" && return 0; done
    return 1
}

settle() { # waits a moment for a gate that is being decided
    tries=0
    while look && case $state in absent | locked) contended ;; *) false ;; esac && [ $tries -lt 100 ]; do
        tries=$((tries + 1))
        nap
    done
    look # the last contender may have decided it between the two looks
}

needed() { lives "$dir/gate/owner" || lives "$dir/program"; }

report() { # the state, then which payload it is of or who burned it, the limit of its output, and the next piece of input
    hash=- limit=0 next=0
    [ -f "$dir/gate/owner" ] && read -r _ _ hash limit <"$dir/gate/owner"
    [ -f "$dir/gate/burned" ] && read -r hash <"$dir/gate/burned"
    while [ -e "$dir/in.$next" ]; do next=$((next + 1)); done
    if [ "$state" = "done" ]; then ended="$code $why $out $err"; else ended="- - - -"; fi
    echo "state $state $hash $limit $next $ended"
}

because() { printf '%-15s\n' "$1" 1<>"$dir/reason"; } # in place: a full disk cannot refuse it

# --- the supervisor: a session of its own, which lives as long as the program ----------------------------------------

copy() { # NAME BYTES: one stream into its file, and no more than the limit lets it
    (
        ulimit -f $(($2 / 512 + 1))
        exec cat <"$dir/$1.pipe" >"$dir/$1"
    )
    failed=$?
    : >"$dir/$1.end"
    [ $failed -ne 0 ] || return
    case $failed in
    153) because output-limit ;; # SIGXFSZ, which is 25 on Linux
    1) because disk-limit ;;
    *) because lost ;; # it was killed, and output with it
    esac
    stop_tree
}

watch() { # BYTES: the limit of both streams together
    while { sleep 0.2 || sleep 1; } && needed; do
        sizes
        if [ $((out + err)) -gt "$1" ]; then
            trap '' TERM
            because output-limit
            stop_tree
        fi
    done
}

timer() { # SECONDS: also ends the program when the supervisor is no more
    sleep "$1" &
    sleeper=$!
    trap 'kill $sleeper; exit' TERM
    wait $sleeper
    trap '' TERM # the supervisor ends its clock when the program is gone, and the tree may not be yet
    because deadline
    stop_tree
}

feed() { # pieces of input in their order, until `in.end`
    next=0
    while :; do
        if [ -f "$dir/in.$next" ]; then
            cat "$dir/in.$next"
            : >"$dir/in.$next"
            next=$((next + 1))
        elif [ -f "$dir/in.end" ]; then
            return
        else
            needed || return
            nap
        fi
    done
}

enter() { # CWD: called by the head before it exports anything, since a name of its own may be one of ours
    rm -f "$dir/head" "$dir/payload"
    umask "$before"
    export SANDSTORM_START="$id"
    sandstorm_session=$(command -v setsid)
    # A shell lets what it starts in the background ignore INT and QUIT; only `env` can undo it.
    sandstorm_signals=$(env --default-signal=INT true 2>/dev/null && command -v env)
    cd "$1" || { echo "cannot enter $1" >&2; exit 126; }
}

become() { # ARGV: called by the head at its end
    case $1 in *=*) sandstorm_signals='' ;; esac
    if [ -n "$sandstorm_signals" ]; then set -- "$sandstorm_signals" --default-signal=HUP,INT,QUIT -- "$@"; fi
    if [ -n "$sandstorm_session" ]; then set -- "$sandstorm_session" -- "$@"; fi
    unset sandstorm_session sandstorm_signals
    exec "$@"
}

drain() { # waits until the copiers have all; a daemon may hold the streams open, so silence is an end as well
    quiet=0 last=''
    while [ ! -e "$dir/stdout.end" ] || [ ! -e "$dir/stderr.end" ]; do
        sizes
        if [ "$last" = "$out $err" ]; then quiet=$((quiet + 1)); else quiet=0 last="$out $err"; fi
        [ $quiet -lt 50 ] || break
        nap
    done
    sizes
}

supervise() { # ID HASH HEAD SECONDS BYTES INPUT
    identity $$ >"$dir/sup.$$"
    mkdir "$dir/gate" || exit 0
    # Status and reason get their room now, so that a full disk cannot lose them.
    printf '%-160s\n' '' >"$dir/status"
    printf '%-15s\n' '' >"$dir/reason"
    echo "$(identity $$) $2 $5" >"$dir/owner"
    input=/dev/null
    mkfifo "$dir/stdout.pipe" "$dir/stderr.pipe" &&
        dd if="$dir/payload" bs="$3" count=1 of="$dir/head" && [ -s "$dir/head" ] || exit 1
    if [ "$6" != none ]; then
        input=$dir/stdin
        tail -c "+$(($3 + 1))" "$dir/payload" >"$dir/stdin" || exit 1
    fi
    if [ "$6" = open ]; then
        mv "$dir/stdin" "$dir/in.0" && mkfifo "$dir/stdin" || exit 1
    fi
    # From here on it counts as started: whoever finds the owner dead cannot know how far it came.
    mv "$dir/owner" "$dir/gate/owner" || exit 1
    copy stdout "$5" &
    copy stderr "$5" &
    if [ "$6" = open ]; then feed >"$dir/stdin" & fi
    feeder=${!:-}
    (exec <"$input" >"$dir/stdout.pipe" 2>"$dir/stderr.pipe" && . "$dir/head") &
    program=$!
    identity $program >"$dir/program"
    timer "$4" &
    clock=$!
    watch "$5" &
    eye=$!
    wait $program
    code=$?
    kill -TERM $clock $eye
    [ "$6" != open ] || kill -KILL "$feeder"
    read -r why _ <"$dir/reason"
    [ -z "$why" ] || stop_tree
    drain
    read -r why _ <"$dir/reason"
    # What came after the program had ended by itself did not end it.
    if [ $((out + err)) -gt "$5" ]; then why=output-limit; elif [ $code -le 128 ] && [ "${why#disk}" = "$why" ] && [ "$why" != lost ]; then why=''; fi
    [ "$why" != lost ] || exit 1
    line="$code ${why:-exited} $out $err"
    printf '%-160s\n' "$line $(echo "$line" | digest)" 1<>"$dir/status"
    rm -f "$dir/stdin" "$dir"/*.pipe "$dir/head" "$dir/payload"
}

# --- verbs -----------------------------------------------------------------------------------------------------------

install() { # ROOT TEXT
    missing=''
    set -- "$1-$(id -u)" "$2"
    mkdir -p "$1" && chmod 700 "$1" || missing="$1"
    file=$1/launcher-$(printf %s "$2" | digest).sh
    printf %s "$2" >"$file.$$" && mv "$file.$$" "$file" || missing="$1"
    set -- $(ls -ldn "$1")
    [ "$3" = "$(id -u)" ] || missing="a directory of its own"
    for tool in cat chmod cut dd grep id ls mkdir mkfifo mv rm sleep tail tr; do has $tool || missing="$missing $tool"; done
    has sha256sum || has cksum || missing="$missing sha256sum"
    has base64 || has od || missing="$missing base64"
    [ -r /proc/self/stat ] || has ps || missing="$missing /proc"
    echo "file $file"
    echo "hash $(if has sha256sum; then echo sha256; else echo cksum; fi)"
    echo "encoding $(if has base64; then echo base64; else echo od; fi)"
    echo "tree $(if [ -r /proc/self/environ ]; then echo full; else echo descendants; fi)"
    echo "session $(if has setsid; then echo own; else echo shared; fi)"
    echo "naps $(if sleep 0.01; then echo short; else echo long; fi)"
    echo "missing $missing"
}

stage() { # FILE HASH: renamed only when it is whole
    [ ! -f "$dir/payload" ] || return 0
    chmod 600 "$1" && [ "$(digest <"$1")" = "$2" ] && mv "$1" "$dir/payload"
}

start() { # FILE HASH HEAD SECONDS BYTES INPUT
    look
    if [ $state = absent ]; then
        mkdir -p "$dir"
        if stage "$1" "$2"; then
            if has setsid; then detach=setsid; elif has nohup; then detach="nohup"; else detach=''; fi
            (umask "$before" && exec $detach sh "$0" supervise "$id" "$2" "$3" "$4" "$5" "$6") </dev/null >/dev/null 2>&1 &
            name=$!
            while [ ! -s "$dir/sup.$name" ] && identity $name >/dev/null; do nap; done
            settle
        else
            look # another delivery may have used it up
            [ $state != absent ] || state=unstaged
        fi
    fi
    rm -f "$1"
    report
}

seal() { # WHO: written elsewhere first, so that whoever sees the file sees who it was
    echo "$1" >"$dir/burned.$$" && mv "$dir/burned.$$" "$dir/gate/burned"
}

burn() { # WHO
    mkdir -p "$dir"
    identity $$ >"$dir/sup.$$" # as one of those who contend for the gate, so that the others wait for what becomes of it
    if mkdir "$dir/gate"; then seal "$1"; fi
    rm -f "$dir/sup.$$"
    settle
    # All who wanted to start it are dead, and none came as far as the owner: nothing will ever start it.
    if [ $state = locked ] && ! contended && look && [ $state = locked ]; then
        seal "$1"
    fi
    look
    report
}

poll() { # OUT ERR BLOCKS
    look # before the output is read: what is `done` writes no more
    report
    [ -d "$dir/gate" ] || return 0
    piece stdout "$1" "$3"
    piece stderr "$2" "$3"
}

piece() { # NAME OFFSET BLOCKS: `dd` skips to a block, `tail` to the byte
    text=$(dd if="$dir/$1" bs=4096 skip=$(($2 / 4096)) count="$3" | tail -c "+$(($2 % 4096 + 1))" | encode)
    echo "$1 $2 ${#text}"
    echo "$text"
}

end() { # until the supervisor has written how it ended; again and again, since it may be just about to start
    tries=0
    while look && [ $tries -lt 100 ]; do
        case $state in started | locked) because killed ;; esac
        stop_tree
        case $state in started | locked) nap ;; *) break ;; esac
        tries=$((tries + 1))
    done
    report
}

send() { # NUMBER
    if lives "$dir/program"; then kill "-$1" "$pid"; fi
    look
    report
}

input() { # NUMBER FILE HASH: a piece that came before is not taken again
    if [ ! -e "$dir/in.$1" ] && [ "$1" = end ]; then
        : >"$dir/in.end"
    elif [ ! -e "$dir/in.$1" ] && [ "$(digest <"$2")" = "$3" ]; then
        mv "$2" "$dir/in.$1"
    fi
    rm -f "$2"
    look
    report
}

verb=$1
shift
if [ "$verb" = install ]; then answer install "$@"; exit; fi
id=$1
dir=${0%/*}/$id
if [ "$verb" = supervise ]; then supervise "$@"; exit; fi
shift
case $verb in
start | poll | burn | input) answer "$verb" "$@" ;;
kill) answer end ;;
signal) answer send "$@" ;;
esac
