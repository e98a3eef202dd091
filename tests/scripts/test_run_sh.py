"""run.sh: its settings, the commands it makes of them, and what it does with signals and with SLURM."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY, run_command

pytestmark = pytest.mark.slow


def all_commands(*arguments: object, **environment: object) -> list[list[str]]:
    """The commands that run.sh would run, as words."""
    result = run_command("bash", "run.sh", "--print", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line)[1:] for line in result.stdout.splitlines()]


def commands(*arguments: object, **environment: object) -> list[list[str]]:
    """Those behind the teacher and the manifests, which this machine may have or not."""
    preparations = ("convert_hubert_from_hf.py", "convert_wavlm_from_fairseq.py", "prepare_data.py")
    return [command for command in all_commands(*arguments, **environment) if command[1] not in preparations]


def value(command: list[str], flag: str) -> str:
    """The value of a flag as argparse reads it: the last one counts."""
    return command[len(command) - command[::-1].index(flag)]


@pytest.mark.parametrize("config", sorted(path.name for path in (REPOSITORY / "conf").glob("*.conf")))
def test_every_shipped_config_gives_commands_that_parse(config, monkeypatch):
    *stages, report = commands(f"conf/{config}")
    text = (REPOSITORY / "conf" / config).read_text()
    prunes, finetunes = "prunes=false" not in text, "\nfinetune=(" in text
    scripts = ["finetune.py"] if "finetune_first=" in text else []
    scripts += ["make_student.py"] if "\nmake_student=(" in text else []
    scripts += ["distill.py", "prune.py"] if prunes else []
    scripts += ["final_distill.py", "save_final_ckpt.py"] if "distills_on=false" not in text else []
    scripts += ["finetune.py"] if finetunes else []
    assert [command[1] for command in stages] == scripts
    for command in stages:
        monkeypatch.setattr(sys, "argv", command[1:])
        importlib.import_module(command[1].removesuffix(".py")).parse_args()
    exp_dir = re.sub("/(final|teacher|student)$", "", value(stages[0], "--exp_dir"))
    assert report[1:] == ["-m", "report", exp_dir]


def test_defaults_are_the_published_experiment():
    distill, _, final, *_ = commands()
    for command, expected in (
        (distill, {"learning_rate": "2e-4", "warmup_updates": "15000", "max_updates": "50000", "gpus": "4"}),
        (distill, {"target_sparsity": "0.75", "reg_learning_rate": "0.02", "sparsity_warmup_updates": "5000"}),
        (distill, {"seconds_per_batch": "160", "num_workers": "12", "precision": "16", "train_subset": "train960"}),
        (distill, {"pruning_units": "conv,head,interm", "distill_layers": "0.4,8,12", "clip_norm": "10"}),
        (final, {"learning_rate": "1e-4", "warmup_updates": "5000", "max_updates": "25000", "precision": "16"}),
    ):
        assert {name: value(command, f"--{name}") for name in expected} == expected


def test_config_environment_and_flags(tmp_path):
    """A variant of a config; the environment wins over its paths, flags over its flags."""
    config = tmp_path / "mine.conf"
    config.write_text(
        "source conf/demo.conf\nexp_dir=from/config\nstudent_ckpt='my student.pth'\n"
        "shared+=(--precision bf16)\ndistill+=(--reg_learning_rate 1 --max_updates 7)\n"
    )
    distill, prune, final, _, _ = commands(config, "--compile", "--accum_grad", 4, tsv_dir="mine", exp_dir="my exp")
    for command, exp_dir in ((distill, "my exp"), (final, "my exp/final")):
        assert value(command, "--exp_dir") == exp_dir and value(command, "--tsv_dir") == "mine"
        assert value(command, "--precision") == "bf16" and value(command, "--accum_grad") == "4"
        assert value(command, "--teacher_ckpt") == "demo/out/mini-hubert.pth" and "--compile" in command
        assert value(command, "--resume_checkpoint") == "auto"
    assert value(distill, "--max_updates") == "7" and value(final, "--max_updates") == "200"
    assert "--reg_learning_rate" in distill and "--reg_learning_rate" not in final
    assert value(distill, "--student_ckpt") == value(prune, "--original_ckpt") == "my student.pth"
    assert value(final, "--student_ckpt") == "my exp/ckpts/pruned_hubert_base.pth"
    assert value(commands(config, teacher_ckpt="other.pth")[0], "--teacher_ckpt") == "other.pth"
    distill, prune, *_ = commands(teacher_ckpt="other.pth")
    assert value(distill, "--student_ckpt") == value(prune, "--original_ckpt") == "other.pth"


def test_teacher_and_manifests_are_made_where_they_are_missing(tmp_path, corpus, manifests, small_teacher):
    speech, lists = tmp_path / "My Speech", tmp_path / "lists"
    speech.mkdir()
    given = {"model": "me/large", "data": speech}
    convert, data, distill, *_, final, _, _ = all_commands("conf/wavlm_base_plus.conf", **given)
    # Named for what they are made from, not for what the config file has.
    assert convert[1:] == ["convert_hubert_from_hf.py", "--model", "me/large", "--out", "pretrained/large.pth"]
    assert data[1:] == ["prepare_data.py", "--data", str(speech), "--out", "data/my speech", "--valid_fraction", "0.05"]
    for command in (distill, final):
        assert (
            value(command, "--teacher_ckpt") == "pretrained/large.pth" and value(command, "--train_subset") == "train"
        )
        assert value(command, "--tsv_dir") == "data/my speech"
    assert value(all_commands("--train_subset", "mine", **given)[2], "--train_subset") == "mine"
    # LibriSpeech has splits; the user's names count; a fairseq file has a converter of its own.
    (tmp_path / "model.pt").touch()
    files = {"teacher_ckpt": tmp_path / "teacher.pth", "tsv_dir": lists}
    convert, data, distill, *_ = all_commands(model=tmp_path / "model.pt", data=corpus, **files)
    assert convert[1:4] == ["convert_wavlm_from_fairseq.py", "--ckpt", str(tmp_path / "model.pt")]
    assert data[2:] == ["--data", str(corpus), "--out", str(lists)]
    assert value(distill, "--train_subset") == "train960" and value(distill, "--tsv_dir") == str(lists)
    assert value(all_commands(valid_fraction=0.2, data=corpus, **files)[0], "--valid_fraction") == "0.2"
    # What is there is not made again, and not taken for other speech.
    files = {"teacher_ckpt": small_teacher, "tsv_dir": manifests}
    assert all_commands(model="me/large", data=corpus, **files)[0][1] == "distill.py"
    result = run_command("bash", "run.sh", "--print", data=speech, **files)
    assert result.returncode == 1 and f"tsv_dir={manifests} lists {corpus}, not data={speech}" in result.stderr
    # A teacher or manifests of the user's have nothing to do with the config file's model and data.
    config = tmp_path / "mine.conf"
    config.write_text(f"source conf/hubert_base.conf\ndata='{speech}'\n")
    assert all_commands(config, teacher_ckpt="a.pth", tsv_dir="b")[0][1] == "distill.py"


def test_check_before_hours_of_training(tmp_path, corpus, small_teacher):
    """It makes teacher and manifests, says what the training needs and what would stop it, and trains nothing."""
    config, exp_dir = tmp_path / "tiny.conf", tmp_path / "exp"
    config.write_text(
        f"exp_dir={exp_dir} tsv_dir={tmp_path}/lists teacher_ckpt={small_teacher} data={corpus}\n"
        "shared=(--train_subset train100 --seconds_per_batch 4 --max_crop_seconds 0.2 --distill_layers 0.1,3)\n"
        "distill=(--max_updates 100 --warmup_updates 2 --pruning_units conv,head,interm)\n"
        "final=(--max_updates 9 --warmup_updates 2)\n"
    )

    def check(*flags: object, **environment: object) -> tuple[int, str]:
        result = run_command("bash", "run.sh", "--check", config, "--accelerator", "cpu", *flags, **environment)
        assert not (exp_dir / "ckpts").exists() and "Traceback" not in result.stderr
        return result.returncode, result.stdout + result.stderr

    status, output = check()
    assert status == 0 and (tmp_path / "lists/train100.tsv").is_file()
    assert "data: train100 has 16 utterances" in output and "100 updates are " in output
    assert "target: without 0.75 of the teacher's parameters, of which the masks can remove 0." in output
    assert "GB for checkpoints" in output and "memory: about" in output and "warning" not in output
    for flags, environment, message in (
        ([], {"teacher_ckpt": "gone.pth"}, "gone.pth"),
        ([], {"tsv_dir": tmp_path}, "train100.tsv"),
        (["--min_seconds", 9], {}, "limits"),
        (["--distill_layers", "0.1,7"], {}, "layer 7"),
    ):
        status, output = check(*flags, **environment)
        assert status and message in output
    config.write_text(config.read_text() + "distill+=(--target_sparsity 0.999)\n")
    status, output = check()
    assert status == 1 and "error: --target_sparsity 0.999: pruning conv,head,interm removes at most" in output


@pytest.mark.parametrize("flag", ["--save_at_sparsity 0.3,0.55", "--save_at_sparsity=0.3,0.55"])
def test_every_size_of_a_run_is_finished(tmp_path, flag):
    """Each is finished as the run's end is, with the same flags, in a folder of its own."""
    config = tmp_path / "sizes.conf"
    config.write_text(f"source conf/demo.conf\nexp_dir='my exp'\ndistill+=({flag})\n")
    distill, *stages = commands(config, "--seed", 5)
    assert flag.replace("=", " ") in " ".join(distill).replace("=", " ") and len(stages) == 3 * 4
    for index, exp_dir in enumerate(("my exp", "my exp/sparsity_0.3", "my exp/sparsity_0.55")):
        prune, final, save, report = stages[4 * index : 4 * index + 4]
        assert value(prune, "--distilled_ckpt") == f"{exp_dir}/ckpts/last.ckpt"
        assert value(prune, "--original_ckpt") == value(distill, "--student_ckpt")
        assert value(final, "--student_ckpt") == f"{exp_dir}/ckpts/pruned_hubert_base.pth"
        assert value(final, "--exp_dir") == f"{exp_dir}/final" and value(final, "--seed") == "5"
        assert value(final, "--max_updates") == "200" and flag not in " ".join(final)
        assert value(save, "--ckpt_after_final_distill") == f"{exp_dir}/final/ckpts/last.ckpt"
        assert report[1:] == ["-m", "report", exp_dir]


