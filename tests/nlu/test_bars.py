"""Progress bars: seen on a terminal, nowhere else, and never on the standard output."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from vblora_experiments import bars, board, schedule

ROOT = Path(__file__).resolve().parents[2]


def on_a_terminal(command, **more):
    """What a command prints, and what a terminal shows of its errors."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != bars.SWITCH}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    shown = []

    def read():
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # nobody has the other side open any more
                return
            if not part:
                return
            shown.append(part)

    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=its, env=environment)
    os.close(its)
    reader = threading.Thread(target=read)
    reader.start()
    out = process.communicate(timeout=580)[0].decode()
    reader.join()
    os.close(ours)
    errors = b"".join(shown).decode(errors="replace")
    assert process.returncode == 0, errors
    return out, errors


def test_reproduce_has_a_bar_over_the_runs_and_that_of_the_running_one(encoder, data, tmp_path):
    for name, target in (("models/roberta-base", encoder), ("glue/CoLA", data)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
    command = [str(ROOT / "NLU" / "reproduce.py"), "table1", "--sizes", "base", "--tasks", "cola", "--seeds", "0"]
    command += [
        "--methods",
        "vblora_qv",
        "--glue_dir",
        str(tmp_path / "glue"),
        "--models_dir",
        str(tmp_path / "models"),
    ]
    command += ["--runs", str(tmp_path / "runs"), "--", "--num_train_epochs", "6", "--vector_length", "16"]
    command += ["--max_length", "32", "--use_cpu", "true"]
    out, shown = on_a_terminal(command)
    [log] = (tmp_path / "runs").glob("*.log")
    steps = {int(total) for done, total in re.findall(rf"{log.stem}\D*?[^|]*\|[^|]*\| (\d+)/(\d+) \[", shown)}
    assert 12 in steps  # 6 epochs of two batches
    assert re.search(r"runs: +0%\|[^|]*\| 0/1 \[", shown) and "done after" in shown
    assert "%|" not in out and out.startswith("| model | method |")
    assert re.search(r"12/12 \[", log.read_text())


def test_the_page_of_records_has_bars_and_the_switch_takes_them_away(tmp_path):
    record = ROOT / "results" / "cola_minilm" / "lora.json"
    command = [str(ROOT / "scripts" / "report.py"), str(record), "--output", str(tmp_path / "page.html")]
    out, shown = on_a_terminal(command)
    assert "reading" in shown and "drawing" in shown and "%|" not in out and "1 runs, 1 tables" in out
    out, shown = on_a_terminal(command, TQDM_DISABLE="1")
    assert shown.strip() == "" and "1 runs, 1 tables" in out


def test_when_bars_are_hidden(monkeypatch):
    monkeypatch.setattr(bars, "_of_run", [])
    monkeypatch.delenv(bars.SWITCH, raising=False)
    for is_terminal, switch, hidden in (
        *((True, None, False), (False, None, True)),
        *((True, "1", True), (False, "", False), (True, "0", True)),  # as tqdm takes it: any text
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        monkeypatch.setenv(bars.SWITCH, switch) if switch is not None else monkeypatch.delenv(
            bars.SWITCH, raising=False
        )
        assert bars.are_hidden() == hidden, (is_terminal, switch)
    bars.follow(True)  # --disable_tqdm true, on a terminal
    assert bars.are_hidden()


@pytest.mark.parametrize(("told", "disabled"), [([], True), (["--disable_tqdm", "false"], False)])
def test_a_run_without_a_terminal_has_no_bars_unless_asked_for(encoder, data, tmp_path, monkeypatch, told, disabled):
    import run_glue

    monkeypatch.setattr(bars, "_of_run", [])
    monkeypatch.delenv(bars.SWITCH, raising=False)
    command = ["--model_name_or_path", str(encoder), "--task", "cola", "--use_cpu", "true", "--data_dir", str(data)]
    settings = run_glue.read([*command, "--output_dir", str(tmp_path), *told])
    assert run_glue.parts(settings)[2].disable_tqdm is disabled
    assert settings.overrides == run_glue.read([*command, "--output_dir", str(tmp_path)]).overrides


def test_the_last_bar_of_a_log_is_found_and_is_not_its_last_line(tmp_path):
    log = tmp_path / "one.log"
    log.write_bytes(b"before 9/9\rtry:  50%|##   | 1/2 [00:01<00:01]\n")
    begins = log.stat().st_size
    assert board.last_bar(log, begins) is None
    with log.open("ab") as file:
        file.write(b"\r  0%|          | 0/80 [00:00<?, ?it/s]\r 25%|##5       | 20/80 [00:02<00:06,  9.9it/s]")
        file.write(b"\n\rdecoding:  50%|#####     | 8/16 [00:02<00:02,  4.0it/s]\x1b[A\r\x1b[A\r")
        file.write(b"cola vblora: 0.5 at the last epoch, 100%|half\n\r\x1b[A\r")
    assert board.last_bar(log, begins) == ("decoding", 8, 16)
    assert schedule.last_line(log) == "cola vblora: 0.5 at the last epoch, 100%|half"
