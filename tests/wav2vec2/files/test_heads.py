import copy
import json

import pytest
import torch
from helpers import TASK_HEADS, head_id, random_waveforms, task_contents, write_hub_folder

import wav2vec2
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import (
    Head,
    TaskModel,
    contents_of,
    greedy_units,
    head_of,
    task_model_of,
    with_head,
    without_head,
)


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
def test_file_gives_the_model_back_and_its_encoder_stays_plain(tmp_path, head):
    contents = task_contents(head)
    checkpoint.save(tmp_path / "model.pth", contents)
    read = checkpoint.read_model_file(tmp_path / "model.pth")
    model = task_model_of(read, tmp_path / "model.pth")
    assert (model.head_settings, model.kind, model.labels) == (head, head.kind, head.labels)
    written = contents_of(model)
    assert written["config"] == contents["config"] and head_of(written, "") == head
    for place in ("state_dict", "head"):
        found, wanted = (x[place].get("state_dict", x[place]) for x in (written, contents))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    # As any other program sees it: an encoder, of text with its output layer.
    encoder = checkpoint.model_of(read, "model.pth")
    assert type(encoder) is not TaskModel and (encoder.aux is None) == (head.kind != "text")
    plain = checkpoint.model_of(without_head(read), "model.pth")
    waveforms, lengths = random_waveforms(900, 500)
    states, _ = model.eval().extract_features(waveforms, lengths)
    expected, _ = plain.eval().extract_features(waveforms, lengths)
    assert plain.aux is None and all(map(torch.equal, states, expected))


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_padding_changes_nothing(family, head):
    # Of Base models the extractor's first norm takes the padding into its statistics, as everywhere.
    model = task_model_of(task_contents(head, family, "large"), "model.pth").eval()
    num_samples = (900, 500, 700)
    waveforms, lengths = random_waveforms(*num_samples)
    with torch.no_grad():
        logits, frames = model(waveforms, lengths)
        for row, count in enumerate(num_samples):
            alone, _ = model(waveforms[row : row + 1, :count])
            found = logits[row] if head.kind == "clips" else logits[row, : frames[row]]
            torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-5)
            assert alone.shape[-1] == head.num_outputs
    # A row that is too short for a frame spoils neither itself nor the others.
    assert model(waveforms, torch.tensor([900, 3, 700]))[0].isfinite().all()


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
def test_logits_are_what_forward_does_behind_the_encoder(head):
    model = task_model_of(task_contents(head, "wavlm", "large"), "model.pth").eval()
    waveforms, lengths = random_waveforms(900, 500)
    states, frames = model.extract_features(waveforms, lengths)
    output = model.encoder.transformer.layer_norm(states[-1])
    torch.testing.assert_close(model.logits(states, output, frames), model(waveforms, lengths)[0])