def test_without_pruning(tmp_path):
    """One training, of the student that the config names."""
    config = tmp_path / "smaller.conf"
    config.write_text("source conf/demo.conf\nprunes=false\ndistill+=(--save_at_sparsity 0.5)\nfinal+=(--seed 4)\n")
    final, save, report = commands(config, "--accum_grad", 2, exp_dir="exp", student_ckpt="student.pth")
    assert final[1] == "final_distill.py" and value(final, "--seed") == "4" and value(final, "--accum_grad") == "2"
    assert value(final, "--student_ckpt") == "student.pth" and value(final, "--exp_dir") == "exp/final"
    assert save[1:] == ["save_final_ckpt.py", "--ckpt_after_final_distill", "exp/final/ckpts/last.ckpt"]
    assert report[1:] == ["-m", "report", "exp"]
    assert value(commands(config)[0], "--student_ckpt") == "demo/out/mini-hubert.pth"


def test_a_student_is_made_first(tmp_path):
    """It starts from student_ckpt, or the teacher; only an extractor's training takes the flags of trainings."""
    config = tmp_path / "student.conf"
    config.write_text("source conf/demo.conf\nmake_student=(--init_layers 1,2)\n")
    make, distill, prune, *_ = commands(config, "--seed", 5, exp_dir="exp")
    made = "exp/student/student.pth"
    model = "demo/out/mini-hubert.pth"
    assert make[1:] == ["make_student.py", "--init_layers", "1,2", "--model", model, "--exp_dir", "exp/student"]
    assert value(distill, "--student_ckpt") == value(prune, "--original_ckpt") == made
    assert value(distill, "--teacher_ckpt") == model
    config.write_text("source conf/demo.conf\nprunes=false\nmake_student=(--extractor=light)\n")
    make, final, *_ = commands(config, "--seed", 5, exp_dir="exp", student_ckpt="other.pth")
    assert value(make, "--model") == "other.pth" and value(final, "--student_ckpt") == made
    assert value(make, "--tsv_dir") == "demo/out/data" and value(make, "--seed") == "5"
    assert value(make, "--resume_checkpoint") == "auto"


