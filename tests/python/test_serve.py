"""icecache serve, short of vLLM itself: its flags, its environment, what it says of a start."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from icecache.cli import app, environment
from icecache.cli.server_command import Flags, server_command, server_environment
from icecache.cli.server_process import run_server
from icecache.cli.server_settings import model_shape
from icecache.cli.startup import Startup, reason
from icecache.errors import Error, InvalidArgument
from icecache.machine import usable_cores
from transformers import (
    FalconH1Config,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    PreTrainedConfig,
)
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights: 2 layers, 2 KV heads of 8 dims, 512 positions."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    ).save_pretrained(str(folder))
    return folder


def dry_run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments, "--dry-run"])


# --- the command


def command_of(model: str, *flags: str, on_cpu: bool = True, all_full: bool = True) -> list[str]:
    made = server_command(model, "FOLDER", {}, Flags(flags), on_cpu=on_cpu, all_full=all_full)
    assert made[:5] == [sys.executable, "-m", "icecache.vllm.command", "serve", "FOLDER"]
    return made[5:]


def value(command: list[str], name: str) -> str | None:
    assert command.count(name) <= 1
    return command[command.index(name) + 1] if name in command else None


def test_the_small_model_has_its_name_and_the_dtype_of_the_docs() -> None:
    small = command_of("smollm2")
    assert value(small, "--served-model-name") == "smollm2"
    assert value(small, "--dtype") == "float32"
    other = command_of("another")
    assert value(other, "--served-model-name") is None and value(other, "--dtype") is None


def test_a_server_starts_on_a_cpu_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    command = command_of("another")
    assert "--enforce-eager" in command
    assert 2**28 <= int(value(command, "--kv-cache-memory-bytes") or "") <= 2**32
    assert value(command, "--num-gpu-blocks-override") == "65"
    assert value(command_of("another", all_full=False), "--num-gpu-blocks-override") is None
    # Layers that draft keep keys and values in vLLM's blocks; drafts found in the text need none.
    for flags, blocks in (
        (("--speculative-config", '{"method": "ngram"}'), "65"),
        (("--speculative-config", '{"method": "draft_model", "model": "M"}'), None),
        (("--speculative-config.method", "eagle"), None),
        (("-sc", '{"model": "M"}'), None),
        (("--spec-method", "suffix"), "65"),
        (("--spec-method", "mtp"), None),
    ):
        made = command_of("another", *flags)
        assert value(made, "--num-gpu-blocks-override") == blocks, flags
    on_device = command_of("another", on_cpu=False)
    assert "--enforce-eager" not in on_device and "--kv-cache-memory-bytes" not in on_device


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        (["--dtype", "bfloat16"], "float32"),
        (["--served-model-name=mine"], "smollm2"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["-O3"], "--enforce-eager"),
        (["-cc.mode", "3"], "--enforce-eager"),
        (["--compilation_config", "{}"], "--enforce-eager"),
        (["--gpu-memory-utilization", "0.3"], "--kv-cache-memory-bytes"),
        (["--num_gpu_blocks_override", "9"], "65"),
        (["--max-num-seqs=3"], "64"),
    ],
)
def test_what_a_user_gives_is_not_set_again(
    given: list[str], absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert absent in command_of("smollm2")
    assert absent not in command_of("smollm2", *given)
    if not given[0].startswith("--") or "=" in given[0]:
        return
    pytest.importorskip("yaml")
    name, text = given[0].removeprefix("--"), (given[1:] or ["true"])[0]
    (tmp_path / "config.yaml").write_text(f"{name}: {text!r}\n")
    assert absent not in command_of("smollm2", "--config", str(tmp_path / "config.yaml"))


def test_the_environment_is_completed_where_a_user_says_nothing() -> None:
    none = Flags([])
    assert server_environment({}, none, on_cpu=True) == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(usable_cores()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    assert server_environment({}, none, on_cpu=False) == {}
    assert server_environment({}, Flags(["-tp", "2"]), on_cpu=True) == {}
    assert server_environment({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, none, on_cpu=True) == {}
    kept = {"OMP_NUM_THREADS": "3", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    assert [*server_environment(kept, none, on_cpu=True)] == ["VLLM_CPU_OMP_THREADS_BIND"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-budget", "0"], "token_budget must be from 1 to"),
        (["--set", "window_tokens=999"], "token_budget must be at least"),
        (["--set", "dense_layers=7"], "dense_layers must name layers from 0 to 1"),
        (["--host-memory", "999999G"], "host_memory: expected at most this machine's"),
        (["--host-memory", "150K", "--dtype", "float32"], "room for one request of 512 tokens"),
        (["--max-num-seqs", "many"], "--max-num-seqs must be a number from 1 to"),
        (["--scheduler-cls", "x"], "--scheduler-cls: icecache serve sets it"),
        (["--additional-config.icecache.exact", "1"], "--additional-config: icecache serve sets"),
        (["--config", "/absent.yaml"], "--config /absent.yaml cannot be read"),
    ],
)
def test_a_dry_run_refuses_what_a_server_would(
    folder: Path, arguments: list[str], message: str
) -> None:
    if arguments[0] == "--config":
        pytest.importorskip("yaml")
    result = dry_run(str(folder), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_dry_run_prints_a_line_for_a_shell(folder: Path) -> None:
    result = dry_run(str(folder), "--token-budget", "64", "--port", "7000")
    assert result.exit_code == 0
    words = shlex.split(result.stdout)
    assert words[words.index("serve") + 1] == str(folder) and words[-2:] == ["--port", "7000"]
    assert '{"icecache": {"token_budget": "64"}}' in words


@pytest.mark.parametrize(
    ("config", "layers", "all_full"),
    [
        (LlamaConfig(num_hidden_layers=3), 3, True),
        (MistralConfig(num_hidden_layers=3, sliding_window=64), 1, False),
        (NemotronHConfig(layers_block_type=["mamba", "moe", "attention", "attention"]), 2, False),
        (FalconH1Config(num_hidden_layers=3), 1, False),
    ],
)
def test_layers_that_want_blocks_of_vllm(
    tmp_path: Path, config: PreTrainedConfig, layers: int, all_full: bool
) -> None:
    config.save_pretrained(str(tmp_path))
    shape = model_shape(str(tmp_path))
    assert shape.cache.num_layers == layers and shape.all_full is all_full


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        assert "model must be a folder, a name on" in dry_run(name).stderr


def test_a_port_in_use_is_refused_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("icecache.vllm.plugin.installed_version", lambda: "0.32.0")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", port]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: --port {port} cannot be used: Address already in use; give another one with "
        "--port\n"
    )


def test_another_vllm_is_refused_before_it_is_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "vLLM is not installed" in CliRunner().invoke(app, ["serve", str(folder)]).stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("icecache.vllm.plugin.installed_version", lambda: "0.28.1")
    assert CliRunner().invoke(app, ["serve", str(folder)]).stderr == (
        "error: vLLM must be 0.29 or newer and below 0.34, got 0.28.1\n"
    )


# --- what a starting server says

FAILED = """\
(APIServer pid=7) INFO 11-29 12:44:43 [api_utils.py:286] non-default args: 'port'
(VllmWorker-0 pid=9) ERROR 11-29 12:49:02 [multiproc.py:72] WorkerProc failed to start.
(VllmWorker-0 pid=9) ERROR 11-29 12:49:02 [multiproc.py:72] Traceback (most recent call last):
(VllmWorker-0 pid=9) ERROR 11-29 12:49:02 [multiproc.py:72]   File "worker.py", line 202, in load
(VllmWorker-0 pid=9) ERROR 11-29 12:49:02 [multiproc.py:72]     raise {kind}({text!r})
(VllmWorker-0 pid=9) ERROR 11-29 12:49:02 [multiproc.py:72] {kind}: {text}
(EngineCore pid=8) INFO 11-29 12:49:03 [core.py:12] Note: going down
(EngineCore pid=8) ERROR 11-29 12:49:27 [core.py:1510] EngineCore failed to start.
(EngineCore pid=8) ERROR 11-29 12:49:27 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=8) ERROR 11-29 12:49:27 [core.py:1510] Exception: WorkerProc initialization failed
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7)   File "serve.py", line 10, in main
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
"""


def failed(kind: str, text: str) -> list[str]:
    return [f"{line}\n" for line in FAILED.format(kind=kind, text=text).splitlines()]


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("ValueError", "no such thing", "ValueError: no such thing"),
        ("icecache.errors.InvalidArgument", "host_memory: more", "host_memory: more"),
        ("pydantic_core._pydantic_core.ValidationError", "1 error", "ValidationError: 1 error"),
        ("OSError", "[Errno 98] Address already in use", "the port is in use by another server"),
        (
            "ValueError",
            "Available memory on node 0 (13.1/23.5 GiB) on startup is less than desired",
            "too little memory is free: Available memory on node 0 (13.1/23.5 GiB) on startup",
        ),
    ],
)
def test_the_reason_is_the_first_process_s(kind: str, text: str, told: str) -> None:
    found = reason(failed(kind, text))
    assert found is not None and found.startswith(told)


def test_a_message_of_several_lines_is_whole() -> None:
    lines = ["Traceback (most recent call last):", "a.ValidationError: 1 error for VllmConfig"]
    lines += ["  Value error, too long [type=value_error]", "    For further information visit x"]
    assert reason(lines) == (
        "ValidationError: 1 error for VllmConfig Value error, too long [type=value_error]"
    )


def test_a_killed_process_and_silence_are_told_apart() -> None:
    assert "ran out of memory" in str(
        reason(["RuntimeError: Failed core proc(s): {'EngineCore': -9}"])
    )
    assert reason(["INFO 11-29 12:49:03 [core.py:12] ValueError: of a log"]) is None
    assert reason([]) is None


def test_lines_are_held_from_the_first_error_on_until_the_server_is_ready() -> None:
    shown: list[str] = []
    startup = Startup(shown.append)
    lines = failed("ValueError", "x")
    for line in lines:
        startup.feed(line)
    assert shown == lines[:1] and startup.held == lines[1:]
    assert startup.reason() == "ValueError: x"
    startup.feed("INFO:     Application startup complete.\n")
    assert startup.ready and not startup.held and shown[:-1] == lines
    startup.feed("ERROR 11-29 12:49:03 [x.py:1] later\n")
    assert shown[-1].endswith("later\n")


def a_server(code: str) -> tuple[int, list[str]]:
    said: list[str] = []
    return run_server([sys.executable, "-c", code], os.environ, said.append, "ADDRESS"), said


def test_a_server_that_runs_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    status, said = a_server("print('one\\nApplication startup complete.'); raise SystemExit(3)")
    assert status == 3
    assert capfd.readouterr().out == "one\nApplication startup complete.\n"
    assert len(said) == 1 and said[0].startswith("ready after ") and said[0].endswith(": ADDRESS")


def test_a_server_that_does_not_start_ends_in_one_message(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Error, match=r"^the server did not start: ValueError: a reason$"):
        a_server("print('begin', flush=True); raise ValueError('a reason')")
    assert capfd.readouterr().out == "begin\n"
    with pytest.raises(Error, match=r"its messages are above \(exit status 2\)"):
        a_server("import sys; sys.exit('usage: vllm' and 2)")


def command_in_a_process(code: str, served: Path) -> subprocess.Popen[bytes]:
    """Runs a server of `code`, which writes its process id to `served`, and waits for that."""
    run = (
        "import os, sys; from icecache.cli.server_process import run_server\n"
        f"sys.exit(run_server([sys.executable, '-c', {code!r}], os.environ, print, 'x'))"
    )
    process = subprocess.Popen([sys.executable, "-c", run])
    wait_until(lambda: served.exists() and served.read_text().endswith(" "))
    return process


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on(number: signal.Signals, tmp_path: Path) -> None:
    served = tmp_path / "server"
    code = f"""
