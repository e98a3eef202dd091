"""The upstream for s3prl: its own contract without s3prl, then s3prl's interfaces where it is installed."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import soundfile
import torch
from helpers import (
    REPOSITORY,
    random_model,
    random_waveforms,
    run_command,
    save_small_model,
    small_config,
    start_script,
)
from torch import Tensor

from s3prl_upstream.hubconf import dphubert_local
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import CONV_LAYERS, with_masks

pytestmark = pytest.mark.slow

SOURCE = REPOSITORY / "s3prl_upstream"
KINDS = [(family, size) for family in ("hubert", "wavlm") for size in ("base", "large")]
NUM_LAYERS, EMBED_DIM = 3, 12


@pytest.fixture(params=KINDS, ids="-".join)
def pruned(request, tmp_path: Path) -> Path:
    """A pruned model of each kind with the published strides, 320 samples a frame."""
    layers = [[6, kernel, stride] for _, kernel, stride in CONV_LAYERS]
    config = small_config(*request.param, extractor_conv_layer_config=layers, encoder_layer_drop=1.0)
    model = random_model(with_masks(config, ("conv", "head", "interm", "attlayer", "posconv", "embed")))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            drawn = 3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn.abs() if len(drawn) == 1 else drawn
    model.encoder.hard_concrete.log_alpha.data = torch.tensor([9.0, 9.0, -9.0, 9.0])
    config = model.prune()
    assert sum(config["encoder_ff_interm_features"]) < 3 * 20
    path = tmp_path / "pruned.pth"
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": config})
    return path


def waveforms_of(*num_samples: int) -> list[Tensor]:
    padded, lengths = random_waveforms(*num_samples)
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def norm_sees_padding(path: Path) -> bool:
    """Base models normalise the extractor's first layer over time, padding included."""
    return checkpoint.read_model_file(path)["config"]["extractor_mode"] == "group_norm"


@torch.no_grad()
def test_hidden_states_are_the_models(pruned):
    upstream, model = dphubert_local(pruned).eval(), checkpoint.load_model(pruned).eval()
    padded, lengths = random_waveforms(8000, 3000, 5517)
    found = upstream([row[:length] for row, length in zip(padded, lengths, strict=True)])
    expected, frames = model.extract_features(padded, lengths)
    assert len(found["hidden_states"]) == NUM_LAYERS + 1
    assert found["last_hidden_state"] is found["hidden_states"][-1]
    for ours, theirs in zip(found["hidden_states"], expected, strict=True):
        for row, valid in enumerate(frames):
            assert torch.equal(ours[row, :valid], theirs[row, :valid])
            assert torch.equal(ours[row, valid:], ours[row, valid - 1].expand_as(ours[row, valid:]))
    if model.encoder.transformer.layer_norm_first:  # the last layer is taken before the final LayerNorm
        assert not torch.allclose(found["last_hidden_state"], model(padded, lengths)[0], atol=1e-2)