def test_fine_tuning_before_and_after(tmp_path):
    """The first one's result is teacher and student after it; flags behind the config go to all trainings."""
    config = tmp_path / "task.conf"
    first, last = "finetune_first=(--tsv a.tsv --max_updates 3)", "finetune=(--tsv b.tsv --max_updates 4)"
    config.write_text(f"source conf/demo.conf\n{first}\n{last}\ndistill+=(--save_at_sparsity 0.5)\n")
    begin, distill, *stages = commands(config, "--seed", 5, exp_dir="exp", student_ckpt="student.pth")
    assert begin[1] == "finetune.py" and value(begin, "--tsv") == "a.tsv" and value(begin, "--exp_dir") == "exp/teacher"
    assert value(begin, "--model") == "demo/out/mini-hubert.pth" and "--tsv_dir" not in begin
    tuned = "exp/teacher/finetuned.pth"
    assert value(distill, "--teacher_ckpt") == value(distill, "--student_ckpt") == tuned and len(stages) == 2 * 5
    for index, folder in enumerate(("exp", "exp/sparsity_0.5")):
        prune, final, save, finetune, report = stages[5 * index : 5 * index + 5]
        assert value(prune, "--original_ckpt") == value(final, "--teacher_ckpt") == tuned
        assert value(finetune, "--model") == f"{folder}/final/ckpts/pruned_hubert_base.pth" and save[1:2] != report[1:2]
        assert value(finetune, "--exp_dir") == f"{folder}/finetuned" and value(finetune, "--tsv") == "b.tsv"
        assert {value(command, "--seed") for command in (begin, final, finetune)} == {"5"}
        assert value(finetune, "--resume_checkpoint") == "auto" and value(finetune, "--max_updates") == "4"


