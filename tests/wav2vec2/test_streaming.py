"""Streaming models: steps are the whole pass, nothing looks ahead, norms end as those of the whole utterance."""

import copy
from typing import Any

import pytest
import torch
from helpers import masks_of, random_model, random_waveforms, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wav2vec2 import fast
from wav2vec2.components import RunningMoments
from wav2vec2.fast import plain_paths
from wav2vec2.model import PRUNING_UNITS, Wav2Vec2Model, normalize_waveforms, with_masks
from wav2vec2.streaming import Stream

FAMILIES = [(family, size) for family in ("hubert", "wavlm") for size in ("base", "large")]


def streaming_config(family: str, size: str, chunk: int = 4, left: int = 6) -> dict[str, Any]:
    config = {**small_config(family, size), "encoder_chunk_frames": chunk, "encoder_left_frames": left}
    return {**config, "normalize_waveform": config["extractor_mode"] == "layer_norm"}


def streaming_model(family: str, size: str, *, is_pruned: bool = False, seed: int = 0, **changes: int) -> Wav2Vec2Model:
    """A model with random weights, and a prior that is none of the waveforms'."""
    config = streaming_config(family, size, **changes)
    model = random_model(with_masks(config, PRUNING_UNITS) if is_pruned else config, seed)
    if is_pruned:
        for mask in masks_of(model).values():
            mask.log_alpha.data.uniform_(-2, 2)
        model.prune()
    if model.feature_extractor.heard is not None:
        model.feature_extractor.heard.prior_products.mul_(0.3)
    return model


def pushed(stream: Stream, waveforms: Tensor, sizes: list[int]) -> Tensor:
    """The frames of pushes of these sizes, then of the rest, with those of the end."""
    frames, start = [], 0
    for size in [*sizes, waveforms.size(-1)]:
        frames.append(stream.push(waveforms[..., start : start + size]))
        start += size
    return torch.cat([*frames, stream.finish()], dim=-2)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.integers(1, 7),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 3000),
    st.lists(st.integers(0, 700), max_size=8),
    st.booleans(),
)
def test_steps_are_the_whole_pass(family, chunk, left, is_pruned, num_samples, sizes, is_plain):
    """For every architecture, pruned shape, and way of cutting the sound; in double and single precision."""
    model = streaming_model(*family, is_pruned=is_pruned, chunk=chunk, left=left)
    waveforms, _ = random_waveforms(num_samples, num_samples)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = model.to(dtype)
        with torch.no_grad(), plain_paths(is_plain):
            expected, _ = model(waveforms.to(dtype))
            found = pushed(Stream(model, batch=2), waveforms, sizes)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_one_stream_has_no_batch(family, size):
    model = streaming_model(family, size)
    (waveform,), _ = random_waveforms(1000)
    stream = Stream(model)
    assert stream.push(waveform[:3]).shape == (0, model.config["encoder_embed_dim"])
    with torch.no_grad():
        expected, _ = model(waveform[None])
    torch.testing.assert_close(torch.cat([stream.push(waveform[3:].numpy()), stream.finish()]), expected[0])


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_the_future_changes_nothing(family, size):
    """Frames that were given out do not depend on what comes; in the whole pass as well, hidden states included."""
    model, extractor = streaming_model(family, size), streaming_model(family, size).feature_extractor
    waveforms, _ = random_waveforms(2000)
    heard = 3 * extractor.hop + extractor.num_samples(4) - extractor.hop
    other = waveforms.clone()
    other[:, heard:] = 5 * torch.randn(1, 2000 - heard)
    streams = [Stream(model, batch=1) for _ in range(2)]
    first, second = (stream.push(sound) for stream, sound in zip(streams, (waveforms, other), strict=True))
    assert first.size(1) > 12 and torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:16], second[:, 12:16])
    with torch.no_grad():
        states = [model.extract_features(sound)[0] for sound in (waveforms, other)]
    for one, two in zip(*states, strict=True):
        torch.testing.assert_close(one[:, :12], two[:, :12])


