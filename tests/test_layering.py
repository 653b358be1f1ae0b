"""Who may import whom (the table in docs/architecture.md), read from the source; and what importing really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prefix_kernels

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): file
    for base in (ROOT, ROOT / "python")
    for package in ("prefix_kernels", "prefix_tuning")
    for file in sorted((base / package).rglob("*.py"))
}
READS_ENVIRONMENT = {"prefix_kernels.select", "prefix_tuning.offline_model"}

# The first pattern that fits a module gives all it may import besides the standard library, also inside functions.
ALLOWED = {
    "prefix_kernels.backends.triton": {"torch", "triton", "prefix_kernels.problem"},
    "prefix_kernels.backends.sdpa.merge": {"torch", "triton", "prefix_kernels.problem"},
    "prefix_kernels.backends": {"torch", "prefix_kernels.problem"},
    "prefix_kernels.problem": {"torch"},
    "prefix_kernels.select": {"torch", "prefix_kernels.problem", "prefix_kernels.backends"},
    "prefix_kernels.ops": {"torch", "prefix_kernels.problem", "prefix_kernels.select"},
    "prefix_kernels.validate": {"torch"},
    "prefix_kernels.repeated": {"torch", "prefix_kernels.problem", "prefix_kernels.select", "prefix_kernels.ops"},
    "prefix_kernels.api": {"torch", "prefix_kernels.problem", "prefix_kernels.select", "prefix_kernels.ops",
                           "prefix_kernels.repeated", "prefix_kernels.validate"},
    "prefix_kernels": {"prefix_kernels.api", "prefix_kernels.select"},
    "prefix_tuning.prefix": {"torch", "huggingface_hub", "prefix_tuning.stacks", "prefix_tuning.shapes",
                             "prefix_tuning.reparametrization", "prefix_tuning.prefix_files", "prefix_tuning.text_cache",
                             "prefix_tuning.peft_adapters", "prefix_tuning.prompts", "prefix_tuning.heads",
                             "prefix_tuning.text_layers", "prefix_tuning.devices"},
    "prefix_tuning.prefix_files": {"torch", "safetensors", "huggingface_hub", "prefix_tuning.shapes",
                                   "prefix_tuning.reparametrization", "prefix_tuning.files"},
    "prefix_tuning.peft_adapters": {"torch", "safetensors", "prefix_tuning.shapes", "prefix_tuning.files",
                                    "prefix_tuning.prefix_files", "prefix_tuning.heads"},
    "prefix_tuning.files": set(),
    "prefix_tuning.prompts": set(),
    "prefix_tuning.text_cache": {"torch", "transformers", "prefix_tuning.devices", "prefix_tuning.families",
                                 "prefix_tuning.multimodal_families",
                                 "prefix_tuning.stacks", "prefix_tuning.shapes"},
    "prefix_tuning.text_layers": {"torch", "transformers", "prefix_tuning.devices", "prefix_tuning.stacks",
                                  "prefix_tuning.shapes", "prefix_tuning.text_cache"},
    "prefix_tuning.stacks": {"torch", "prefix_tuning.families", "prefix_tuning.encoder_families",
                             "prefix_tuning.multimodal_families", "prefix_tuning.shapes"},
    "prefix_tuning.families": {"torch", "prefix_tuning.multimodal_families", "prefix_tuning.positions", "prefix_tuning.shapes"},
    "prefix_tuning.multimodal_families": set(),
    "prefix_tuning.positions": {"torch"},
    "prefix_tuning.heads": {"torch", "prefix_tuning.devices"},
    "prefix_tuning.encoder_families": {"prefix_tuning.shapes"},
    "prefix_tuning.shapes": {"torch"},
    "prefix_tuning.paged_cache": {"torch"},
    "prefix_tuning.engine_checks": {"prefix_tuning.shapes"},
    "prefix_tuning.served_prefixes": {"transformers", "prefix_tuning.prefix", "prefix_tuning.shapes", "prefix_tuning.stacks"},
    "prefix_tuning.vllm_connector": {"torch", "vllm", "prefix_tuning.engine_checks", "prefix_tuning.paged_cache",
                                     "prefix_tuning.prefix", "prefix_tuning.served_prefixes"},
    "prefix_tuning.vllm_server": {"vllm", "uvloop", "prefix_tuning.served_prefixes"},
    "prefix_tuning.serve": {"transformers", "vllm", "prefix_tuning.engine_checks", "prefix_tuning.offline_model",
                            "prefix_tuning.requests", "prefix_tuning.served_prefixes", "prefix_tuning.vllm_server"},
    "prefix_tuning.reparametrization": {"torch", "tqdm"},
    "prefix_tuning": {"prefix_kernels", "prefix_tuning", "accelerate", "matplotlib", "numpy", "peft", "sacrebleu",
                      "safetensors", "torch", "tqdm", "transformers"},
}  # fmt: skip


def within(module: str, parents) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def imported(name: str, file: Path):
    """Every module that `file` names in an import statement, at any depth: `from a import b` as a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    own_folder = {".".join(name.split(".")[:3])} if within(name, ["prefix_kernels.backends"]) else set()
    allowed = next(allowed for pattern, allowed in ALLOWED.items() if within(name, [pattern])) | own_folder
    for module in imported(name, FILES[name]):
        standard = module.split(".")[0] in sys.stdlib_module_names
        assert standard or within(module, allowed), f"{name} may not import {module}"
        if name.startswith("prefix_tuning") and within(module, ["prefix_kernels"]):
            assert module.removeprefix("prefix_kernels.") in prefix_kernels.__all__, f"{name}: {module} is not public"


@pytest.mark.parametrize("name", FILES)
def test_environment_and_length(name):
    source = FILES[name].read_text()
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(source))}
    if name not in READS_ENVIRONMENT:
        assert not names & {"environ", "getenv", "putenv"}, f"{name} reads the environment"
    assert len(source.splitlines()) <= 500, f"{name} has more than 500 lines"


def test_kernels_load_neither_transformers_nor_triton():
    code = "import sys, torch; before = set(sys.modules); import prefix_kernels; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "prefix_kernels" in loaded.split()
    assert not {"transformers", "triton", "prefix_tuning"} & {module.split(".")[0] for module in loaded.split()}
