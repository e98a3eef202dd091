#!/usr/bin/env bash
#SBATCH --job-name=dphubert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=dphubert-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
#
# Convert the teacher and list the speech where they are not there yet; distil and prune, prune, final distillation,
# save, report; with make_student, finetune_first or finetune in the config file, a student of another shape before
# them, and fine-tuning with labels before or after them.
#
#   sbatch run.sh [conf/NAME.conf] [FLAGS]          on SLURM, 4 GPUs of one node: one process for each task
#   bash run.sh [conf/NAME.conf] [FLAGS]            anywhere else
#   bash run.sh --print [conf/NAME.conf] [FLAGS]    show the commands, run nothing
#   bash run.sh --check [conf/NAME.conf] [FLAGS]    say what would stop the job, train nothing
#   data=/corpora/mine model=facebook/hubert-base-ls960 bash run.sh ...    from a folder of speech and a name
#
# FLAGS (such as --gpus 1 --accum_grad 4) go to all training stages and win over the config file's. That is bash, and
# sets the settings below; the environment wins over it for the first eight. With --save_at_sparsity S,... in `distill`,
# exp_dir/sparsity_S is finished as exp_dir is, for each S.
#
# Call it again with the same settings whenever it was stopped: it continues. On SLURM a job that is preempted, or comes
# within 300 s of its time limit (give it much more), saves a checkpoint and goes back to the queue by itself. The
# status is that of the stage that stopped it: 143, 138 or 130 where SIGTERM, SIGUSR1 or Ctrl-C made training stop.
set -euo pipefail

# sbatch runs a copy of this script from its spool directory; the job was submitted from the checkout.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")}"

fail() { echo "error: $*" >&2 && exit 1; }

print_only=false check_only=false conf=conf/hubert_base.conf
case ${1-} in --print) print_only=true && shift ;; --check) check_only=true && shift ;; esac
if [[ ${1---} != --* ]]; then conf=$1 && shift; fi
[[ -f $conf ]] || fail "$conf: no such config file; shipped ones: $(echo conf/*.conf)"
for flag in "$@"; do
    [[ ! $flag =~ ^--(exp_dir|tsv_dir|teacher_ckpt|student_ckpt)(=|$) ]] ||
        fail "$flag: all stages would take it; set ${BASH_REMATCH[1]}=... in the config file or before the command"
    [[ ! $flag =~ ^--(gpus|num_nodes)(=|$) || -z ${SLURM_JOB_ID-} ]] ||
        fail "$flag: in a SLURM job the allocation says it; use sbatch --nodes, --ntasks-per-node and --gpus-per-node"
done

environment=$(declare -p python exp_dir tsv_dir teacher_ckpt student_ckpt model data valid_fraction 2>/dev/null) || true
python=python exp_dir=''
tsv_dir=''        # the manifests; of a `data` in the environment: data/NAME
teacher_ckpt=''   # the teacher; of a `model` in the environment: pretrained/NAME.pth
student_ckpt=''   # default: the teacher
model=''          # what teacher_ckpt is converted from: a name on the hub, a folder or a fairseq file
data=''           # the folder of speech, or an array of them, that tsv_dir lists
valid_fraction='' # share of `data` held out for validation (default: LibriSpeech's dev sets, elsewhere 0.05)
prunes=true       # false: the student is trained in the final distillation alone
distills_on=true  # false: the pruned model is not distilled further
shared=()         # flags of both distillations
distill=()        # flags of distill.py
final=()          # flags of final_distill.py
make_student=()   # flags of make_student.py, which makes the student from student_ckpt
finetune_first=() # flags of finetune.py, which makes teacher and student from teacher_ckpt
finetune=()       # flags of finetune.py for the compressed model
known=$(compgen -v)
if LC_ALL=C grep -q -e $'\r$' -e $'^\xef\xbb\xbf' "$conf"; then # from an editor on Windows
    source <(LC_ALL=C sed $'1s/^\xef\xbb\xbf//; s/\r$//' "$conf")
else
    source "$(realpath "$conf")"
fi
unknown=$(compgen -v | grep -vxF -e known -e _ -e PIPESTATUS -f <(echo "$known")) && fail "$conf: unknown:" $unknown
conf_model=$model
eval "$environment"
[[ "$exp_dir$tsv_dir$teacher_ckpt$student_ckpt${shared[*]}${distill[*]}${final[*]}" != *$'\r'* ]] ||
    fail "$conf: a file that it sources has line ends of Windows, expected those of Unix: sed -i 's/\r$//' FILE"
is_given() { [[ $environment == *" $1="* ]]; }
# What comes from the environment must not meet what the config file has for another model, or other speech.
if is_given teacher_ckpt; then
    is_given model || model=''
elif [[ $model != "$conf_model" ]]; then
    teacher_ckpt=pretrained/$(basename "$model").pth
fi
if is_given tsv_dir; then
    is_given data || data=''
elif is_given data; then
    tsv_dir=$(basename "$data") && tsv_dir=data/${tsv_dir,,}
