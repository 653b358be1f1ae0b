"""The distribution as a user gets it: two packages from one place, a version, a command, an honest set-up script."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prefix_kernels
import prefix_tuning

ROOT = Path(__file__).resolve().parents[1]


def test_both_packages_come_from_one_root():
    kernels = Path(prefix_kernels.__file__).resolve().parent
    tuning = Path(prefix_tuning.__file__).resolve().parent
    this_checkout = (kernels, tuning) == (ROOT / "prefix_kernels", ROOT / "python" / "prefix_tuning")
    one_installation = kernels.parent == tuning.parent
    assert this_checkout or one_installation, f"mixed installation: {kernels} and {tuning}"


def test_installed_version_is_the_declared_one():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert importlib.metadata.version("prefix-kernels") == declared


def test_console_script_runs():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="prefix-tuning")
    assert entry.value == "prefix_tuning.cli:main"
    script = shutil.which("prefix-tuning", path=Path(sys.executable).parent)
    assert script, f"no prefix-tuning beside {sys.executable}"
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    for command in ("train", "evaluate", "generate", "doctor"):
        assert command in shown.stdout


def fake_python(folder: Path, body: str) -> Path:
    python = folder / "fake-python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 1", "older than Python 3.10"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "no venv module"),
    ],
)
def test_setup_names_what_is_missing(tmp_path, body, message):
    environment = os.environ | {"PYTHON": str(fake_python(tmp_path, body)), "VENV": str(tmp_path / "venv")}
    script = str(ROOT / "tools" / "setup_env.sh")
    failed = subprocess.run(["bash", script, "demo"], env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode != 0
    assert message in failed.stderr
