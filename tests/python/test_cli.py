"""The `icecache` command: what it prints, and how it ends on bad input."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import icecache
import pytest
import torch
from icecache.cli import app, findings
from icecache.models.cache import make_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner, Result

CONTEXT = 512
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def save_tokenizer(folder: Path) -> None:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(str(folder))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 512 positions; does not end by itself."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(str(folder))
    save_tokenizer(folder)
    return folder


def document(folder: Path, tokens: int) -> Path:
    path = folder / "document.txt"
    path.write_text(("All cats are grey at night. " * 99)[:tokens])
    return path


# --- the command


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("demo", "generate", "doctor", "config"):
        assert name in result.stdout


def test_start_is_quick() -> None:
    code = "import sys, icecache.cli; print(*{'torch', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
    # CPU time, beside that of typer's imports: other work on the machine does not count.
    least = min(_cpu_seconds("-c", "import typer, rich.console, rich.table") for _ in range(3))
    assert min(_cpu_seconds("-m", "icecache", "--help") for _ in range(3)) < 6 * least


def _cpu_seconds(*arguments: str) -> float:
    """Of this Python with `arguments`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "icecache", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == icecache.__version__


def test_an_error_is_one_line_on_stderr_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "icecache", "generate", str(tmp_path / "absent"), "-p", "x"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f'error: model must be a local folder or "smollm2", got {tmp_path / "absent"}'
    ]


def test_debug_raises(tmp_path: Path) -> None:
    result = run("--debug", "generate", str(tmp_path / "absent"), "-p", "x")
    assert isinstance(result.exception, icecache.InvalidArgument)


def test_an_unforeseen_error_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Path:
        raise TypeError("odd")

    monkeypatch.setattr("icecache.models.local.model_folder", fail)
    result = run("generate", "model", "-p", "x")
    assert result.exit_code == 1
    assert result.stderr == "error: TypeError: odd (icecache --debug ... shows where)\n"


# --- config


def test_config_lists_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run("config")
    assert result.exit_code == 0
    markdown = run("config", "--markdown").stdout.splitlines()
    fields = icecache.config_fields()
    assert len(markdown) == 2 + len(fields)
    for field, row in zip(fields, markdown[2:], strict=True):
        assert field.name in result.stdout
        assert row.startswith(f"| `{field.name}` | ")
        assert row.endswith(f" | {field.unit} | {field.meaning} |")
        assert field.default in row


# --- doctor


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICECACHE_CACHE", str(tmp_path))
    return tmp_path


def parts(result: Result) -> dict[str, dict[str, str]]:
    return {finding["part"]: finding for finding in json.loads(result.stdout)["findings"]}


@pytest.mark.usefixtures("empty_cache")
def test_a_wrong_simd_level_is_found_by_doctor_and_refused_by_engines() -> None:
    environment = {**os.environ, "ICECACHE_SIMD": "sse9"}
    command = [sys.executable, "-m", "icecache", "doctor", "--json"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    simd = {one["part"]: one for one in json.loads(found.stdout)["findings"]}["SIMD"]
    assert simd["state"] == "broken"
    assert simd["found"] == 'ICECACHE_SIMD must be scalar, avx2, avx512 or avx512vnni, got "sse9"'
    assert simd["advice"] == "unset ICECACHE_SIMD"


@pytest.mark.usefixtures("empty_cache")
def test_doctor_says_what_is_there_and_how_to_get_the_rest() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["healthy"] is True
    found = parts(result)
    build = icecache.build_info()
    assert found["icecache"]["found"].startswith(icecache.__version__)
    assert found["torch"] == {
        "part": "torch",
        "state": "ok",
        "found": metadata.version("torch"),
        "advice": "",
    }
    assert icecache.simd_level() in found["SIMD"]["found"]
    assert (found["CUDA kernels"]["state"] == "ok") == build.cuda
    assert (found["FAISS"]["state"] == "ok") == build.faiss
    assert build.faiss or "libfaiss-dev" in found["FAISS"]["advice"]
    assert found["demo model"]["state"] == "absent"
    assert "icecache demo" in found["demo model"]["advice"]


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("driver", [False, True])
def test_doctor_tells_a_missing_gpu_from_one_that_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    if torch.cuda.is_available() or icecache.build_info().cuda:
        pytest.skip("needs a build without CUDA on a machine without a GPU")
    monkeypatch.setattr(findings, "_DRIVER", [tmp_path if driver else tmp_path / "absent"])
    found = {one.part: one for one in findings.findings()}
    kernels, devices = found["CUDA kernels"], found["CUDA devices"]
    assert kernels.state == devices.state == "absent"
    if driver:
        assert "this machine has a GPU" in kernels.found and "ICECACHE_CUDA=ON" in kernels.advice
        assert torch.__version__ in devices.found and devices.advice
    else:
        assert "without a GPU" in kernels.found and "no driver" in devices.found
        assert kernels.advice == devices.advice == ""


@pytest.mark.usefixtures("empty_cache")
def test_doctor_prints_a_table() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for part in ("torch operators", "CPU", "memory", "CUDA devices"):
        assert part in result.stdout


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("version", "expected"), [(None, "not installed"), ("4.57.1", "4.57.1 is older than 5.16")]
)
def test_doctor_fails_where_something_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, version: str | None, expected: str
) -> None:
    real = metadata.version

    def pretended(name: str) -> str:
        if name != "transformers":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretended)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["healthy"] is False
    assert parts(result)["transformers"] == {
        "part": "transformers",
        "state": "broken",
        "found": expected,
        "advice": "pip install 'transformers>=5.16'",
    }


