# Jobs side by side: sourced by the scripts here, which set dry_run, OUT, jobs (how many go on at once) and done (how many
# were complete before). A job is a function's name and its words; its log is OUT/logs/WORD-WORD.log.

fail() {
    echo "error: $*" >&2
    exit 1
}

# Shows a command, and runs it, if it is to be run at all. Where this script is stopped, so is the command, by SIGTERM,
# after which a training saves a checkpoint.
child=''
call() {
    local word line='+'
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./,:=+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "$line"
    if ! $dry_run; then
        "$@" &
        child=$!
        wait "$child"
    fi
}

declare -A names=() logs=() begun=() # by process
failed=() done=0

# Starts a job in the background: run NAME NAME SEED, or another function.
start() {
    local name=$1 log=$OUT/logs/$1.log
    if [[ $1 == run ]]; then
        name="$2 $3 seed $4" log=$OUT/logs/$2-$3-$4.log
    fi
    if $dry_run; then
        "$@"
        return
    fi
    while ((${#names[@]} >= jobs)); do finish; done
    (
        trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 143' TERM
        "$@"
    ) >>"$log" 2>&1 &
    names[$!]=$name logs[$!]=$log begun[$!]=$SECONDS
}

# Waits until a job has ended, and says how it went.
finish() {
    local pid status took
    wait -n || true
    for pid in "${!names[@]}"; do
        ! kill -0 "$pid" 2>/dev/null || continue
        status=0 done=$((done + 1)) took="$(((SECONDS - begun[$pid] + 30) / 60)) min"
        wait "$pid" || status=$?
        if ((status)); then
            failed+=("${names[$pid]}")
            echo "$done/$total ${names[$pid]}: failed after $took with status $status, see ${logs[$pid]}"
        else
            echo "$done/$total ${names[$pid]}: done in $took"
        fi
        unset "names[$pid]"
    done
}

# Runs the jobs of the array plan, each a line of words, and waits for all.
run_plan() {
    local job
    total=$((done + ${#plan[@]}))
    ((!done)) || echo "$done/$total are complete"
    # shellcheck disable=SC2086 # jobs are words
    for job in "${plan[@]}"; do start $job; done
    while ((${#names[@]})); do finish; done
}

# Ends with an error that names the jobs that failed, if any did.
check_failed() {
    if ((${#failed[@]})); then
        printf 'failed: %s\n' "${failed[@]}" >&2
        exit 1
    fi
}

# Ends all that is running; trainings save a checkpoint first.
stop() {
    trap '' INT TERM
    kill -TERM $child "${!names[@]}" 2>/dev/null || true
    wait
    echo "stopped; call it again to continue" >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