def test_heads_by_hand():
    """A softmax-weighted sum of layers, and a mean over valid frames with softmax weights of its own."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 5, 16, generator=generator) for _ in range(4)]
    output, lengths = torch.randn(2, 5, 16, generator=generator), torch.tensor([5, 3])
    for head in TASK_HEADS[2:]:
        model = task_model_of(task_contents(head), "model.pth")
        weights = dict(model.head.named_parameters())
        found = model.logits(states, output, lengths)
        for row, length in enumerate(lengths):
            x = output[row, :length]
            if head.layers == "weighted":
                shares = weights["layer_scores"].exp() / weights["layer_scores"].exp().sum()
                x = sum(share * state[row, :length] for share, state in zip(shares, states, strict=True))
            if head.kind == "clips":
                scores = torch.zeros(length)
                if head.pooling == "attentive":
                    scores = x @ weights["attention.weight"][0] + weights["attention.bias"]
                x = (scores.exp() / scores.exp().sum()) @ x
            expected = x @ weights["linear.weight"].T + weights["linear.bias"]
            torch.testing.assert_close(found[row] if head.kind == "clips" else found[row, :length], expected)


def test_fresh_head_knows_nothing_and_follows_its_generator():
    contents = task_contents(TASK_HEADS[0])
    heads = [with_head(contents, TASK_HEADS[2], "model.pth", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    first, same, other = (entry["head"]["state_dict"]["linear.weight"] for entry in heads)
    assert torch.equal(first, same) and not torch.equal(first, other) and 0 < first.abs().max() < 0.1
    assert not heads[0]["head"]["state_dict"]["linear.bias"].any()
    # The head that was there is gone, and with it the output layer.
    assert heads[0]["config"]["aux_num_out"] is None and not any("aux" in name for name in heads[0]["state_dict"])
    text = with_head(heads[0], TASK_HEADS[1], "model.pth")
    assert text["config"]["aux_num_out"] == 3 and text["state_dict"]["aux.weight"].shape == (3, 16)


def test_pruned_head_gives_the_same():
    for head in TASK_HEADS:
        contents = with_head(task_contents(head), head, "model.pth")
        contents["config"]["encoder_prune_embed_dim"] = True
        contents["state_dict"] |= {"encoder.hard_concrete.log_alpha": torch.tensor([5.0, -50.0, 5.0, 5.0])}
        model = task_model_of(contents, "model.pth").eval()
        waveforms, lengths = random_waveforms(900, 500)
        expected, _ = model(waveforms, lengths)
        config = model.prune()
        assert config["encoder_embed_dim"] == 12
        torch.testing.assert_close(model(waveforms, lengths)[0], expected, atol=1e-5, rtol=1e-5)
        task_model_of(contents_of(model), "pruned.pth")  # its files are strict, too


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "diarisation"}, "kind: expected one of text, clips, segments, found 'diarisation'"),
        ({"kind": []}, "kind: expected one of"),
        ({"labels": []}, r"labels: expected names, found \[\]"),
        ({"labels": "yes"}, "labels: expected names, found 'yes'"),
        ({"labels": ["yes", 3, "up"]}, "labels: expected names"),
        ({"labels": ["yes", "no", "yes"]}, "labels: expected each once"),
        ({"labels": ["yes", "no"]}, r"head: .* shape \[3, 16\], expected \[2, 16\]"),
        ({"layers": "first"}, "layers: expected 'last' or 'weighted' with clips, found 'first'"),
        ({"pooling": None}, "pooling: expected 'mean' or 'attentive' with clips, found None"),
        ({"units": "words"}, "units: expected None with clips, found 'words'"),
        ({"layers": "last"}, "1 left over .layer_scores"),
        ({"pooling": "attentive"}, "2 missing .attention.weight"),
        ({"state_dict": {}}, "3 missing"),
        ({"state_dict": None}, "expected kind, labels, units, layers, pooling and a state_dict of names"),
        ({"state_dict": {3: torch.zeros(1)}}, "state_dict of names, found .*; the file is damaged"),
        ({"dropout": 0.1}, "found .*'dropout'"),
        ({"kind": "text", "units": "words", "layers": "last", "pooling": None}, "aux_num_out: expected 4"),
    ],
)
def test_damaged_head_is_refused(change, reason):
    contents = task_contents(Head("clips", ("yes", "no", "up"), layers="weighted", pooling="mean"))
    contents["head"] |= change
    with pytest.raises(UserError, match=rf"^model.pth: .*{reason}"):
        task_model_of(contents, "model.pth")


def test_labels_must_fit_the_output_layer():
    contents = task_contents(TASK_HEADS[0])
    contents["head"]["labels"].append("c")
    with pytest.raises(UserError, match="aux_num_out: expected 5 with a head of text and 4 labels, found 4"):
        task_model_of(contents, "model.pth")
    contents = task_contents(TASK_HEADS[2])
    contents["config"]["aux_num_out"] = 3
    with pytest.raises(UserError, match="aux_num_out: expected None with a head of clips and 3 labels, found 3"):
        task_model_of(contents, "model.pth")


def test_head_that_is_missing_or_lacks_a_setting():
    contents = task_contents(TASK_HEADS[2])
    lacking = copy.deepcopy(contents)
    del lacking["head"]["layers"], contents["head"]
    with pytest.raises(UserError, match="head: expected kind, labels, units, layers, pooling and"):
        task_model_of(lacking, "model.pth")
    with pytest.raises(UserError, match="without a task head"):
        task_model_of(contents, "model.pth")
    assert head_of(contents, "model.pth") is None


def test_greedy_units_drop_repeats_then_blanks():
    best = torch.tensor([0, 2, 2, 0, 2, 1, 1, 0, 0])
    assert greedy_units(torch.nn.functional.one_hot(best, 3)) == [1, 1, 0]
    assert greedy_units(torch.zeros(0, 3)) == []


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
def test_folder_of_the_hub_keeps_the_head(tmp_path, head):
    model = task_model_of(task_contents(head), "model.pth").eval()
    write_hub_folder(tmp_path, contents_of(model))
    contents = checkpoint.read_model_file(tmp_path)
    checkpoint.save(tmp_path / "model.pth", contents)
    waveforms, lengths = random_waveforms(900, 500)
    for source in (tmp_path, tmp_path / "model.pth"):
        loaded = wav2vec2.load(source)
        assert isinstance(loaded, TaskModel) and loaded.head_settings == head
        assert torch.equal(loaded(waveforms, lengths)[0], model(waveforms, lengths)[0])
        found = wav2vec2.extract(loaded, waveforms[0])
        for states, expected in zip(found, model.extract_features(waveforms[:1])[0], strict=True):
            torch.testing.assert_close(states, expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head": None}, "weights do not fit the model: 0 missing, 3 left over .head.layer_scores"),
        ({"head": "clips"}, "head: expected kind, labels, .* and a state_dict of names, found 'clips'"),
        ({"head": {}}, "head: expected kind, labels, .* and a state_dict of names, found ..state_dict"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, change, reason):
    contents = task_contents(Head("clips", ("yes", "no"), layers="weighted", pooling="mean"))
    write_hub_folder(tmp_path, contents)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    with pytest.raises(UserError, match=reason):
        wav2vec2.load(tmp_path)