def test_by_the_task_alone(tmp_path):
    """No manifests, no final distillation: what is pruned is fine-tuned."""
    distill, prune, finetune, _ = commands("conf/prune_by_task.conf", exp_dir="exp", labels="mine.tsv")
    assert value(distill, "--task_tsv") == value(finetune, "--tsv") == "mine.tsv" and "--tsv_dir" not in distill
    assert value(finetune, "--model") == "exp/ckpts/pruned_hubert_base.pth" and prune[1] == "prune.py"
    # A list that cannot be read is refused before the first stage.
    result = run_command("bash", "run.sh", "conf/prune_by_task.conf", exp_dir=tmp_path / "exp", labels="gone.tsv")
    assert result.returncode == 1 and result.stderr.startswith("error: gone.tsv: no such file")
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_config_of_an_editor_on_windows(tmp_path, mark, line_end):
    lines = [
        "source conf/demo.conf",
        "exp_dir='my exp'",
        "shared+=(",
        "    --seed 4 # a word",
        ")",
        "distill+=(--compile)",
    ]
    config = tmp_path / "my own.conf"
    config.write_bytes((mark + line_end.join(lines)).encode())
    distill, *_ = commands(config)
    assert value(distill, "--seed") == "4" and value(distill, "--exp_dir") == "my exp" and "--compile" in distill
    assert r"\r" not in str(commands(config))


