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
# The whole job: distil and prune, prune, final distillation, save.
#
#   sbatch run.sh [conf/NAME.conf]      on SLURM, 4 GPUs of one node
#   bash run.sh [conf/NAME.conf]        anywhere else
#   bash run.sh --print [conf/NAME.conf]    show the commands, run nothing
#
# Every setting below can be set in the config file (lines NAME=VALUE) or in the environment, which
# wins:   gpus=1 accum_grad=4 bash run.sh conf/wavlm_base_plus.conf
#
# Call it again, with the same settings, whenever it was stopped: stages that are complete say so and end at once, and
# training continues from its newest checkpoint. On SLURM a job that is preempted, or comes within 300 s of its time
# limit, saves a checkpoint and goes back to the queue by itself (so give it much more than 300 s). The script ends with
# the status of the stage that stopped it: 143, 138 or 130 where SIGTERM, SIGUSR1 or Ctrl-C made training save and stop.
set -euo pipefail

# sbatch runs a copy of this script from its spool directory; the job was submitted from the checkout.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")}"

# name            default (the published experiment)
defaults=(
    python=python
    exp_dir=exp/hubert-base_sp0.75
    teacher_ckpt=pretrained/hubert-base-ls960.hf.pth
    tsv_dir=data/librispeech
    train_subset=train960
    seconds_per_batch=160
    num_workers=12
    min_seconds=2.0
    max_seconds=15.625
    max_crop_seconds=
    crop_lengths=
    distill_layers=0.4,8,12
    distill_mode=layer2layer
    l2_weight=0
    l1_weight=1
    cos_weight=1
    cos_type=raw
    weight_decay=0
    clip_norm=10
    pruning_units=conv,head,interm
    target_sparsity=0.75
    reg_learning_rate=0.02
    sparsity_warmup_updates=5000
    learning_rate=2e-4
    warmup_updates=15000
    max_updates=50000
    final_learning_rate=1e-4
    final_warmup_updates=5000
    final_max_updates=25000
    accelerator=auto
    gpus=4
    num_nodes="${SLURM_NNODES:-1}"
    accum_grad=1
    precision=16
    compile=false
    checkpoint_activations=false
    round_to=
    log_interval=50
    valid_interval=
    save_interval=500
    skip_nonfinite=0
    max_bad_files=1%
    seed=2022
)

fail() {
    echo "error: $*" >&2
    exit 1
}

# Sets NAME to VALUE unless the environment, or a call before this one, already has.
set_default() {
    [[ -v $1 ]] || printf -v "$1" '%s' "$2"
}

print_only=false
if [[ ${1-} == --print ]]; then
    print_only=true
    shift
