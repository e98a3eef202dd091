"""Print what came out of a compression run: sizes, shapes per layer, and the feature loss on held-out speech.

python demo/report.py --exp_dir demo/out/exp --teacher_ckpt demo/out/mini-hubert.pth --tsv demo/out/data/valid.tsv
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from the checkout, not installed

import cli
from dataset import MAX_SECONDS, SAMPLE_RATE, BatchSampler, SpeechDataset, make_batches, read_manifest
from lightning import DistillLoss, check_pair, make_projections, parse_distill_layers
from resilience import LAST_CHECKPOINT, PRUNED_MODEL, read_training_checkpoint
from wav2vec2.checkpoint import load_model, load_state, read_model_file
from wav2vec2.model import Wav2Vec2Model


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, required=True, help="run.sh's exp_dir")
    parser.add_argument("--teacher_ckpt", type=Path, required=True)
    parser.add_argument("--tsv", type=Path, required=True, help="manifest of held-out speech")
    parser.add_argument("--distill_layers", default="0.2,4,6", help="as in training")
    parser.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="leave out longer utterances")
    return parser.parse_args()


@torch.inference_mode()
def feature_loss(teacher: Wav2Vec2Model, path: Path, args: argparse.Namespace) -> tuple[float, dict[int, float]]:
    """Distance of the student in ``path`` from the teacher on whole utterances, one at a time.

    Returns:
        The distillation loss (L1 minus cosine, the published weights) and the mean cosine of each distilled
        layer, through the learnt projections, averaged over utterances.
    """
    groups = parse_distill_layers(args.distill_layers)
    layers = [layer for group in groups for layer in group]
    student = load_model(path).eval()
    check_pair(teacher, student, layers, "layer2layer")
    dims = [model.config["encoder_embed_dim"] for model in (student, teacher)]
    projections = make_projections("layer2layer", groups, *dims)
    load_state(projections, read_model_file(path)["distill_linear_projs"], path)
    loss = DistillLoss(l2_weight=0, l1_weight=1, cos_weight=1, cos_type="raw")

    manifest = read_manifest(args.tsv)
    batches = make_batches(manifest.lengths, batch_size=1, max_len=round(args.max_seconds * SAMPLE_RATE))
    sampler = BatchSampler(manifest.lengths, batches, 1, 0, shuffle=False, seed=0, drop_last=True)
    losses, cosines = [], []
    for waveforms, *_ in tqdm(DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None), desc=str(path)):
        expected, _ = teacher.extract_features(waveforms)
        hidden, _ = student.extract_features(waveforms)
        expected = torch.stack([expected[layer] for layer in layers], dim=1)  # (1, layers, T, D)
        actual = torch.stack([proj(hidden[layer]) for proj, layer in zip(projections, layers, strict=True)], dim=1)
        losses.append(loss(actual, expected)[0])
        cosines.append(torch.cosine_similarity(actual, expected, dim=-1).mean(dim=(0, 2)))
    mean_cosines = torch.stack(cosines).mean(0).tolist()
    return torch.stack(losses).mean().item(), dict(zip(layers, mean_cosines, strict=True))


def num_heads(config: dict[str, Any], layer: int) -> int:
    """Heads that a layer has."""
    if not config["encoder_use_attention"][layer]:
        return 0
    if "encoder_remaining_heads" in config:
        return len(config["encoder_remaining_heads"][layer])
    return config["encoder_num_heads"][layer]


def ffn_size(config: dict[str, Any], layer: int) -> int:
    """Intermediate dimensions of a layer's feed-forward."""
    return config["encoder_ff_interm_features"][layer] if config["encoder_use_feed_forward"][layer] else 0


def print_architecture(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Kept units of each layer, as ``after/before``."""
    print("\nconv layer   channels")
    shapes = zip(before["extractor_conv_layer_config"], after["extractor_conv_layer_config"], strict=True)
    for layer, (old, new) in enumerate(shapes):
        print(f"{layer:10}   {new[0]:>5}/{old[0]}")
    print("\n     layer      heads          FFN")
    for layer in range(after["encoder_num_layers"]):
        heads = f"{num_heads(after, layer)}/{num_heads(before, layer)}"
        ffn = f"{ffn_size(after, layer)}/{ffn_size(before, layer)}"
        print(f"{layer + 1:10}   {heads:>8}   {ffn:>10}")


def main(args: argparse.Namespace) -> None:
    teacher = load_model(args.teacher_ckpt).eval()
    pruned_path = args.exp_dir / "ckpts" / PRUNED_MODEL
    final_path = args.exp_dir / "final" / "ckpts" / PRUNED_MODEL
    target = read_training_checkpoint(args.exp_dir / "ckpts" / LAST_CHECKPOINT)["distillation"]["target_sparsity"]
    final = load_model(final_path)
    num_before, num_after = teacher.get_num_params(), final.get_num_params()
    losses = {path: feature_loss(teacher, path, args) for path in (pruned_path, final_path)}

    print(f"\nparameters   {num_before:,} -> {num_after:,}")
    sparsity = 1 - num_after / num_before
    verdict = "met within 0.5%" if abs(sparsity - target) <= 0.005 else "missed by more than 0.5%"
    print(f"sparsity     {sparsity:.4f} reached, {target:.4f} wanted: {verdict}")
    print_architecture(teacher.config, final.config)
    layers = losses[final_path][1]
    print(f"\n{'held-out speech':<24}{'feature loss':>14}" + "".join(f"{f'cosine {layer}':>11}" for layer in layers))
    for label, path in (("after pruning", pruned_path), ("after final distillation", final_path)):
        loss, cosines = losses[path]
        print(f"{label:<24}{loss:>14.4f}" + "".join(f"{cosine:>11.3f}" for cosine in cosines.values()))
    print(
        "\nto load it:\n"
        f'  ckpt = torch.load("{final_path}", weights_only=True)\n'
        '  model = wav2vec2_model(**ckpt["config"])  # from wav2vec2.model import wav2vec2_model\n'
        '  model.load_state_dict(ckpt["state_dict"])'
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