import os, signal, sys, time
def leave(number, frame):
    open({str(served)!r}, "a").write(str(number))
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, leave)
open({str(served)!r}, "w").write(f"{{os.getpid()}} ")
time.sleep(60)
"""
    process = command_in_a_process(code, served)
    process.send_signal(number)
    assert process.wait(60) == 0
    assert served.read_text().split()[1:] == [str(int(number))]


def test_a_server_does_not_outlive_a_killed_command(tmp_path: Path) -> None:
    served = tmp_path / "server"
    code = f"import os, time; open({str(served)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(60)"
    process = command_in_a_process(code, served)
    process.kill()
    process.wait()
    stat = Path(f"/proc/{served.read_text().strip()}/stat")
    # Gone, or a zombie of whoever took it over.
    wait_until(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")


# --- the environment of torch's threads


def test_a_short_wait_is_added_where_a_user_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.additions({})["GOMP_SPINCOUNT"] == "3000"
    for name in environment.WAITING:
        assert "GOMP_SPINCOUNT" not in environment.additions({name: "1"})
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(environment, "usable_cores", lambda: cores - 1)
    assert environment.additions({})["OMP_NUM_THREADS"] == str(cores - 1)
    assert "OMP_NUM_THREADS" not in environment.additions({"OMP_NUM_THREADS": "7"})
    monkeypatch.setattr(environment, "usable_cores", lambda: cores)
    assert "OMP_NUM_THREADS" not in environment.additions({})


def test_the_process_begins_anew_where_openmp_was_loaded_before() -> None:
    code = (
        "import ctypes, os, sys; from icecache.cli import environment as e\n"
        "ctypes.CDLL('libgomp.so.1')\n"
        "e.prepare(); print(os.getpid(), os.environ['GOMP_SPINCOUNT'], sys.argv[1:])"
    )
    given = {k: v for k, v in os.environ.items() if k not in environment.WAITING}
    command = [sys.executable, "-c", code, "a", "b c"]
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=240)
    assert out.split(maxsplit=2) == [str(process.pid), "3000", "['a', 'b c']\n"]


def test_a_user_s_own_word_is_kept() -> None:
    with pytest.raises(InvalidArgument):
        Flags(["--max-num-seqs", "0"]).number("--max-num-seqs", 1, 1, 2)
    code = (
        "from icecache.cli import environment as e; import os; e.prepare(); print(dict(os.environ))"
    )
    given = {**os.environ, "OMP_WAIT_POLICY": "active"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
    )
    assert "GOMP_SPINCOUNT" not in done.stdout