@pytest.mark.parametrize(
    ("contents", "flags", "message"),
    [
        ("source conf/demo.conf\ndestill=(--max_updates 5)\n", [], "unknown: destill"),
        ("source conf/demo.conf\nexp_dir =x\n", [], "exp_dir: command not found"),
        ("exp_dir=x\n", [], "tsv_dir: {config} does not set it"),
        ("source conf/demo.conf\nprunes=no\n", [], "{config}: expected true or false, and one of them true"),
        ("source conf/demo.conf\nprunes=false\ndistills_on=false\n", [], "found prunes=false distills_on=false"),
        (None, [], "{config}: no such config"),
        ("source conf/demo.conf\nsource <(printf 'shared+=(\\r\\n--seed 4\\r\\n)')\n", [], "has line ends of Windows"),
        ("source conf/demo.conf\n", ["--exp_dir", "x"], "--exp_dir: all stages would take it; set exp_dir=..."),
    ],
)
def test_run_sh_refuses(tmp_path, contents, flags, message):
    config = tmp_path / "bad.conf"
    if contents is not None:
        config.write_text(contents)
    result = run_command("bash", "run.sh", "--print", config, *flags)
    assert result.returncode != 0 and not result.stdout
    assert message.format(config=config) in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_demo_ends_with_its_stages(tmp_path):
    """SIGTERM to the script alone, as make sends it, ends what it runs."""
    slow = write_command(tmp_path / "bin" / "slow", f"#!/bin/bash\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    environment = os.environ | {"PYTHON": str(slow), "OUT": str(tmp_path / "out")}
    demo = subprocess.Popen(["bash", "demo/run.sh"], cwd=REPOSITORY, env=environment)
    while not (tmp_path / "pid").is_file() or not (child := (tmp_path / "pid").read_text()):
        time.sleep(0.05)
    demo.terminate()
    assert demo.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)