@pytest.mark.parametrize(("family", "size"), FAMILIES)
@pytest.mark.parametrize("is_plain", [False, True])
def test_padding_changes_nothing(family, size, is_plain):
    model = streaming_model(family, size).double()
    waveforms, lengths = random_waveforms(1500, 1111, 60)
    with torch.no_grad(), plain_paths(is_plain):
        frames, num_frames = model(waveforms.double(), lengths)
        for row, (length, count) in enumerate(zip(lengths.tolist(), num_frames.tolist(), strict=True)):
            alone, _ = model(waveforms[row : row + 1, :length].double())
            torch.testing.assert_close(frames[row, :count], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_fast_paths_are_plain_paths(family, size):
    """With masks and gradients too."""
    config = with_masks(streaming_config(family, size), PRUNING_UNITS)
    waveforms, lengths = random_waveforms(900, 700)
    gradients, outputs = [], []
    for is_plain in (False, True):
        model = random_model(config).double()
        with plain_paths(is_plain):
            output, _ = model(waveforms.double(), lengths)
            output.square().mean().backward()
        outputs.append(output)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert len(gradients[0]) > 50


def test_at_the_end_norms_are_those_of_the_whole():
    """From the first second on the moments are those of what was heard: at the end, the offline norm's."""
    (waveform,), _ = random_waveforms(40_000)
    running = RunningMoments(1, 1)
    hops = waveform.double().view(-1, 4000)
    heard = running.nothing(1)
    for number, samples in enumerate(hops, start=1):
        heard = heard + running.sums(samples[None], torch.tensor([4000]))
        mean, covariance = running(heard)
        sofar = waveform[: 4000 * number].double()
        missing = max(0, 16_000 - 4000 * number)
        assert float(mean) == pytest.approx(float(sofar.sum()) / (len(sofar) + missing))
        if not missing:
            assert float(covariance) == pytest.approx(float(sofar.var(correction=0)))
    expected = normalize_waveforms(waveform[None])[0]
    torch.testing.assert_close(((waveform - mean) * (covariance[0] + 1e-5).rsqrt())[0].float(), expected)


def test_the_last_chunk_is_normalised_as_the_whole_utterance():
    """A base model's extractor: where one chunk holds more than a second, its frames are the offline ones."""
    config = small_config("hubert", "base")
    offline = random_model(config)
    chunk = offline.feature_extractor.num_frames(20_000)
    model = random_model({**config, "encoder_chunk_frames": chunk})
    assert model.load_state_dict(offline.state_dict(), strict=False).missing_keys == [
        "feature_extractor.heard.prior_mean",
        "feature_extractor.heard.prior_products",
    ]
    waveforms, _ = random_waveforms(offline.feature_extractor.num_samples(chunk))
    with torch.no_grad():
        found, expected = (each.feature_extractor(waveforms, None)[0] for each in (model, offline))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_taps_of_the_far_past_go_first():
    config = with_masks(streaming_config("hubert", "base"), ["posconv"])
    model = random_model(config)
    convolution = model.encoder.transformer.pos_conv_embed
    convolution.hard_concrete.log_alpha.data[:] = torch.tensor(
        [9.0] * 3 + [-9.0] * (config["encoder_pos_conv_kernel"] - 3)
    )
    frames = torch.randn(1, 30, model.encoder.embed_dim)
    with torch.no_grad():
        expected = convolution.eval()(frames)
        taps = convolution.conv.weight_v[..., -3:].clone()
        pruned = copy.deepcopy(convolution)
        pruned.prune()
        assert torch.equal(pruned.conv.weight_v, taps)
        torch.testing.assert_close(pruned(frames), expected)


def test_a_config_that_does_not_stream_is_as_before():
    config = random_model(small_config("wavlm")).config
    assert not {key for key in config if "chunk" in key or "left" in key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_chunk_frames": 0}, "encoder_chunk_frames: expected .*, found 0"),
        ({"encoder_chunk_frames": "16"}, "encoder_chunk_frames: expected .*, found '16'"),
        ({"encoder_left_frames": -1}, "encoder_left_frames: expected"),
        ({"encoder_chunk_frames": None}, "encoder_left_frames: expected 0, found 6 without encoder_chunk_frames"),
        ({"normalize_waveform": True}, "normalize_waveform: expected False in a streaming model with a GroupNorm"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        random_model({**streaming_config("hubert", "base"), **changes})


def test_the_first_norm_hears_every_window_once():
    """Over many chunks: the last chunk's moments are those of the whole, as the offline norm takes them."""
    model = streaming_model("hubert", "base")
    extractor, found = model.feature_extractor, []
    plain = extractor.chunk_frame_features

    def spy(chunks: Tensor, lengths: Tensor, moments: Any) -> Tensor:
        found.append(moments)
        return plain(chunks, lengths, moments)

    extractor.chunk_frame_features = spy
    num_chunks = -(-20_000 // extractor.hop)
    waveforms, _ = random_waveforms(extractor.num_samples(4 * num_chunks))
    with torch.no_grad():
        extractor(waveforms, None)
    expected = fast._moments(waveforms, extractor.conv_layers[0].conv)
    ((mean, covariance),) = found
    torch.testing.assert_close((mean[-1:], covariance[-1:]), expected)
