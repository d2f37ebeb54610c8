"""Starts several processes on this host that compute one run together, one for each GPU.

    python launch.py main.py --datasource=omniglot ...                  as many processes as there are GPUs
    python launch.py --processes=2 main.py --datasource=omniglot ...    two; without GPUs they share the cores

Each line that a process prints has its number before it. Process 0 is the chief, which prints what a run tells and
writes its folder. Ctrl-C and SIGTERM are handed on: all stop after the same step, saved. Where one process dies the
others end too; the same command goes on from the last checkpoint, and with --restarts=K it is given again by itself,
up to K times. Where a process ends with an error of its own, such as a wrong flag or a full disk, it is not. The exit
code is that of the first process that ended with an error of its own. It is 75 where there is none: all that failed
ended because another was gone.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO

GRACE = 90  # seconds in which the others end by themselves, with a line that says why
GONE = 75  # what a process exits with when another one is gone: cluster.GONE. This file imports no TensorFlow
WRITING = threading.Lock()


def gpus() -> list[str]:
    """Lists the GPUs of this host as CUDA_VISIBLE_DEVICES names them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name.strip() for name in shown.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)  # the parts of a GPU (MIG) have lines of their own


def environments(processes: int, names: list[str]) -> list[dict[str, str]]:
    """What each process finds in its environment. names: of the GPUs."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(processes)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    found = []
    for index in range(processes):
        environment = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
        environment["PYTHONUNBUFFERED"] = "1"
        if processes > 1:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        if names:
            environment["CUDA_VISIBLE_DEVICES"] = names[index]
        found.append(environment)
    return found


def hand_on(pipe: BinaryIO, number: int, to: BinaryIO) -> None:
    """Writes each line of a pipe with the process's number before it."""
    with pipe:  # where it is closed early, the process is told so, and does not wait for ever to be read
        try:
            for line in pipe:
                with WRITING:
                    to.write(b"[%d] %s" % (number, line if line.endswith(b"\n") else line + b"\n"))
                    to.flush()
        except BrokenPipeError:  # the reader of what is printed, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())  # else Python writes what is left at its end


def say(line: str) -> None:
    """Prints a line of this program."""
    with WRITING:
        print(f"launch.py: {line}", file=sys.stderr, flush=True)


def ended(code: int) -> str:
    """Says how a process ended."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def run_once(command: list[str], processes: int, names: list[str], stops: list[int]) -> list[int]:
    """Starts the processes and waits for their end. Returns their exit codes, of a signal -number, in that order.

    stops: the signals that this program gets; they are handed on.
    """
    running, threads = [], []
    for number, environment in enumerate(environments(processes, names)):
        # In a session of its own: a terminal's Ctrl-C comes once, from here, and not twice.
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        running.append(process)
        for pipe, to in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            threads.append(threading.Thread(target=hand_on, args=(pipe, number, to), daemon=True))
            threads[-1].start()
    handed_on, first, until = 0, [], None
    try:
        while any(process.poll() is None for process in running):
            time.sleep(0.05)
            for number in stops[handed_on:]:
                for process in running:
                    if process.poll() is None:
                        process.send_signal(number)
                handed_on += 1
            for number, process in enumerate(running):
                if process.poll() is not None and number not in first:
                    first.append(number)
                    if process.returncode and until is None and not stops:
                        until = time.monotonic() + GRACE
                        if processes > 1:
                            say(f"process {number} {ended(process.returncode)}, and the others end")
            if until and time.monotonic() > until:
                break
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for thread in threads:
            thread.join()
    return [running[number].returncode for number in [*first, *(set(range(processes)) - set(first))]]


def main() -> int:
    """Starts what the command line says. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="how many; by default one for each GPU")
    parser.add_argument("--restarts", type=int, default=0, metavar="K", help="start again up to K times (0)")
    parser.add_argument("program", help="main.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its flags, the same for all processes")
    args = parser.parse_args()
    names = gpus()
    if args.processes is None and not names:
        parser.exit(1, "launch.py: no GPU is found here: say how many processes with --processes=N\n")
    processes = len(names) if args.processes is None else args.processes
    if processes < 1 or args.restarts < 0:
        parser.exit(1, "launch.py: --processes must be 1 or more, and --restarts 0 or more\n")
    if names and processes > len(names):
        parser.exit(
            1, f"launch.py: --processes={processes}, but here are {len(names)} GPUs: give each process its own\n"
        )
    stops = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stops.append(number))
    command = [sys.executable, args.program, *args.flags]
    for restart in range(args.restarts + 1):
        codes = [code for code in run_once(command, processes, names, stops) if code]
        code = next((code for code in codes if code != GONE), GONE if codes else 0)
        died = code < 0 or code == GONE
        if not died or stops or restart == args.restarts:
            break
        say(f"starting again, {restart + 1} of {args.restarts} times")
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