def write_command(path: Path, contents: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(contents)
    path.chmod(0o755)
    return path


def start_run_sh(*arguments: object, until: str, **environment: object) -> subprocess.Popen:
    """run.sh in a session of its own, as a terminal would start it, once it has printed a line that begins so."""
    settings = {"python": sys.executable, **environment}
    process = subprocess.Popen(
        ["bash", "run.sh", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # The tests may run in the background of a shell, where SIGINT is ignored: bash could not trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(f"run.sh ended before it printed {until}")


def test_a_run_that_is_stopped_and_called_again(manifests, small_teacher, tmp_path):
    """A light extractor and the final distillation of a tiny model; a wrong flag of any stage is refused first."""
    config, exp_dir = tmp_path / "tiny.conf", tmp_path / "exp"
    flags = "--train_subset train100 --seconds_per_batch 4 --max_crop_seconds 0.2 --warmup_updates 2 --max_updates"
    config.write_text(
        f"prunes=false teacher_ckpt={small_teacher} tsv_dir={manifests} exp_dir={exp_dir}\n"
        f"make_student=(--extractor '[[7,20,10],[9,5,4]]' {flags} 200 --save_interval 5)\n"
        f"final=({flags} 6 --distill_layers 0.1,3)\n"
    )
    command = ("bash", "run.sh", config, "--accelerator", "cpu")
    result = run_command(*command, "--l1_weight", 2)
    assert "make_student.py: error: unrecognized arguments: --l1_weight 2" in result.stderr
    assert result.returncode == 2 and not exp_dir.exists()
    process = start_run_sh(*command[2:], until="extractor: teacher")
    while not (exp_dir / "student/ckpts/last.ckpt").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: saved update" in output.splitlines()[-1]
    assert output.splitlines()[-1] in (exp_dir / "student.log").read_text()
    result = run_command(*command)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "extractor: continuing" in result.stdout
    assert result.stdout.endswith(f"the compressed model: {exp_dir}/final/ckpts/pruned_hubert_base.pth\n")
    assert {path.stem for path in exp_dir.glob("*.log")} == {"student", "final_distill", "save", "report"}
    assert (exp_dir / "report.html").is_file()


STAGE = """#!/bin/bash
# Stands for Python in run.sh: distill.py trains until a signal makes it save; the other stages end at once.
[[ $1 == distill.py ]] || exec cat >/dev/null # it reads the commands that are checked
for name in TERM USR1 INT; do
    trap "kill \\$! 2>/dev/null; sleep 0.2; echo saved; exit $((128 + $(kill -l $name)))" $name
done
echo training
sleep 30 &
wait
"""


@pytest.mark.parametrize(
    ("name", "send", "status"),
    [
        ("SIGUSR1", os.kill, 138),
        ("SIGINT", os.killpg, 130),  # Ctrl-C: the terminal tells the whole group
        ("SIGTERM", os.killpg, 143),
    ],
)
def test_the_stage_may_save(tmp_path, name, send, status):
    """A signal to run.sh reaches the stage; run.sh shows what the stage still says and ends with its status."""
    stage, exp_dir = write_command(tmp_path / "bin" / "stage", STAGE), tmp_path / "exp"
    process = start_run_sh(until="training", python=stage, exp_dir=exp_dir)
    send(process.pid, getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "saved\n")
    assert (exp_dir / "distill.log").read_text() == "training\nsaved\n"
    assert not (exp_dir / "prune.log").exists()


def test_a_check_ends_with_its_script(tmp_path):
    """SIGTERM to the script alone ends what it checks with."""
    student = tmp_path / "student.pth"
    student.touch()
    stage = write_command(tmp_path / "bin" / "stage", STAGE)
    process = start_run_sh("--check", until="training", python=stage, exp_dir=tmp_path / "exp", teacher_ckpt=student)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (143, "saved\n")


def test_run_sh_starts_training_with_srun_in_a_slurm_job():
    job = {"SLURM_JOB_ID": 7, "SLURM_NNODES": 3, "SLURM_NTASKS_PER_NODE": 2, "SLURM_CPUS_PER_TASK": 12}
    distill, prune, final, save, _ = commands(**job)
    for command in (distill, final):
        srun = command[: command.index(sys.executable)]
        assert srun[0] == "srun"
        assert {"--nodes=3", "--ntasks=6", "--ntasks-per-node=2", "--cpus-per-task=12", "--kill-on-bad-exit=1"} == set(
            srun[1:]
        )
        assert value(command, "--gpus") == "2" and value(command, "--num_nodes") == "3"
    assert prune[0] == save[0] == sys.executable
    result = run_command("bash", "run.sh", "--print", "--gpus", 1, **job)
    assert result.returncode == 1 and "--gpus: in a SLURM job the allocation says it" in result.stderr


@pytest.mark.parametrize(
    ("name", "script_too", "state", "array", "requeued"),
    [
        ("SIGTERM", False, "PreemptTime=None", {}, ""),  # scancel --signal=TERM
        ("SIGTERM", False, "PreemptTime=2026-11-23T17:20:25", {"JOB_ID": 5, "TASK_ID": 3}, "5_3\n"),
        ("SIGTERM", True, "PreemptTime=2026-11-23T17:20:25", {}, ""),  # SLURM requeues it itself
        ("SIGTERM", True, "PreemptTime=None", {}, ""),  # scancel
        ("SIGTERM", True, "Reason=TimeLimit", {}, "7\n"),
        ("SIGUSR1", False, "PreemptTime=None", {}, "7\n"),
    ],
)
def test_run_sh_requeues_what_slurm_stopped(tmp_path, name, script_too, state, array, requeued):
    """A job that SLURM stops and would not requeue goes back to the queue; one that the user stops does not."""
    log = tmp_path / "requeued"
    log.touch()
    write_command(tmp_path / "bin" / "srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    answer = f'#!/bin/bash\n[[ $1 == show ]] && echo "   {state}" || echo "$2" >>{log}\n'
    write_command(tmp_path / "bin" / "scontrol", answer)
    slurm = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": REPOSITORY, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    array = {f"SLURM_ARRAY_{key}": value for key, value in array.items()}
    stage = write_command(tmp_path / "bin" / "stage", STAGE)
    process = start_run_sh(until="training", python=stage, exp_dir=tmp_path / "exp", **slurm, **array)
    _, stage = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # tee is the first
    if script_too:
        process.send_signal(getattr(signal, name))
        time.sleep(0.2)
        assert process.poll() is None
    os.kill(int(stage), getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert log.read_text() == requeued
