"""Updates of training to be timed: teachers, compressed students, and one update of either stage."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning import DistillLoss, DistillModule, make_projections
from training.speed import cast_products, keep_freed_memory
from wav2vec2.fast import plain_paths
from wav2vec2.model import hubert_base, wav2vec2_model, wavlm_base, with_masks

# The dropouts that converters write into a teacher's config, for every model: the published training's.
DROPOUTS = dict.fromkeys(("encoder_projection_dropout", "encoder_attention_dropout", "encoder_dropout"), 0.1)
DROPOUTS |= {"encoder_ff_interm_dropout": 0.0, "encoder_layer_drop": 0.05}
TEACHERS = {"HuBERT Base": partial(hubert_base, **DROPOUTS), "WavLM Base": partial(wavlm_base, **DROPOUTS)}
PUBLISHED_80 = Path(__file__).parents[1] / "tests" / "data" / "reference" / "published_wavlm_base_s80.json"
DISTILLED = [[0], [4, 8, 12]]
DTYPES = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


def compressed_config(name: str) -> dict[str, Any]:
    """Return HuBERT Base with a quarter of its parameters, every kind of unit pruned alike; WavLM's published 80%."""
    if name == "WavLM Base":
        return json.loads(PUBLISHED_80.read_text())["config"]
    config = TEACHERS[name]().config
    channels = [(320, kernel, stride) for _, kernel, stride in config["extractor_conv_layer_config"]]
    shape = {"encoder_num_heads": [4] * 12, "encoder_ff_interm_features": [410] * 12}
    return {**config, "extractor_conv_layer_config": channels, **shape}


def precisions() -> list[str]:
    """Return the precisions to compare: bfloat16 where the CPU multiplies it; elsewhere it is emulated, and slow."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ["32", "bf16"] if has_bfloat16 else ["32"]


class Update:
    """Makes updates of a teacher's student with the published loss, on one batch of noise of shape (B, T).

    In the stage "joint" the student is the teacher's copy with masks, in "final" it is compressed; the path is "plain"
    or "fast"; a precision of "16" has a loss scaler.
    """

    def __init__(self, name: str, stage: str, path: str, precision: str, shape: tuple[int, int], device: str) -> None:
        torch.manual_seed(0)
        teacher = TEACHERS[name]()
        if stage == "joint":
            student = wav2vec2_model(**with_masks(teacher.config, ["conv", "head", "interm"]))
            student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
        else:
            student = wav2vec2_model(**compressed_config(name))
        widths = (model.config["encoder_embed_dim"] for model in (student, teacher))
        self._plain, self._dtype, self._device = path == "plain", DTYPES[precision], device
        with plain_paths(self._plain):
            self.module = DistillModule(
                teacher_model=teacher,
                student_model=student,
                distill_mode="layer2layer",
                distill_layers=[layer for group in DISTILLED for layer in group],
                distill_linear_projs=make_projections("layer2layer", DISTILLED, *widths),
                distill_loss=DistillLoss(0, 1, 1, "raw"),
                learning_rate=2e-4,
                weight_decay=0.0,
                warmup_updates=10,
                max_updates=100,
                use_reg=stage == "joint",
                sparsity_warmup_updates=10,
            ).to(device)
            self._optimizer = self.module.configure_optimizers()["optimizer"]
        if not self._plain:
            teacher.fold_weight_norm()
            if precision != "32":
                cast_products(teacher, self._dtype)
        self._scaler = torch.amp.GradScaler(device, enabled=precision == "16")
        # Training knows that crops have no padding; the published program gives lengths all the same.
        lengths = torch.full(shape[:1], shape[1], device=device) if self._plain else None
        self._batch = (torch.randn(shape, device=device), lengths)

    def __call__(self) -> float:
        """Make one update; returns the seconds that it took."""
        wait = torch.cuda.synchronize if self._device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        with plain_paths(self._plain):
            with torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32):
                loss, _ = self.module.loss(self._batch, "train")
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 10.0)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()
        wait()
        return time.perf_counter() - start


# The update of a process that start_process has made one for it.
_updates: list[Update] = []


def start_process(threads: int, *setting: Any) -> None:
    """Prepare this process for its update: whether freed memory is kept is a setting of the whole process."""
    torch.set_num_threads(threads)
    if "fast" in setting:
        keep_freed_memory()
    _updates.append(Update(*setting))


def run_update() -> float:
    return _updates[0]()
