"""What `import vblora` brings, and what it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import vblora


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_nothing_heavy():
    code = "import sys, vblora; print([m for m in ('torch', 'numpy', 'transformers', 'peft') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_using_it_needs_torch_alone():
    code = (
        "import sys, vblora; vblora.attach; vblora.AdamW; vblora.load; vblora.TiedLoRAConfig; "
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'safetensors') if m in sys.modules])"
    )
    assert run_python(code) == "['torch']"


@pytest.mark.parametrize("name", vblora.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert name in dir(vblora)
    assert getattr(vblora, name).__doc__


def test_each_method_is_known_whatever_was_imported_first():
    code = "import vblora; vblora.load; print(sorted(c.method for c in vblora.Adapter.methods))"
    assert run_python(code) == "['lora_xs', 'tied_lora', 'vblora', 'vblora_selection']"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        vblora.nonesuch  # noqa: B018


@pytest.mark.parametrize("command", [["merge", "m", "OUT"], ["export", "m", "OUT"]], ids=["merge", "export"])
def test_commands_on_models_without_transformers_are_one_line(command, tmp_path):
    adapter = vblora.attach(torch.nn.Sequential(torch.nn.Linear(16, 16)), vblora.TiedLoRAConfig(target_modules=["0"]))
    adapter.save(tmp_path / "adapter")
    given = [str(tmp_path / "out") if part == "OUT" else part for part in command]
    code = (
        "import sys; sys.modules['transformers'] = None; from vblora import cli; "
        f"sys.exit(cli.main({[*given, '--adapter', str(tmp_path / 'adapter')]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("vblora: error: ") and "pip install transformers" in line
    assert not (tmp_path / "out").exists()
