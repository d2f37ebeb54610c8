"""main.py in separate processes: killing, resuming, threads, exit codes."""

import os
import re

import main
from tests.helpers import PROGRAM, assert_same_ending, end, models, only_run, run, scalars, spawn, train_until_killed


def test_kill_and_resume_is_bitwise_identical(tmp_path):
    """kill -9 at the summary of iteration 500, when model299 is the latest checkpoint."""
    flags = "--metatrain_iterations=600", "--norm=None", "--save_interval=299", f"--logdir={tmp_path / 'killed'}"
    train_until_killed(500, *flags)
    folder = only_run(tmp_path / "killed")
    assert models(folder) == ["model299"]
    assert max(step for points in scalars(folder).values() for step, _ in points) == 400  # to be replaced

    printed = run(*flags)
    assert f"Restoring model weights from {folder / 'model299'}\n" in printed
    assert "iterations 300 to 599." in printed
    assert models(folder) == ["model299", "model598", "model599"]
    run(*flags, f"--logdir={tmp_path / 'uninterrupted'}")
    uninterrupted = only_run(tmp_path / "uninterrupted")
    assert_same_ending(folder, uninterrupted)
    assert scalars(folder) == scalars(uninterrupted)


KILLED_AT_RANDOM = """
import contextlib, os, random, signal, sys, time, main, report, runs, train
train.SUMMARY_INTERVAL = report.PRINT_INTERVAL = 20
train.VALIDATION_INTERVAL = 10
main.DATASETS["omniglot"] = main.DATASETS["omniglot"]._replace(curve_steps=1)
from tests.helpers import tiny_networks
contextlib.ExitStack().enter_context(tiny_networks())
kills, logdir, *flags = sys.argv[1:]

def begin(name):
    process = os.fork()  # import TensorFlow once; each process starts it
    if process == 0:
        main.run(main.parse(["main.py", f"--logdir={logdir}/{name}", *flags]))
        os._exit(0)
    return process

def newest():
    return max([i for run in main.Path(logdir, "killed").glob("cls_*") for i in runs.Run(run).iterations()], default=-1)

uninterrupted = begin("uninterrupted")
for _ in range(int(kills)):
    process, until = begin("killed"), newest() + random.uniform(1, 150 / int(kills))
    while newest() < until and os.waitpid(process, os.WNOHANG) == (0, 0):
        pass
    time.sleep(random.uniform(0, 0.05))
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it ended before the kill"
    print("killed after", newest())
for process in (begin("killed"), uninterrupted):
    assert os.waitpid(process, 0)[1] == 0
"""


def test_resume_after_kills_at_random_moments_is_bitwise_identical(small, tmp_path):
    """The environment variable KILLS sets their number. The run saves and validates often."""
    kills = os.environ.get("KILLS", "2")
    flags = *small, "--val_tasks=10", "--metatrain_iterations=200", "--save_interval=5"
    ended = end(spawn("-c", KILLED_AT_RANDOM, kills, tmp_path, *flags, cwd=PROGRAM.parent))
    assert ended.code == 0, ended.err
    killed, uninterrupted = (only_run(tmp_path / name) for name in ("killed", "uninterrupted"))
    assert_same_ending(killed, uninterrupted)
    assert models(killed) == models(uninterrupted)
    assert scalars(killed) == scalars(uninterrupted)


def test_threads_reach_tensorflow(tmp_path):
    """In a new process, because TensorFlow allows setting them once."""
    program = (
        "import sys, main, tensorflow as tf\n"
        "main.FLAGS(sys.argv)\n"
        "main.start_devices()\n"
        "threading = tf.config.threading\n"
        "print(threading.get_inter_op_parallelism_threads(), threading.get_intra_op_parallelism_threads(),\n"
        "      main.layout()[0])\n"
    )
    ended = end(spawn("-c", program, "--threads=3", "--op_threads=2", cwd=PROGRAM.parent))
    assert ended.out.split() == ["3", "2", "3"]


def test_exit_codes_stderr_and_help_from_any_folder(tmp_path):
    """--help lists every flag, with the paper's symbols."""
    arguments = ["--update_lr=nan"], ["--train=False", "--logdir=none"], ["--help"]
    wrong_flag, no_model, help_ = map(end, [spawn(PROGRAM, *each, cwd=tmp_path) for each in arguments])
    assert (wrong_flag.code, no_model.code, help_.code) == (1, 1, 0)
    assert re.fullmatch(r"main\.py: .*--update_lr=nan: .*", wrong_flag.err)
    assert re.fullmatch(r"main\.py: none/cls_\S+: .*", no_model.err)
    assert help_.err == ""
    for flag in main.FLAGS.get_flags_for_module(main):
        assert len(re.findall(rf"^  --(?:\[no\])?{flag.name}: ", help_.out, re.MULTILINE)) == 1
    for word in ("alpha", "beta", "transductive", "(shot)", "(way)"):
        assert word in help_.out
    assert list(tmp_path.iterdir()) == []
