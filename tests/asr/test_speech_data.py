"""Recordings and their tables: three forms, wrong rows by file and line, parts without near-duplicates."""

from __future__ import annotations

import gzip
import io
import shutil

import datasets
import numpy as np
import pytest
import soundfile
from speech_helpers import sound, write_table

import asterisk_prompts
import audio
import fleurs_parquet
import generate_speech
import speech_data
from normalisers import normaliser, unicode_safe
from speech_data import load_split, read_outputs, read_table


def test_the_three_forms_give_the_same_clips(tmp_path):
    tones = sound("do re", 16000)
    places = {"fleurs": "audio/test", "common_voice": "clips", "own": "."}
    tables = {
        "fleurs": "7\ta.wav\tDo re!\tdo re\td o\t6400\tMALE\n",
        "common_voice": "client_id\tpath\tsentence\tup_votes\nx\ta.wav\tDo re!\t2\n",
        "own": "text\tpath\nDo re!\ta.wav\n",
    }
    for form, place in places.items():
        (tmp_path / form / place).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / form / place / "a.wav", tones, 16000)
        (tmp_path / form / "test.tsv").write_text(tables[form])
        found = load_split(tmp_path / form, "test")
        assert [(c.text, c.name, c.path) for c in found.clips] == [
            ("Do re!", "a.wav", tmp_path / form / place / "a.wav")
        ]
        assert found.seconds == [pytest.approx(0.4)] and not found.notes
    (tmp_path / "common_voice" / "test.tsv").write_text('path\tsentence\nb\t"Do", re\n')
    (clip,) = read_table(tmp_path / "common_voice" / "test.tsv")
    assert clip.path.name == "b.mp3" and clip.text == '"Do", re'


def test_common_voices_quoting_is_taken_away_and_only_that(tmp_path):
    said = {
        '"""Do"", re."': '"Do", re.',
        '"""Do re."""': '"Do re."',
        '"Do re."': '"Do re."',  # a text within marks of its own, as it stands in older releases
        '"Do" or "re"': '"Do" or "re"',
        '""Do': '""Do',
    }
    rows = "".join(f"{number}.mp3\t{text}\n" for number, text in enumerate(said))
    (tmp_path / "test.tsv").write_text("path\tsentence\n" + rows)
    assert [clip.text for clip in read_table(tmp_path / "test.tsv")] == list(said.values())
    (tmp_path / "test.tsv").write_text("path\ttext\n" + rows)
    assert [clip.text for clip in read_table(tmp_path / "test.tsv")] == list(said)


