"""The command line as a person meets it: a real process, stopped, gone on with, and with things missing."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from strata.training import command

PACK = Path(__file__).resolve().parents[2]
SMALL = ["--set", "scenes=4", "--set", "batch=1", "--set", "crop=32", "--set", "side=64", "--save-every", "100000"]


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, arguments)],
        cwd=PACK,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def said(*arguments, **options) -> tuple[int, str]:
    process = start(*arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out + error


def test_help_names_every_trainer_and_option():
    code, words = said("--help")
    assert code == 0 and all(name in words for name in (*command.TRAINERS, "publish", "judge"))
    code, words = said("diffusion", "--help")
    assert code == 0 and all(
        option in words for option in ("--config", "--set", "--folder", "--minutes", "--save-every")
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["autoencoder", "--config", "nowhere.json"], "cannot read the config nowhere.json"),
        (["autoencoder", "--set", "stepz=3"], "the config has no 'stepz'; it has start, channels"),
        (["autoencoder", "--set", "steps=many"], "'many' is not a number"),
        (
            ["diffusion", "--set", "scenes=64"],
            "scenes is 64, and 64 of them are kept for validation; set it to 128 or more",
        ),
        (
            ["dreamlayer", "--set", "scenes=64"],
            "scenes is 64, and 63 of them are kept for validation; set it to 126 or more",
        ),
        (["painter"], "invalid choice: 'painter'"),
    ],
)
def test_wrong_arguments_are_named(arguments, expected):
    code, words = said(*arguments)
    assert code != 0 and expected in words and "Traceback" not in words


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match='pip install "accelerate'):
        command.main(["autoencoder"])


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_goes_on_from(tmp_path):
    arguments = ["autoencoder", "--folder", tmp_path / "run", "--set", "steps=100000", *SMALL]
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith("step 20 "):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "Stopping after this step" in out and "give the same command again" in error, (
        error
    )
    code, words = said(*arguments, "--minutes", "0")
    assert code == 0
    going_on = next(line for line in words.splitlines() if line.startswith("Going on from step"))
    assert int(going_on.split()[-1].rstrip(".")) >= 20
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert int(rows[1]["step"]) == int(rows[0]["step"]) + 1


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    small = ["--folder", tmp_path / "run", *SMALL]
    assert said("autoencoder", *small, "--minutes", "0")[0] == 0
    code, words = said("autoencoder", *small, "--set", "batch=2")
    assert code == 1 and "holds a run with another config" in words and "Traceback" not in words
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch"] == 1


def test_a_full_disk_says_what_to_do_and_keeps_the_last_checkpoint(tmp_path):
    arguments = ["autoencoder", "--folder", tmp_path / "run", "--minutes", "0", *SMALL]
    assert said(*arguments)[0] == 0
    # files of at most 4 MB: what a process gets from a disk that fills up while the checkpoint of 10 MB is written
    code, words = said(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)))
    assert code == 1 and "free some space or choose another --folder" in words and "Traceback" not in words, words
    code, words = said(*arguments)
    assert code == 0 and "Going on from step 1." in words


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """Without the setting 256 MB of one piece go back to the system at once."""
    code = (
        "import sys; from training.command import keep_memory; print(sys.argv[1] == 'kept' and keep_memory())\n"
        "one = bytearray(b'x' * 2**28); del one\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    )
    held = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", code, how], cwd=PACK, text=True, capture_output=True, check=True)
        used, held[how] = done.stdout.split()
        assert used == str(how == "kept")
    assert int(held["kept"]) > 2**18 > int(held["given back"])  # kB