fi
(($# <= 1)) || fail "expected at most one config file, found: $*"
if (($# == 1)); then
    [[ -f $1 ]] || fail "$1: no such config file; shipped ones: $(echo conf/*.conf)"
    while IFS= read -r line || [[ -n $line ]]; do
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        [[ $line =~ ^([a-z0-9_]+)=(.*)$ ]] || fail "$1: expected NAME=VALUE, found: $line"
        name=${BASH_REMATCH[1]}
        value=${BASH_REMATCH[2]}
        [[ " ${defaults[*]%%=*} " == *" $name "* ]] || fail "$1: unknown setting $name; known: ${defaults[*]%%=*}"
        set_default "$name" "$value"
    done <"$1"
fi
for entry in "${defaults[@]}"; do
    set_default "${entry%%=*}" "${entry#*=}"
done

# One process per GPU comes from srun inside a SLURM job; elsewhere Lightning starts them itself. srun also brings them
# SLURM's signals, and does not hand on the job's --cpus-per-task unless told to.
launcher=()
if [[ -n ${SLURM_JOB_ID-} ]]; then
    launcher=(
        srun --nodes="$num_nodes" --ntasks="$((gpus * num_nodes))" --ntasks-per-node="$gpus"
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1
    )
fi

shared=(
    --tsv_dir "$tsv_dir" --train_subset "$train_subset" --seconds_per_batch "$seconds_per_batch"
    --num_workers "$num_workers" --min_seconds "$min_seconds" --max_seconds "$max_seconds"
    --teacher_ckpt "$teacher_ckpt" --distill_layers "$distill_layers" --distill_mode "$distill_mode"
    --l2_weight "$l2_weight" --l1_weight "$l1_weight" --cos_weight "$cos_weight" --cos_type "$cos_type"
    --weight_decay "$weight_decay" --clip_norm "$clip_norm" --log_interval "$log_interval" --seed "$seed"
    --accelerator "$accelerator" --gpus "$gpus" --num_nodes "$num_nodes" --accum_grad "$accum_grad"
    --precision "$precision" --save_interval "$save_interval" --skip_nonfinite "$skip_nonfinite"
    --max_bad_files "$max_bad_files" --resume_checkpoint auto
)
[[ -n $max_crop_seconds ]] && shared+=(--max_crop_seconds "$max_crop_seconds")
[[ -n $crop_lengths ]] && shared+=(--crop_lengths "$crop_lengths")
[[ -n $valid_interval ]] && shared+=(--valid_interval "$valid_interval")
for name in compile checkpoint_activations; do
    [[ ${!name} =~ ^(true|false)$ ]] || fail "$name: expected true or false, found: ${!name}"
    [[ ${!name} == true ]] && shared+=("--$name")
done

# What SLURM 22.05 does (measured with tests/slurm/cluster.sh). The warning before the time limit, and `scancel
# --signal=USR1`, reach the processes of srun alone. The end of a job (time limit, scancel, scontrol requeue, preemption
# without a grace time) sends SIGTERM to them, to srun and to this script, and SIGKILL after KillWait. Preemption with a
# grace time sends SIGTERM to the processes of srun alone first, and a job that ends within that time counts as ended.

stage_process=
signals=0
stopped_by=

# Passes a signal on to the stage. Not Ctrl-C, which the terminal sends to the stage as well, and not SIGTERM to srun,
# which would kill its processes before they can save, and which SLURM has sent to them itself.
on_signal() {
    signals=$((signals + 1))
    stopped_by=$1
    if [[ -n $stage_process && $1 != INT && ($1 != TERM || -z ${SLURM_JOB_ID-}) ]]; then
        kill -s "$1" "$stage_process" 2>/dev/null || true
    fi
}
trap 'on_signal TERM' TERM
trap 'on_signal USR1' USR1
trap 'on_signal INT' INT

# wait, which a signal interrupts, until the process has really ended; its status.
wait_for() {
    local before status
    while true; do
        before=$signals
        wait "$1" && status=0 || status=$?
        ((signals > before)) || return "$status"
    done
}

# Ends the script, and puts its job back into the queue where SLURM, not the user, stopped it: preemption in the grace
# time, the time limit, and its warning, which training answers itself unless it came while a stage was starting.
# SIGTERM to this script otherwise means scancel, or that SLURM requeues the job itself.
leave() {
    local status=$1 job=${SLURM_JOB_ID-} state
    [[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if [[ -n $job ]] && ((status == 143 || status == 138)); then
        state=$(scontrol show job "$job" 2>/dev/null) || true
        if [[ $state == *Reason=TimeLimit* || ($stopped_by != TERM && ($status == 138 || $state == *PreemptTime=2*)) ]]
        then
            scontrol requeue "$job" 2>/dev/null && echo "job $job goes back to the queue"
        fi
    fi
    exit "$status"
}

# Runs one stage and keeps its output in EXP_DIR/NAME.log; if it fails, its status becomes the script's.
stage() {
    local name=$1 output tee status=0
    shift
    printf '+ %s\n' "${*@Q}"
    $print_only && return
    [[ -z $stopped_by ]] || leave $((128 + $(kill -l "$stopped_by")))
    mkdir -p "$exp_dir"
    # Both run in the background, where bash can pass signals on. tee outlives them, to show what the stage says last.
    exec {output}> >(
        trap '' INT TERM USR1
        exec tee -a "$exp_dir/$name.log"
    )
    tee=$!
    (
        trap - INT
        exec "$@"
    ) >&"$output" 2>&1 &
    stage_process=$!
    exec {output}>&-
    wait_for "$stage_process" || status=$?
    stage_process=
    wait_for "$tee" || true
    ((status == 0)) || leave "$status"
}

stage distill "${launcher[@]}" "$python" distill.py "${shared[@]}" \
    --student_ckpt "$teacher_ckpt" --exp_dir "$exp_dir" --pruning_units "$pruning_units" \
    --target_sparsity "$target_sparsity" --reg_learning_rate "$reg_learning_rate" \
    --sparsity_warmup_updates "$sparsity_warmup_updates" ${round_to:+--round_to "$round_to"} \
    --learning_rate "$learning_rate" --warmup_updates "$warmup_updates" --max_updates "$max_updates"

stage prune "$python" prune.py --distilled_ckpt "$exp_dir/ckpts/last.ckpt" --original_ckpt "$teacher_ckpt"

stage final_distill "${launcher[@]}" "$python" final_distill.py "${shared[@]}" \
    --student_ckpt "$exp_dir/ckpts/pruned_hubert_base.pth" --exp_dir "$exp_dir/final" \
    --learning_rate "$final_learning_rate" --warmup_updates "$final_warmup_updates" --max_updates "$final_max_updates"

stage save "$python" save_final_ckpt.py --config_path "$exp_dir/ckpts/pruned_hubert_base.pth" \
    --ckpt_after_final_distill "$exp_dir/final/ckpts/last.ckpt"

$print_only || echo "the compressed model: $exp_dir/final/ckpts/pruned_hubert_base.pth"
