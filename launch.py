"""Run main.py as several processes on this host, one per GPU.

    python launch.py main.py --datasource=omniglot ...                  one process per GPU
    python launch.py --processes=2 main.py --datasource=omniglot ...    two; without GPUs they share the cores

Each printed line starts with the number of its process. Process 0 is the chief: it prints the run's lines and writes
its folder. Ctrl-C, SIGTERM and SIGHUP are passed on; all processes then stop after the same step, and the run is saved.
If a process dies, the others exit. The same command resumes from the last checkpoint; --restarts=K repeats it up to K
times, but not after an error such as a wrong flag or a full disk. The exit code is that of the first process that
failed on its own, or 75 if the death of another process caused every failure.
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

GRACE = 90  # seconds for the other processes to report the failure and exit
EXIT_PEER_LOST = 75  # as in cluster.py, which imports TensorFlow
WRITING = threading.Lock()


def gpus() -> list[str]:
    """Return the host's GPUs, by their names in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)  # MIG partitions have other lines


def environments(processes: int, names: list[str]) -> list[dict[str, str]]:
    """Return the environment of each process. names: the GPUs, one per process, or an empty list."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(processes)]
    addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in sockets]
    for server in sockets:
        server.close()
    environments = []
    for index in range(processes):
        environment = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
        environment["PYTHONUNBUFFERED"] = "1"
        if processes > 1:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        if names:
            environment["CUDA_VISIBLE_DEVICES"] = names[index]
        environments.append(environment)
    return environments


def forward(pipe: BinaryIO, number: int, to: BinaryIO) -> None:
    """Copy the lines of a pipe, each prefixed with the number of its process."""
    with pipe:  # closing it keeps the process from blocking on a pipe that is no longer read
        for line in pipe:
            try:
                with WRITING:
                    to.write(b"[%d] %s" % (number, line if line.endswith(b"\n") else line + b"\n"))
                    to.flush()
            except OSError as error:
                os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())
                if isinstance(error, BrokenPipeError):  # the reader, such as head, has exited
                    return  # otherwise the terminal was closed, and the process must still be able to save


def say(line: str) -> None:
    """Print a line of this program."""
    with WRITING:
        print(f"launch.py: {line}", file=sys.stderr, flush=True)


def ending(code: int) -> str:
    """Describe how a process ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def run_once(command: list[str], processes: int, names: list[str], stops: list[int]) -> list[int]:
    """Run the processes. Return their exit codes, negative for signals, in the order in which they ended.

    stops: handlers append signals to this list; they are passed on.
    """
    running, threads = [], []
    for number, environment in enumerate(environments(processes, names)):
        # In its own session, so that a terminal's Ctrl-C reaches it only once, from here.
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        running.append(process)
        for pipe, to in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            threads.append(threading.Thread(target=forward, args=(pipe, number, to), daemon=True))
            threads[-1].start()
    passed_on, ended, deadline = 0, [], None
    try:
        while any(process.poll() is None for process in running):
            time.sleep(0.05)
            for number in stops[passed_on:]:
                for process in running:
                    if process.poll() is None:
                        process.send_signal(number)
                passed_on += 1
            for number, process in enumerate(running):
                if process.poll() is not None and number not in ended:
                    ended.append(number)
                    if process.returncode and deadline is None and not stops:
                        deadline = time.monotonic() + GRACE
                        if processes > 1:
                            say(f"process {number} {ending(process.returncode)}; stopping the others")
            if deadline and time.monotonic() > deadline:
                break
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for thread in threads:
            thread.join()
    return [running[number].returncode for number in [*ended, *(set(range(processes)) - set(ended))]]


def main() -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="number of processes (default: one per GPU)")
    parser.add_argument("--restarts", type=int, default=0, metavar="K", help="restart up to K times (default: 0)")
    parser.add_argument("program", type=os.path.expanduser, help="main.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of main.py, the same for all processes")
    args = parser.parse_args()
    names = gpus()
    processes = len(names) if args.processes is None else args.processes
    if args.processes is None and not names:
        parser.exit(1, "launch.py: --processes: is missing, and this host has no GPU; give a number\n")
    if processes < 1 or args.restarts < 0:
        name = "--processes" if processes < 1 else "--restarts"
        parser.exit(1, f"launch.py: {name}: must be {int(processes < 1)} or more\n")
    if names and processes > len(names):
        parser.exit(1, f"launch.py: --processes={processes}: exceeds the {len(names)} GPUs of this host; lower it\n")
    stops = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda number, frame: stops.append(number))
    command = [sys.executable, args.program, *args.flags]
    for restart in range(args.restarts + 1):
        codes = [code for code in run_once(command, processes, names, stops) if code]
        code = next((code for code in codes if code != EXIT_PEER_LOST), EXIT_PEER_LOST if codes else 0)
        died = code < 0 or code == EXIT_PEER_LOST
        if not died or stops or restart == args.restarts:
            break
        say(f"restarting ({restart + 1} of {args.restarts})")
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