def test_doctor_finds_a_damaged_model(empty_cache: Path) -> None:
    folder = empty_cache / "SmolLM2-135M-Instruct"
    make_folder(folder, lambda new: [(new / "model.safetensors").write_bytes(b"weights")].clear())
    assert parts(run("doctor", "--json"))["demo model"]["state"] == "ok"
    (folder / "model.safetensors").write_bytes(b"w")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert "expected 7 bytes, got 1; delete" in parts(result)["demo model"]["found"]


# --- generate


def test_generate_gives_the_tokens_of_the_stock_model(tiny: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(str(tiny))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tiny))
    inputs = tokenizer("All cats are grey", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    arguments = ("generate", str(tiny), "-p", "All cats are grey", "-n", "12")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert "prompt 17 tokens in" in result.stderr
    assert "answer 12 tokens in" in result.stderr
    assert "attention was full" in result.stderr
    stock = run(*arguments, "--full")
    assert stock.stdout == expected + "\n"
    assert "attention" not in stock.stderr


def test_generate_without_loss(tiny: Path, tmp_path: Path) -> None:
    path = str(document(tmp_path, 400))
    arguments = ("generate", str(tiny), "-f", path, "-p", "So?", "-n", "20")
    small = ("--set", "page_size=8", "--set", "sink_tokens=1", "--set", "window_tokens=4")
    result = run(*arguments, "--lossless", "--token-budget", "16", *small)
    assert result.exit_code == 0, result.stderr
    assert "tokens drafted" in result.stderr
    assert result.stdout == run(*arguments, "--full").stdout


def test_generate_reports_what_a_budget_left_out(tiny: Path, tmp_path: Path) -> None:
    path = str(document(tmp_path, 400))
    settings = ("--set", "index=dci", "--set", "page_size=8")
    result = run(
        "generate", str(tiny), "-f", path, "-p", "So?", "-n", "5", "--token-budget", "64", *settings
    )
    assert result.exit_code == 0, result.stderr
    assert "prompt 405 tokens" in result.stderr  # with the empty line between
    assert "attention mass attended exactly" in result.stderr
    assert "0.0 MiB on the device" not in result.stderr


def test_generate_reports_what_a_prompt_left_out(tiny: Path, tmp_path: Path) -> None:
    path = str(document(tmp_path, 480))
    settings = ("--set", "prefill_budget=16", "--set", "prefill_chunk=64")
    result = run("generate", str(tiny), "-f", path, "-n", "5", "--token-budget", "64", *settings)
    assert result.exit_code == 0, result.stderr
    assert "% of the prompt attended within prefill_budget; attention mass" in result.stderr


def test_generate_uses_the_chat_template(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    assert "prompt 4 tokens" in run("generate", str(folder), "-p", "Hi", "-n", "1").stderr
    assert (
        "prompt 2 tokens" in run("generate", str(folder), "-p", "Hi", "--plain", "-n", "1").stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt or --prompt-file is needed, got neither"),
        (["-p", "x", "--set", "page_size"], "--set must be NAME=VALUE, got 'page_size'"),
        (
            ["-p", "x", "--set", "pagesize=8"],
            'no parameter "pagesize"; the nearest name is "page_size"',
        ),
        (["-p", "x", "--set", "page_size=17"], "page_size must be 8, 16 or 32, got 17"),
        (["-p", "x", "--set", "page_size=8", "--set", "page_size=16"], "page_size is given twice"),
        (
            ["-p", "x", "--token-budget", "30"],
            "token_budget must be at least sink_tokens + window_tokens + page_size "
            "= 4 + 16 + 16 = 36, got 30",
        ),
        (["-p", "x" * 500, "-n", "13"], f"{CONTEXT} tokens: 500 tokens of prompt + 13 to generate"),
    ],
)
def test_bad_arguments_are_refused(tiny: Path, arguments: list[str], message: str) -> None:
    result = run("generate", str(tiny), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_terminal_that_lacks_letters_ends_no_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        app(["generate", str(tiny), "-p", "All cats are grey", "-n", "24"], prog_name="icecache")
    sys.stdout.flush()
    assert ended.value.code in (0, None)
    assert content.getvalue().isascii() and b"?" in content.getvalue()


def test_the_whole_context_can_be_used(tiny: Path) -> None:
    result = run("generate", str(tiny), "-p", "x" * 500, "-n", "12")
    assert result.exit_code == 0, result.stderr
    assert "prompt 500 tokens" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"caf\xe9", "is not UTF-8 text (byte 3 is 0xe9)"),
        (b" \n", "is empty"),
    ],
)
def test_unreadable_documents_are_refused(
    tiny: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "document.txt"
    if content is not None:
        path.write_bytes(content)
    result = run("generate", str(tiny), "-f", str(path), "-p", "So?")
    assert result.exit_code == 2
    assert result.stderr == f"error: {path} {message}\n"


def test_a_folder_is_not_a_document(tiny: Path) -> None:
    result = run("generate", str(tiny), "-f", str(tiny), "-p", "So?")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tiny} cannot be read: Is a directory\n"


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("config.json", "configuration"),
        ("tokenizer.json", "tokenizer"),
        ("model.safetensors", "model"),
    ],
)
def test_damaged_models_are_refused(tiny: Path, tmp_path: Path, damaged: str, message: str) -> None:
    for file in tiny.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:50] if file.name == damaged else content)
    result = run("generate", str(tmp_path), "-p", "x")
    assert result.exit_code == 2
    assert f"error: the {message} in {tmp_path} does not load: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_prompts_are_not_made_longer_than_the_context(tiny: Path, tmp_path: Path) -> None:
    for suite, data in (("passkey", []), ("text", ["--data-dir", str(document(tmp_path, 2000))])):
        out = tmp_path / "run"
        lengths = ("--lengths", f"64,{CONTEXT + 1}", "--out", str(out))
        result = run("bench", suite, "--model", str(tiny), *data, *lengths)
        assert result.exit_code == 2
        expected = f"error: --lengths: expected at most {CONTEXT}, the context of {tiny}, got 513\n"
        assert result.stderr == expected and not out.exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    result = run("generate", str(tmp_path), "-p", "x")
    assert result.exit_code == 2
    assert f"model must be a folder with a config.json, got {tmp_path}" in result.stderr


def test_an_unsupported_model_is_refused(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=SHAPE["vocab_size"], hidden_size=32, n_layer=2, n_head=2)
    model: Any = BloomForCausalLM(config)
    model.save_pretrained(str(tmp_path))
    save_tokenizer(tmp_path)
    result = run("generate", str(tmp_path), "-p", "x")
    assert result.exit_code == 2
    assert "BloomForCausalLM does not use transformers' attention interface" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.model
def test_generate_with_the_small_model() -> None:
    result = run("generate", "smollm2", "-p", "What is the capital of France?", "-n", "24")
    assert result.exit_code == 0, result.stderr
    assert "Paris" in result.stdout