fi
: "${exp_dir:?$conf does not set it}"
[[ " ${shared[*]} ${distill[*]} ${final[*]}" == *" --task_tsv"* ]] || : "${tsv_dir:?$conf does not set it}"
: "${teacher_ckpt:?$conf does not set it}"
[[ "$prunes $distills_on" =~ ^(true (true|false)|false true)$ ]] ||
    fail "$conf: expected true or false, and one of them true, found prunes=$prunes distills_on=$distills_on"

# One process per GPU comes from srun inside a SLURM job; elsewhere Lightning starts them itself. srun also brings them
# SLURM's signals, and does not hand on the job's --cpus-per-task unless told to.
launcher=() allocated=()
if [[ -n ${SLURM_JOB_ID-} ]]; then
    nodes=${SLURM_NNODES:-1} tasks=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-1} / ${SLURM_NNODES:-1}))}
    launcher=(
        srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks"
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1
    )
    allocated=(--gpus "$tasks" --num_nodes "$nodes")
fi

# The teacher and the manifests are made where they are missing.
convert=() list=() subset=()
if [[ -n $model && ! -f $teacher_ckpt ]]; then
    convert=(convert_hubert_from_hf.py --model "$model" --out "$teacher_ckpt")
    [[ ! -f $model ]] || convert=(convert_wavlm_from_fairseq.py --ckpt "$model" --out "$teacher_ckpt")