@torch.no_grad()
def test_utterances_do_not_depend_on_each_other(pruned):
    """Every frame of the batch is the one that the utterance has alone, and then its last one again."""
    upstream, sees_padding = dphubert_local(pruned).eval(), norm_sees_padding(pruned)
    for wavs in (waveforms_of(6000, 6000), waveforms_of(4000, 3000, 400, 399, 1, 0)):
        batch = upstream(wavs)["hidden_states"]
        for row, wav in enumerate(wavs):
            for together, alone in zip(batch, upstream([wav])["hidden_states"], strict=True):
                frames = max((len(wav) - 400) // 320 + 1, 1)
                assert alone.shape == (1, frames, EMBED_DIM) and together.isfinite().all()
                if row == 0 or not sees_padding:
                    assert_close(together[row, :frames], alone[0])


@pytest.mark.parametrize(("layers", "expected"), [(CONV_LAYERS, 320), ([[5, 10, 5], [5, 3, 2], [5, 2, 2]], 20)])
def test_downsample_rate_is_that_of_the_strides(layers, expected, tmp_path):
    layers = [[4, kernel, stride] for _, kernel, stride in layers]
    path = save_small_model(tmp_path / "teacher.pth", "hubert", "base", extractor_conv_layer_config=layers)
    upstream = dphubert_local(path)
    assert upstream.get_downsample_rates("hidden_states") == expected
    frames = upstream(waveforms_of(16000))["hidden_states"][0].size(1)
    assert abs(frames - 16000 / expected) < 5  # s3prl's tolerance


def test_fine_tuning(tmp_path):
    """In training mode dropout acts, layer drop does not, and all but the extractor learns."""
    path = save_small_model(tmp_path / "teacher.pth", "wavlm", "base", encoder_layer_drop=1.0)
    upstream, wavs = dphubert_local(path).train(), waveforms_of(4000, 3000)
    first, second = (upstream(wavs)["hidden_states"] for _ in range(2))
    assert len(first) == NUM_LAYERS + 1
    assert not torch.equal(first[-1], second[-1])
    assert not torch.allclose(first[-1], first[0], atol=0.1)
    sum(x.square().mean() for x in first[1:]).backward()
    learning = {name for name, p in upstream.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    named = {name for name, _ in upstream.named_parameters() if not name.startswith("model.feature_extractor.")}
    assert {name for name in named - learning if not name.endswith("k_proj.bias")} == set()  # softmax ignores that one
    assert learning <= named


def test_input_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        dphubert_local(tmp_path / "none.pth")
    path = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    with pytest.raises(ValueError, match="leave -g out"):
        dphubert_local(path, model_config="config.yaml")
    with pytest.raises(TypeError, match="layer"):
        dphubert_local(path, layer=3)


def test_torch_hub(tmp_path):
    path = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    upstream = torch.hub.load(str(SOURCE), "dphubert_local", ckpt=str(path), source="local")
    assert len(upstream(waveforms_of(4000))["hidden_states"]) == NUM_LAYERS + 1


# A package like s3prl's: folders of upstreams, one of which is called wav2vec2, and a hub that collects their names.
PACKAGE = {
    "toolkit/__init__.py": "",
    "toolkit/upstream/__init__.py": "",
    "toolkit/upstream/wav2vec2/__init__.py": "",
    "toolkit/hub.py": "from toolkit.upstream.dphubert.hubconf import *\n",
}
USE = """
import sys
import torch, toolkit.hub, toolkit.upstream.wav2vec2
before = list(sys.path)
upstream = toolkit.hub.dphubert_local(ckpt=sys.argv[1], model_config=None, refresh=False).eval()
print(len(upstream([torch.zeros(4000), torch.zeros(3000)])["hidden_states"]))
assert sys.path == before
"""


@pytest.fixture
def use_package(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a program that takes the upstream out of such a package; ``install`` is called on its folder first."""

    def use(install: Callable[[Path], None], program: str = USE) -> subprocess.CompletedProcess:
        for name, text in PACKAGE.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        install(tmp_path / "toolkit" / "upstream" / "dphubert")
        path = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
        return subprocess.run([sys.executable, "-c", program, path], cwd=tmp_path, capture_output=True, text=True)

    return use


def test_link_in_another_package(use_package):
    result = use_package(lambda folder: folder.symlink_to(SOURCE))
    assert (result.returncode, result.stdout) == (0, f"{NUM_LAYERS + 1}\n"), result.stderr


def copy(folder: Path) -> None:
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))


def test_copy_with_the_installed_package(use_package, tmp_path):
    """After ``pip install .`` wav2vec2/ and hardconcrete.py are importable without the repository."""
    shutil.copytree(REPOSITORY / "wav2vec2", tmp_path / "wav2vec2", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "hardconcrete.py", tmp_path)
    result = use_package(copy)
    assert (result.returncode, result.stdout) == (0, f"{NUM_LAYERS + 1}\n"), result.stderr


def test_copy_without_the_package(use_package, tmp_path):
    """The package is missing, or another has its name."""
    (tmp_path / "other" / "wav2vec2").mkdir(parents=True)
    (tmp_path / "other" / "wav2vec2" / "__init__.py").touch()
    result = use_package(
        copy,
        "import sys, toolkit.hub\n"
        "for place in ('nowhere', 'other'):\n"
        "    sys.path.insert(0, place)\n"
        "    try:\n"
        "        toolkit.hub.dphubert_local(sys.argv[1])\n"
        "    except ImportError as error:\n"
        "        print(error)\n",
    )
    assert result.returncode == 0, result.stderr
    nothing, another = result.stdout.splitlines()
    assert "pip install /path/to/the/repository" in nothing and "is another one" not in nothing
    assert "pip install /path/to/the/repository" in another and "other/wav2vec2'] is another one" in another


def test_run_downstream_knows_the_name(tmp_path):
    """``python PATH/s3prl_upstream ARGS`` is s3prl's run_downstream.py with one name more.

    It reads its own checkpoints back, which hold its arguments.
    """
    package = tmp_path / "s3prl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hub.py").write_text("")
    (package / "run_downstream.py").write_text(
        "import argparse, io, sys\nimport torch\nfrom s3prl import hub\n"
        "def main():\n"
        "    hidden_states = getattr(hub, sys.argv[1])(ckpt=sys.argv[2])([torch.zeros(4000)])\n"
        "    print(len(hidden_states['hidden_states']))\n"
        "    assert not [p for p in sys.path if 's3prl_upstream' in p]\n"
        "    torch.save({'Args': argparse.Namespace(lr=1)}, file := io.BytesIO())\n"
        "    assert torch.load(io.BytesIO(file.getvalue()))['Args'].lr == 1\n"
    )
    path = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    result = subprocess.run(
        [sys.executable, SOURCE, "dphubert_local", path],
        cwd="/",
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, f"{NUM_LAYERS + 1}\n"), result.stderr


# From here on with s3prl itself.


@pytest.fixture
def s3prl(monkeypatch) -> SimpleNamespace:
    """s3prl's hub with our upstream in it, and its two interfaces.

    torchaudio 2.11 no longer has two names that s3prl 0.4.18 imports and that nothing here calls; they are given to it
    in memory.
    """
    torchaudio = pytest.importorskip("torchaudio")
    if not hasattr(torchaudio, "set_audio_backend"):
        effects = ModuleType("torchaudio.sox_effects")
        effects.apply_effects_tensor = effects.apply_effects_file = None
        monkeypatch.setitem(sys.modules, "torchaudio.sox_effects", effects)
        monkeypatch.setattr(torchaudio, "sox_effects", effects, raising=False)
        monkeypatch.setattr(torchaudio, "set_audio_backend", lambda name: None, raising=False)
    pytest.importorskip("s3prl", reason="s3prl is not installed: pip install -r requirements-s3prl.txt")
    import s3prl.hub
    import s3prl.nn
    import s3prl.upstream.interfaces

    import s3prl_upstream

    s3prl_upstream.register()
    return SimpleNamespace(hub=s3prl.hub, nn=s3prl.nn, interfaces=s3prl.upstream.interfaces)


@torch.no_grad()
def test_s3prl_upstream(s3prl, pruned):
    """s3prl's present interface: lengths, sizes, rates, and no utterance that depends on the others."""
    assert "dphubert_local" in s3prl.nn.S3PRLUpstream.available_names()
    upstream = s3prl.nn.S3PRLUpstream("dphubert_local", path_or_url=pruned).eval()
    assert upstream.num_layers == NUM_LAYERS + 1
    assert upstream.hidden_sizes == [EMBED_DIM] * upstream.num_layers
    assert upstream.downsample_rates == [320] * upstream.num_layers
    wavs, lengths = random_waveforms(9000, 3000, 5519, 700)
    hidden_states, frames = upstream(wavs, lengths)
    assert all(torch.equal(f, (lengths - 1) // 320 + 1) for f in frames)
    for row, length in enumerate(lengths):
        alone, _ = upstream(wavs[row : row + 1, :length].clone(), lengths[row : row + 1])
        for together, one, f in zip(hidden_states, alone, frames, strict=True):
            # s3prl itself pads what is shorter than 0.05 s, when it is alone.
            if row == 0 or (length >= 800 and not norm_sees_padding(pruned)):
                assert_close(together[row, : f[row]], one[0])
    features, feature_frames = s3prl.nn.Featurizer(upstream)(hidden_states, frames)
    assert_close(features, torch.stack(hidden_states).mean(0))
    assert torch.equal(feature_frames, frames[0])


def test_runner_featurizer(s3prl, pruned):
    """The interface of run_downstream.py: the frames that it takes, and a probe and layer weights trained on them."""
    upstream = s3prl.hub.dphubert_local(ckpt=pruned, model_config=None, refresh=False)
    featurizer = s3prl.interfaces.Featurizer(upstream, upstream_device="cpu")
    assert (featurizer.output_dim, featurizer.downsample_rate) == (EMBED_DIM, 320)
    wavs = waveforms_of(*range(3000, 9000, 700))
    with torch.no_grad():
        hidden_states = upstream.eval()(wavs)
    labels = torch.arange(len(wavs)) % 2
    probe = torch.nn.Linear(EMBED_DIM, 2)
    optimizer = torch.optim.Adam([*featurizer.parameters(), *probe.parameters()], lr=0.01)
    losses = []
    for _ in range(20):
        features = featurizer(wavs, hidden_states)
        longest = hidden_states["hidden_states"][0].size(1)
        assert [len(f) for f in features] == [min(round(len(wav) / 320), longest) for wav in wavs]
        loss = torch.nn.functional.cross_entropy(probe(torch.stack([f.mean(0) for f in features])), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert featurizer.weights.grad.abs().min() > 0


def test_fine_tuning_in_s3prl(s3prl, tmp_path):
    path = save_small_model(tmp_path / "teacher.pth", "hubert", "large", encoder_layer_drop=1.0)
    upstream = s3prl.nn.S3PRLUpstream("dphubert_local", path_or_url=path)
    model = s3prl.nn.upstream.UpstreamDownstreamModel(
        upstream, s3prl.nn.Featurizer(upstream), lambda x, frames: x.mean(), upstream_trainable=True
    )
    model.train()(*random_waveforms(4000, 3000)).backward()
    assert sum(p.grad is not None for p in upstream.parameters()) > 40


# --- superb.sh -------------------------------------------------------------------------------------

# s3prl's names and the rates of the tasks; of SID it is not s3prl's own.
TASKS = {
    "PR": ("ctc", "libriphone", "1e-2"),
    "ASR": ("asr", "config", "1e-4"),
    "KS": ("speech_commands", "config", "1e-4"),
    "IC": ("fluent_commands", "config", "1e-4"),
    "SF": ("ctc", "snips", "1e-4"),
    "SID": ("voxceleb1", "config", "1e-1"),
    "ASV": ("sv_voxceleb1", "config", "1e-4"),
    "SD": ("diarization", "config", "1e-4"),
    "ER": ("emotion", "config", "1e-4"),
    "QbE": ("quesst14_dtw", "config", None),
}


@pytest.fixture
def quick_python(tmp_path) -> Path:
    """Stands for Python: says that the model has three layers, without importing torch."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text("#!/bin/bash\n[[ $1 != -c || $2 == *find_spec* ]] || echo 3\n")
    path.chmod(0o755)
    return path


def superb(python: object, *arguments: object, **environment: object) -> subprocess.CompletedProcess:
    return run_command("bash", SOURCE / "superb.sh", *arguments, python=python, **environment)


def words_after(line: str, flag: str) -> list[str]:
    words = shlex.split(line.replace("; do", " ").replace("; done", " "))
    return [words[place + 1] for place, word in enumerate(words) if word == flag]


@pytest.mark.parametrize("task", TASKS)
def test_superb_dry_run(task, quick_python, tmp_path):
    model = tmp_path / "my model.pth"
    model.touch()
    downstream, config, rate = TASKS[task]
    result = superb(quick_python, task, model, "-o", "config.x=1", "--device", "cpu", "--dry-run", S3PRL=tmp_path)
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert shlex.split(first) == ["cd", str(tmp_path)] and not (tmp_path / "my model.superb").exists()
    assert all(
        f"'{quick_python}' '{SOURCE}' -m " in line and words_after(line, "--device") == ["cpu"] for line in lines
    )
    upstreams = [line for line in lines if "-u dphubert_local" in line]
    for line in upstreams:
        assert words_after(line, "-k") == [str(model)] and words_after(line, "-d") == [downstream]
        assert words_after(line, "-c") == [f"downstream/{downstream}/{config}.yaml"]
    out = str(tmp_path / "my model.superb" / task.lower())
    if task == "QbE":
        (line,) = lines
        assert line.startswith("for layer in 0 1 2 3; do ") and words_after(line, "-m") == ["evaluate"]
        assert words_after(line, "-p") == [f"{out}-$layer-dev"] and words_after(line, "-o") == ["config.x=1"]
        tested = superb(quick_python, task, model, "--dry-run", "--layer", 2).stdout
        assert "for layer in 2; do " in tested and "-t test -l $layer" in tested
        return
    folders = [f"{out}-fold{number}" for number in range(1, 6)] if task == "ER" else [out]
    assert len(lines) == 2 * len(folders) and upstreams == lines[::2]
    for folder, train, test in zip(folders, lines[::2], lines[1::2], strict=True):
        assert words_after(train, "-m") == ["train"] and " -a " in train and words_after(train, "-p") == [folder]
        keys = words_after(train, "-o")[0].split(",,")
        assert keys[0] == f"config.optimizer.lr={rate}" and keys[-1] == "config.x=1"
        folds = [key for key in keys if key.endswith(f"test_fold='{folder[-5:]}'")]
        assert len(folds) == (task == "ER")
        assert "-m evaluate" in test and (folder in test)
    faster = superb(quick_python, task, model, "--dry-run", "--lr", "5e-3").stdout
    assert "config.optimizer.lr=5e-3" in faster


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("KWS", "model.pth"), "TASK: KWS is none of PR ASR KS IC SF SID ASV SD ER QbE"),
        (("KS", "none.pth", "--dry-run"), "MODEL: none.pth: no such file"),
        (("KS",), "expected TASK MODEL, found 1 words: KS"),
        ((), "expected TASK MODEL, found 0 words"),
        (("KS", "LICENSE"), "S3PRL: no downstream/speech_commands/config.yaml in "),
        (("KS", "LICENSE", "--lr", "fast"), "--lr: expected a number such as 1e-3, found fast"),
        (("KS", "LICENSE", "--lr"), "--lr: expected a value behind it"),
        (("KS", "LICENSE", "--layer", "2"), "--layer: is of QbE alone"),
        (("QbE", "LICENSE", "--lr", "1"), "--lr: QbE trains nothing"),
        (("QbE", "LICENSE", "--dry-run", "--layer", "4"), "has the layers 0 to 3, found 4"),
    ],
)
def test_superb_refuses(words, message, quick_python):
    result = superb(quick_python, *words)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_superb_names_what_is_missing(tmp_path):
    """It names a file that is not a model, a Python without s3prl, and a missing Python."""
    (tmp_path / "model.pth").write_text("no model")
    result = superb(sys.executable, "QbE", tmp_path / "model.pth", "--dry-run")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'model.pth'}: ")
    config = tmp_path / "downstream" / "speech_commands" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.touch()
    result = superb("false", "KS", tmp_path / "model.pth", S3PRL=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1) and "false has no s3prl" in result.stderr
    result = superb(tmp_path / "nothing", "KS", tmp_path / "model.pth", "--dry-run")
    assert result.returncode == 1 and f"python: {tmp_path / 'nothing'}: no such command" in result.stderr


# What s3prl 0.4.18 imports and the packages of today no longer have, or that its package does not bring.
TODAY = """
import os, runpy, sys
from types import ModuleType

import huggingface_hub, soundfile, torch, torchaudio
from torch.utils.tensorboard import SummaryWriter


def module(name, **contents):
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


def read(path, effects):
    waveform, rate = soundfile.read(path, dtype="float32")
    return torch.from_numpy(waveform)[None], rate


module("torchaudio.sox_effects", apply_effects_tensor=None, apply_effects_file=read)
module("catalyst"), module("catalyst.data"), module("catalyst.data.sampler", DistributedSamplerWrapper=None)
module("tensorboardX", SummaryWriter=SummaryWriter)
torchaudio.set_audio_backend = lambda name: None
huggingface_hub.HfFolder = huggingface_hub.Repository = None
os.chdir(os.environ["S3PRL"])
source = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(source, run_name="__main__")
"""


def test_superb_trains_and_tests(s3prl, quick_python, tmp_path):
    """KS by s3prl itself: the lines of --dry-run, on words that are tones."""
    layers = [[4, kernel, stride] for _, kernel, stride in CONV_LAYERS]
    model = save_small_model(tmp_path / "model.pth", "wavlm", "base", extractor_conv_layer_config=layers)
    folder, generator = tmp_path / "s3prl", torch.Generator().manual_seed(0)
    words = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "_unknown_", "_silence_")
    for split in ("train", "test"):
        for number, word in enumerate(words):
            place = folder / split / ("_background_noise_" if (split, word) == ("train", "_silence_") else word)
            place.mkdir(parents=True)
            for speaker in range(12 if split == "train" else 2):
                wave = 0.3 * torch.sin(2 * torch.pi * (200 + 150 * number) * torch.arange(16100) / 16000)
                wave += 0.01 * torch.randn(16100, generator=generator)
                soundfile.write(place / f"{speaker:08d}_nohash_0.wav", wave.numpy(), 16000)
    config = folder / "downstream" / "speech_commands" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(
        "runner: {total_steps: 4, gradient_clipping: 1, gradient_accumulate_steps: 1, log_step: 1, eval_step: 2,\n"
        "         save_step: 2, max_keep: 1, eval_dataloaders: [dev, test]}\n"
        "optimizer: {name: TorchOptim, torch_optim_name: Adam, lr: 7}\n"
        "downstream_expert:\n"
        "  datarc: {speech_commands_root: train, speech_commands_test_root: test, num_workers: 0, batch_size: 8}\n"
        "  modelrc: {projector_dim: 8, select: UtteranceLevel, UtteranceLevel: {pooling: MeanPooling}}\n"
    )
    (tmp_path / "today.py").write_text(TODAY)
    lines = superb(quick_python, "KS", model, "--dry-run", "--device", "cpu", S3PRL=folder).stdout.splitlines()
    output = tmp_path / "output"
    for line in lines[1:]:
        process = start_script(tmp_path / "today", *shlex.split(line)[1:], output=output, S3PRL=folder)
        process.join()
        assert process.exitcode == 0, output.read_text()[-3000:]
    results = tmp_path / "model.superb" / "ks"
    trained = torch.load(results / "dev-best.ckpt", weights_only=False)
    assert trained["Config"]["optimizer"]["lr"] == 1e-4 and trained["Args"].upstream == "dphubert_local"
    assert len((results / "test_predict.txt").read_text().splitlines()) == 24
    assert output.read_text().count("test acc: ") == 3  # two of the training, one of the evaluation


def test_tasks_are_of_s3prl(s3prl):
    """The downstreams are those that s3prl has."""
    for name, _, _ in TASKS.values():
        assert (Path(s3prl.hub.__file__).parent / "downstream" / name / "expert.py").is_file(), name