def test_a_header_decides_the_form(tmp_path):
    table = tmp_path / "test.tsv"
    table.write_text("id\tpath\ttranscript\tspeaker\tgender\tage\taccent\n" + "\t".join("abcdefg") + "\n")
    with pytest.raises(ValueError, match=r"test\.tsv: its header has path, and neither sentence nor text"):
        read_table(table)
    table.write_text("path\tsentence\ttext\na.wav\tre\tdo\n")
    assert [(c.path, c.text) for c in read_table(table)] == [(tmp_path / "a.wav", "do")]
    (tmp_path / "clips").mkdir()
    assert [(c.path, c.text) for c in read_table(table)] == [(tmp_path / "clips" / "a.wav", "re")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b.wav\tdo\n", "line 3: no recording .*b.wav: put it there"),
        ("empty.wav\tdo\n", "line 3: .*empty.wav has no sound, it is empty or cut short"),
        ("noise.wav\tdo\n", r"line 3: .*noise.wav cannot be read .*WAV, FLAC, OGG and MP3 can"),
        ("long.wav\tdo\n", r"line 3: long.wav lasts 1.2 s, more than the window of 1 s: .*--long_clips leave_out"),
        ("a.wav\tdo\n", r"line 3: a\.wav a second time, after .*dev\.tsv, line 2: remove a row"),
        ("./x/.././a.wav\tdo\n", r"line 3: \./x/\.\./\./a\.wav a second time, after .*line 2 \(there as a\.wav\)"),
        ("c.raw\tdo\n", r"line 3: .*c\.raw cannot be read .*WAV, FLAC, OGG and MP3 can"),
        ("c.wav\tciao <|endoftext|> bello\n", r"line 3: the transcript .* has <\|endoftext\|>, .*: mend it"),
        ("c.wav\tsar\ufffd\n", "line 3: the transcript .* has a lost character: mend it"),
        ("c.wav\tsar?to\n", "line 3: .*lost character"),
        ("c.wav\t...\n", "line 3: .*has no word"),
        ("c.wav\n", "line 3: 1 columns instead of 2"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(row, message, tmp_path):
    for name, samples in {"a": sound("do"), "empty": np.zeros(0), "long": sound("do " * 6)}.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 8000)
    for name in ("noise.wav", "c.raw"):
        (tmp_path / name).write_bytes(b"this is no recording")
    (tmp_path / "dev.tsv").write_text("path\ttext\na.wav\tdo\n" + row, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"dev\.tsv, {message}"):
        load_split(tmp_path, "dev", window=1)


def test_a_recording_that_cannot_be_what_was_said_is_named(tmp_path):
    """A cut MP3 says how long it was; one sample that is NaN makes every value of the features NaN."""
    tones = sound("do re mi fa", 16000)
    for name, value in (("nan", np.nan), ("inf", -np.inf)):
        soundfile.write(tmp_path / f"{name}.wav", np.where(np.arange(len(tones)) == 5, value, tones), 16000, "FLOAT")
        with pytest.raises(
            ValueError, match=rf"^dev, line 2: .*{name}\.wav has samples that are NaN or infinite: mend"
        ):
            audio.read(tmp_path / f"{name}.wav", "dev, line 2")
    for ending in ("mp3", "flac", "ogg", "wav"):
        soundfile.write(tmp_path / f"whole.{ending}", tones, 16000)
        assert len(audio.read(tmp_path / f"whole.{ending}", "here")) == len(tones)
    whole = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^here: .*cut\.mp3 is cut short: 0\.\d s of 0\.8 s can be read: get it anew"):
        audio.read(tmp_path / "cut.mp3", "here")
    wav = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(wav[: len(wav) // 2])
    with pytest.raises(ValueError, match=r"^here: .*cut\.wav is cut short: 0\.4 s of 0\.8 s can be read: get it"):
        audio.inspect(tmp_path / "cut.wav", "here")
    place = wav.index(b"data") + 4
    # As programs write a header before they know how much follows, or the size of the file for that of the sound.
    for size in (0x7FFFFFDB, 0xFFFFFFFF, len(wav), len(wav) - place - 3):
        (tmp_path / "stream.wav").write_bytes(wav[:place] + size.to_bytes(4, "little") + wav[place + 4 :])
        assert len(audio.read(tmp_path / "stream.wav", "here")) == len(tones)
    (tmp_path / "x.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"here: .*x\.raw cannot be read"):
        audio.read(tmp_path / "x.raw", "here")


def test_stereo_8_bit_and_long_recordings_are_told(tmp_path):
    write_table(tmp_path, "dev", ["do", "re", "mi", "do re mi fa do re"])
    both = np.stack([sound("re"), np.zeros_like(sound("re"))], axis=1)
    soundfile.write(tmp_path / "dev_1.wav", both, 8000)
    soundfile.write(tmp_path / "dev_2.wav", sound("mi"), 8000, subtype="PCM_U8")
    found = load_split(tmp_path, "dev", window=1, long="leave_out")
    assert [clip.text for clip in found.clips] == ["do", "re", "mi"] and len(found.left_out) == 1
    assert ["line 5" in found.notes[0], "line 3" in found.notes[1], "line 4" in found.notes[2]] == [True] * 3
    samples = audio.read(found.clips[1].path, "here")
    # Half of the one channel's, at twice the rate.
    assert samples.shape == (2 * len(both),)
    assert np.abs(samples).max() == pytest.approx(0.25, abs=0.01)


def test_a_tone_keeps_its_pitch_at_16_khz():
    for rate in (8000, 22050, 48000):
        samples = audio.resampled(sound("mi", rate), rate)
        spectrum = np.abs(np.fft.rfft(samples))
        assert len(samples) == 3200
        assert np.argmax(spectrum) * 16000 / len(samples) == pytest.approx(1400, abs=5)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_split(tmp_path / "none", "test")
    with pytest.raises(ValueError, match=r"no folder of FLEURS .* or Common Voice"):
        load_split(tmp_path, "test")
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        load_split(tmp_path, "validation")
    for header in ("path\ttext\tText", "path\tsentence\tpath"):
        (tmp_path / "test.tsv").write_text(f"{header}\na.wav\tdo\tre\n")
        with pytest.raises(ValueError, match=r"test\.tsv: the column '(text|path)' is there twice: remove one"):
            load_split(tmp_path, "test")
    (tmp_path / "test.tsv").write_bytes("path\ttext\na.wav\tperché\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"test\.tsv, line 2: not UTF-8 text .*: save it as UTF-8"):
        load_split(tmp_path, "test")
    (tmp_path / "test.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match=r"no table of FLEURS .* its first line is 'a\\tb'"):
        load_split(tmp_path, "test")


def test_the_fingerprint_is_of_texts_and_sounds_wherever_they_lie(tmp_path):
    write_table(tmp_path / "one", "dev", ["do", "re"])
    shutil.copytree(tmp_path / "one", tmp_path / "other")

    def of(name):
        clips = load_split(tmp_path / name, "dev").clips
        return speech_data.fingerprint(clips, speech_data.sound_prints(clips))

    assert of("one") == of("other")
    soundfile.write(tmp_path / "other" / "dev_1.wav", sound("mi"), 8000)
    assert of("one") != of("other")


def test_outputs_may_be_empty_but_not_twice(tmp_path):
    table = tmp_path / "out.tsv"
    table.write_text("path\ttext\na.wav\tdo\nb.wav\t\n")
    assert read_outputs(table) == {"a.wav": "do", "b.wav": ""}
    table.write_text("path\ttext\na.wav\tdo\na.wav\tre\n")
    with pytest.raises(ValueError, match=r"out\.tsv, line 3: a.wav a second time"):
        read_outputs(table)


# What each normaliser makes of Hindi, French, Italian, and a text in decomposed form.
WORDS = {
    "नमस्ते, दुनिया!": ("नमस्ते दुनिया", "नमस त द न य"),
    "L’eau, c'est 'bon' — déjà": ("l'eau c'est bon déjà", "l eau c est bon déjà"),
    "l'inter\u00adno No. 5": ("l'interno no 5", "l inter\u00adno no 5"),
    "de\u0301ja\u0300": ("déjà", "déjà"),
}


@pytest.mark.parametrize("text", WORDS)
def test_the_unicode_normaliser_keeps_marks_and_apostrophes(text):
    safe, basic = WORDS[text]
    assert unicode_safe(text) == safe == unicode_safe(safe)
    assert normaliser("basic")(text) == basic


def test_english_needs_its_spellings(tmp_path):
    (tmp_path / "normalizer.json").write_text('{"colour": "color"}')
    assert normaliser("english", tmp_path)(" Twenty colours? The colour!") == "20 colours the color"
    with pytest.raises(ValueError, match=r"needs normalizer\.json.*--spellings"):
        normaliser("english")
    with pytest.raises(ValueError, match="unknown normaliser 'french'"):
        normaliser("french")


# --- FLEURS in Parquet files --------------------------------------------------------------------------------------


def parquet_part(folder, names, texts, **columns):
    """One part as the hub's branch has it: the recordings' bytes in the file."""
    sounds = []
    for name, text in zip(names, texts, strict=True):
        buffer = io.BytesIO()
        soundfile.write(buffer, sound(text, 16000), 16000, format="WAV")
        sounds.append({"bytes": buffer.getvalue(), "path": name})
    rows = {
        "id": list(range(len(texts))),
        "num_samples": [3200] * len(texts),
        "path": names,
        "audio": sounds,
        "transcription": texts,
        "raw_transcription": [f"{text.capitalize()}.\n" for text in texts],
        "gender": [0] * len(texts),
        **columns,
    }
    made = datasets.Dataset.from_dict({name: values for name, values in rows.items() if values is not None})
    folder.mkdir(parents=True)
    made.cast_column("audio", datasets.Audio(decode=False)).to_parquet(folder / "0000.parquet")


def test_fleurs_in_parquet_files_becomes_fleurs(tmp_path, capsys):
    for part, texts in {"train": ["do re", "mi"], "validation": ["re"], "test": ["fa mi"]}.items():
        names = [f"{part}{number}.wav" for number in range(len(texts))]
        parquet_part(tmp_path / "files" / part, names, texts)
    fleurs_parquet.main(["it_it", str(tmp_path / "it_it"), "--files", str(tmp_path / "files")])
    assert "train 2, dev 1, test 1" in capsys.readouterr().out
    found = load_split(tmp_path / "it_it", "train")
    assert [(clip.name, clip.text) for clip in found.clips] == [("train0.wav", "Do re."), ("train1.wav", "Mi.")]
    assert found.seconds == [pytest.approx(0.4), pytest.approx(0.2)]
    assert (tmp_path / "it_it" / "train.tsv").read_text().splitlines()[0].split("\t")[3:5] == ["do re", "d o | r e"]
    with pytest.raises(ValueError, match="exists: remove it"):
        fleurs_parquet.write("it_it", tmp_path / "it_it", tmp_path / "files")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"raw_transcription": None}, "no column raw_transcription: these are no files of FLEURS"),
        ({"names": ["a.wav", "a.wav"]}, "FLEURS, train, id 1: a.wav a second time"),
        ({"names": ["../../../a.wav", ""]}, "FLEURS, train, id 1: the row has no recording"),
    ],
)
def test_files_that_are_no_fleurs_leave_nothing(wrong, message, tmp_path):
    columns = {"names": ["a.wav", "b.wav"], **wrong}
    parquet_part(tmp_path / "files" / "train", columns.pop("names"), ["do", "re"], **columns)
    with pytest.raises(ValueError, match=message):
        fleurs_parquet.write("it_it", tmp_path / "it_it", tmp_path / "files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]


def test_without_the_hub_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vblora.hub.hub_in_reach", lambda: False)
    with pytest.raises(ValueError, match=r"google/fleurs it_it: the hub cannot be reached, .* use --files DIR"):
        fleurs_parquet.write("it_it", tmp_path / "it_it")
    with pytest.raises(ValueError, match=r"none/train/\*\.parquet"):
        fleurs_parquet.write("it_it", tmp_path / "it_it", tmp_path / "none")
    assert not list(tmp_path.iterdir())


# --- Debian's prompts ---------------------------------------------------------------------------------------------

PROMPTS = """; a comment
alfa: chiamata in attesa
beta: chiamata in attesa!
gamma: arrivederci
delta: la chiamata sar? inoltrata
digits/5: 5
eco: [tono]
silence/1: silenzio
missing: nessuna registrazione
zeta: premere il tasto
"""


def unpacked(root):
    """As `dpkg-deb -x` leaves the two packages of Italian."""
    sounds = root / "usr/share/asterisk/sounds/it_IT_m_Carlo"
    docs = root / "usr/share/doc/asterisk-core-sounds-it"
    docs.mkdir(parents=True)
    (docs / "core-sounds-it.txt.gz").write_bytes(gzip.compress(PROMPTS.encode()))
    for name in ("alfa", "beta", "gamma", "delta", "digits/5", "eco", "silence/1", "zeta"):
        (sounds / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(sounds / f"{name}.wav", sound("do"), 8000)
    return root


def test_prompts_become_tables_of_what_can_be_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(asterisk_prompts, "SHARES", {"test": 0.5, "dev": 0.25})
    root = unpacked(tmp_path / "root")
    asterisk_prompts.main(["it", str(tmp_path / "it"), "--root", str(root)])
    parts = {part: [clip.name for clip in load_split(tmp_path / "it", part).clips] for part in speech_data.SPLITS}
    assert sorted(name for names in parts.values() for name in names) == [
        f"sounds/{name}.wav" for name in ("alfa", "beta", "gamma", "zeta")
    ]
    assert any({"sounds/alfa.wav", "sounds/beta.wav"} <= set(names) for names in parts.values())
    assert "1 (digits), 2 (no speech), 1 (no recording)" in capsys.readouterr().out.replace(
        "1 (a lost character), ", ""
    )
    with pytest.raises(ValueError, match="has no usr/share/doc"):
        asterisk_prompts.write(tmp_path, "ru", tmp_path / "ru")


def test_texts_that_are_alike_lie_in_one_part():
    texts = {f"{n}": text for n, text in enumerate(["premere uno", "premere due", "linea", "grazie mille", "linea!"])}
    texts |= {f"long{n}": f"frase numero {'abcdefghij'[n] * 5} del tutto diversa {n}" for n in range(3)}
    plain = {name: unicode_safe(text) for name, text in texts.items()}
    groups = asterisk_prompts.clusters(plain)
    assert ["2", "4"] in groups and sorted(name for group in groups for name in group) == sorted(texts)
    for one in groups:
        for other in groups:
            if one is not other:
                assert not any(asterisk_prompts.alike(plain[a], plain[b]) for a in one for b in other)
    parts = asterisk_prompts.divided(texts)
    assert sum(map(len, parts.values())) == len(texts) and parts == asterisk_prompts.divided(texts)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_speaks_sentences(tmp_path):
    texts = generate_speech.sentences("it", None, 0)[:6]
    generate_speech.write(tmp_path / "it", "it", texts)
    found = [load_split(tmp_path / "it", part).clips for part in speech_data.SPLITS]
    assert [len(clips) for clips in found] == [4, 1, 1]
    assert [clip.text for clips in found for clip in clips] == texts
    with pytest.raises(ValueError, match="espeak-ng -v xx-nonesuch failed"):
        generate_speech.write(tmp_path / "xx", "xx-nonesuch", texts)
    with pytest.raises(ValueError, match="the grammar has en, it"):
        generate_speech.sentences("fi", None, 0)