fi
if [[ -n ${data[*]} ]]; then
    list=(prepare_data.py --data "${data[@]}" --out "$tsv_dir")
    has() { [[ -n $(find -L "${data[@]}" -maxdepth 2 -type d -name "$1" -print -quit 2>/dev/null) ]]; }
    if [[ -n $valid_fraction ]] || ! has 'train-*-?00' || ! has 'dev-*'; then # not LibriSpeech
        list+=(--valid_fraction "${valid_fraction:-0.05}") subset=(--train_subset train)
    fi
    if [[ -f $tsv_dir/valid.tsv ]]; then # written last
        root=$(head -n 1 "$tsv_dir/valid.tsv") list=()
        [[ $(realpath -s "$data")/ == "${root%/}"/* ]] || fail "tsv_dir=$tsv_dir lists $root, not data=$data; set another"
    fi
fi

always=("${allocated[@]}" --resume_checkpoint auto "$@") # flags of every training
if ((${#finetune_first[@]})); then
    finetune_first+=(--model "$teacher_ckpt" --exp_dir "$exp_dir/teacher" "${always[@]}")
    teacher_ckpt=$exp_dir/teacher/finetuned.pth student_ckpt=$teacher_ckpt
fi
student_ckpt=${student_ckpt:-$teacher_ckpt}
if ((${#make_student[@]})); then
    make_student+=(--model "$student_ckpt" --exp_dir "$exp_dir/student")
    student_ckpt=$exp_dir/student/student.pth
    # A student that streams starts with statistics of speech. Without a new extractor nothing is trained.
    if [[ " ${make_student[*]}" =~ " --"(extractor|streaming) ]]; then
        make_student+=(${tsv_dir:+--tsv_dir "$tsv_dir"} "${subset[@]}")
    fi
    [[ " ${make_student[*]}" != *" --extractor"* ]] || make_student+=("${always[@]}")
fi
((!${#finetune[@]})) || finetune+=("${always[@]}")
shared+=(${tsv_dir:+--tsv_dir "$tsv_dir"} "${subset[@]}" --teacher_ckpt "$teacher_ckpt")
distill=("${shared[@]}" "${distill[@]}" --student_ckpt "$student_ckpt" --exp_dir "$exp_dir" "${always[@]}")
final=("${shared[@]}" "${final[@]}" "${always[@]}")

# Joint training leaves its end to be finished, and the sizes that it saves on its way.
folders=("$exp_dir")
if $prunes && [[ " ${distill[*]}" =~ .*\ --save_at_sparsity[=\ ]([^\ ]+) ]]; then # the last one counts
    IFS=, read -ra sizes <<<"${BASH_REMATCH[1]}"
    for size in "${sizes[@]}"; do folders+=("$exp_dir/sparsity_$size"); done
fi

# SLURM 22.05 behaves like this (measured with tests/slurm/cluster.sh). The warning before the time limit, and `scancel
# --signal=USR1`, reach the processes of srun alone. The end of a job (time limit, scancel, scontrol requeue, preemption
# without a grace time) sends SIGTERM to them, to srun and to this script, and SIGKILL after KillWait. Preemption with a
# grace time sends SIGTERM to the processes of srun alone first, and a job that ends within that time counts as ended.
stage_process='' signals=0 stopped_by='' checked=0

# Passes a signal on to the stage. Not Ctrl-C, which the terminal sends to the stage as well, and not SIGTERM to srun,
# which would kill its processes before they can save, and which SLURM has sent to them itself.
on_signal() {
    signals=$((signals + 1)) stopped_by=$1
    if [[ -n $stage_process && $1 != INT && ($1 != TERM || -z ${SLURM_JOB_ID-}) ]]; then
        kill -s "$1" "$stage_process" 2>/dev/null || true
    fi
}
for name in TERM USR1 INT; do trap "on_signal $name" "$name"; done

# Waits, again after each signal, until a process has ended; returns its status.
wait_for() {
    local before=-1 status=0
    while ((signals > before)); do
        before=$signals status=0
        wait "$1" || status=$?
    done
    return "$status"
}

# Shows a stage, or runs it and keeps its output in EXP_DIR/NAME.log; returns its status.
stage() {
    local name=$1 output tee status=0
    shift
    printf '+ %s\n' "${*@Q}"
    ! $print_only || return 0
    [[ -z $stopped_by ]] || return $((128 + $(kill -l "$stopped_by")))
    mkdir -p "$exp_dir"
    # Both run in the background, where bash can pass signals on. tee outlives the stage, to show its last words.
    exec {output}> >(trap '' INT TERM USR1 && exec tee -a "$exp_dir/$name.log")
    tee=$!
    (trap - INT && exec "$@") >&"$output" 2>&1 &
    stage_process=$!
    exec {output}>&-
    wait_for "$stage_process" || status=$?
    stage_process=''
    wait_for "$tee" || true
    return "$status"
}

# Ends the script, and puts its job back into the queue where SLURM, not the user, stopped it: preemption in the grace
# time, the time limit, and its warning, which training answers itself unless it came while a stage was starting.
# SIGTERM to this script otherwise means scancel, or that SLURM requeues the job itself.
leave() {
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} state
    job=${job:-${SLURM_JOB_ID-}}
    if [[ -n $job && $1 =~ ^(138|143)$ ]]; then
        state=$(scontrol show job "$job" 2>/dev/null) || true
        if [[ $state == *Reason=TimeLimit* || ($stopped_by != TERM && ($1 == 138 || $state == *PreemptTime=2*)) ]]; then
            scontrol requeue "$job" 2>/dev/null && echo "job $job goes back to the queue"
        fi
    fi
    exit "$1"
}

must() { stage "$@" || leave $?; }

# Runs a script of one process, from what training has made.
make() { $check_only || must "$1" "$python" "${@:2}"; }

# Runs a training with a process for each GPU, or only its check, which waits for what an earlier stage makes.
train() {
    local word before='' is_there=true
    if $print_only || ! $check_only; then
        must "$1" "${launcher[@]}" "$python" "${@:2}"
        return
    fi
    for word in "${@:2}"; do
        [[ ! $before =~ ^--(student_ckpt|model)$ || -e $word || $word != "$exp_dir"/* ]] || is_there=false
        before=$word
    done
    $is_there || return 0
    (trap - INT && exec "$python" "${@:2}" --check) &
    stage_process=$!
    wait_for "$stage_process" || checked=1
    [[ -z $stopped_by ]] || leave $((128 + $(kill -l "$stopped_by")))
}

# Runs all stages, or shows them.
job() {
    local exp_dir=$exp_dir compressed # a stage's log goes to exp_dir
    ((!${#convert[@]})) || must convert "$python" "${convert[@]}"
    ((!${#list[@]})) || must data "$python" "${list[@]}"
    ((!${#finetune_first[@]})) || train finetune_first finetune.py "${finetune_first[@]}"
    ((!${#make_student[@]})) || train student make_student.py "${make_student[@]}"
    ! $prunes || train distill distill.py "${distill[@]}"
    for exp_dir in "${folders[@]}"; do
        compressed=$student_ckpt
        if $prunes; then
            make prune prune.py --distilled_ckpt "$exp_dir/ckpts/last.ckpt" --original_ckpt "$student_ckpt"
            compressed=$exp_dir/ckpts/pruned_hubert_base.pth
        fi
        if $distills_on; then
            train final_distill final_distill.py "${final[@]}" --student_ckpt "$compressed" --exp_dir "$exp_dir/final"
            make save save_final_ckpt.py --ckpt_after_final_distill "$exp_dir/final/ckpts/last.ckpt"
            compressed=$exp_dir/final/ckpts/pruned_hubert_base.pth
        fi
        if ((${#finetune[@]})); then
            train finetune finetune.py --model "$compressed" "${finetune[@]}" --exp_dir "$exp_dir/finetuned"
            compressed=$exp_dir/finetuned/finetuned.pth
        fi
        ! $check_only || continue
        stage report "$python" -m report "$exp_dir" || echo "warning: no report, see $exp_dir/report.log" >&2
        $print_only || echo "the compressed model: $compressed"
    done
}

# A wrong flag of a later stage, or a list of labels that cannot be read, must not wait for the end of the first stage.
check='
import importlib, shlex, sys, cli
from labels.lists import read_probe
for words in map(shlex.split, sys.stdin):
    for script in {"make_student.py", "distill.py", "final_distill.py", "finetune.py"} & set(words):
        sys.argv = words[words.index(script) :]
        args = importlib.import_module(script.removesuffix(".py")).parse_args()
        if script == "finetune.py":
            cli.run(lambda args: read_probe(args.tsv), args)
'
$print_only || (print_only=true && job) | "$python" -c "$check"
job
exit $checked
