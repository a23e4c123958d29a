"""Features and the encoder's outputs from their files, and the masks of SpecAugment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_helpers import write_table

import audio
import features
from speech_data import load_split, sound_prints
from whisper_models import load_whisper


@pytest.fixture
def made(tones, tmp_path):
    """Features of the test part at a window of two seconds, and its clips."""
    part = load_split(tones, "test")
    return features.features_of(part.clips, sound_prints(part.clips), part.seconds, 80, 2, tmp_path), part


def test_the_features_are_whispers_own(made):
    heard, part = made
    compute = features.log_mel(80, 2)
    for number, clip in enumerate(part.clips):
        expected = compute(audio.read(clip.path, clip.where))
        assert expected.shape == (80, 200)
        np.testing.assert_array_equal(heard.of(number).numpy(), expected)
        # A recording's own frames, one that reaches over its end, and one for the rest.
        assert 0 <= heard.own_frames(number) - part.seconds[number] * 100 <= 4
    assert len(heard.values) < len(part.clips) * 80 * 200


def test_nothing_is_decoded_twice_and_another_sound_is_not_taken_for_it(made, tmp_path, monkeypatch, capsys):
    heard, part = made
    with monkeypatch.context() as patch:
        patch.setattr(audio, "read", lambda *_: pytest.fail("decoded twice"))
        again = features.features_of(part.clips, sound_prints(part.clips), part.seconds, 80, 2, tmp_path)
    assert torch.equal(again.of(0), heard.of(0))
    assert not capsys.readouterr().out
    other = features.features_of(part.clips, ["x", "y", "z"], part.seconds, 80, 2, tmp_path)
    # Of 0.4, 0.4 and 0.6 s, 80 numbers of four bytes a frame, 100 frames a second and three more at the most.
    assert "features of 3 recordings: about 0.0 MB" in capsys.readouterr().out
    assert other.key != heard.key != features.features_of(part.clips[:2], ["x", "y"], [1.0, 1.0], 80, 2, tmp_path).key


def test_what_breaks_off_leaves_nothing_behind(tmp_path):
    write_table(tmp_path / "data", "test", ["do", "re"])
    part = load_split(tmp_path / "data", "test")
    (tmp_path / "data" / "test_1.wav").write_bytes(b"no longer a recording")
    with pytest.raises(ValueError, match=r"test\.tsv, line 3: .*test_1.wav cannot be read"):
        features.features_of(part.clips, ["a", "b"], part.seconds, 80, 2, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_the_encoders_outputs_are_kept(made, whispers, tmp_path, monkeypatch):
    heard, part = made
    model = load_whisper(str(whispers["english"]), window=2)
    found = features.encoded_of(heard, model, "a model", tmp_path)
    assert not model.get_encoder().training or model.training
    batch = torch.stack([heard.of(number) for number in range(len(part.clips))])
    with torch.no_grad():
        expected = model.eval().get_encoder()(batch).last_hidden_state
    assert torch.equal(torch.stack([found.of(number) for number in range(len(found))]), expected)
    monkeypatch.setattr(model.get_encoder(), "forward", lambda *_: pytest.fail("computed twice"))
    assert torch.equal(features.encoded_of(heard, model, "a model", tmp_path).of(1), expected[1])


TOGETHER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import features

def make(new):
    print("makes", flush=True)
    time.sleep(0.5)
    (new / "values").write_text("whole")

print("ready", flush=True)
sys.stdin.readline()
folder = Path(sys.argv[2])
features._fill(folder, make)
assert (folder / "values").read_text() == "whole"
"""


def test_of_two_processes_one_makes_what_both_need(tmp_path):
    command = [sys.executable, "-c", TOGETHER, str(Path(features.__file__).parent), str(tmp_path / "features_x")]
    ways = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **ways) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(out for out, _ in said) == ["", "makes\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["features_x"]


@pytest.mark.parametrize("damage", [lambda content: content[:-1000], lambda content: content[:-3], lambda content: b""])
@pytest.mark.parametrize("kind", ["features", "encoded"])
def test_a_damaged_folder_of_the_cache_is_named(kind, damage, made, whispers, tmp_path):
    _, part = made

    def read():
        again = features.features_of(part.clips, sound_prints(part.clips), part.seconds, 80, 2, tmp_path)
        return features.encoded_of(again, load_whisper(str(whispers["english"]), window=2), "a model", tmp_path)

    before = read().of(0)
    (file,) = tmp_path.glob(f"{kind}_*/values.*")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file.parent} is damaged \(.*\): remove it"):
        read()
    shutil.rmtree(file.parent)
    assert torch.equal(read().of(0), before)


def test_masks_are_of_copies_within_the_recording_and_as_wide_as_they_may_be():
    values = torch.randn(40, 80, 300)
    before, own = values.clone(), [200] * 40
    torch.manual_seed(1)
    masked = features.spec_augment(values, own)
    torch.manual_seed(1)
    assert torch.equal(features.spec_augment(values, own), masked) and torch.equal(values, before)
    for one, original in zip(masked, before, strict=True):
        changed = one != original
        assert torch.allclose(one[changed], original[:, :200].mean(), atol=1e-6)
        bands = changed[:, 250]  # behind the recording's end only bands of frequency reach
        assert bands.sum() <= 2 * 24
        assert changed[~bands].any(dim=0).sum() <= 2 * 20 and not changed[~bands][:, 200:].any()
    assert (masked != before).any(dim=(1, 2)).all()
