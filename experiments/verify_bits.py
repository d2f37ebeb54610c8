"""Check that a change leaves every bit of the trained weights unchanged.

    make verify-bits                                            compare with the digests in results/bits.json
    python experiments/verify_bits.py --against=<commit>        also train at that commit, and compare
    python experiments/verify_bits.py --record                  replace this machine's digests in results/bits.json

The program trains each network and variant for a few steps on generated data, with main.py and rl/main.py, and takes
the SHA-256 of the weights and of Adam's moments in the last checkpoint. Records are keyed by what affects the digests:
TensorFlow version, instruction set and oneDNN. The exit status is 1 if a digest differs. Without a record for this kind
of machine, it is 0 and the program only prints the digests.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import devices  # isort: skip  sets TensorFlow's environment before the import

import numpy as np
import tensorflow as tf
from PIL import Image

RECORD = ROOT / "results" / "bits.json"
OMNIGLOT = "--datasource=omniglot --update_batch_size=1 --data_path={data}/omniglot --val_tasks=1"
FIVE_WAY = f"{OMNIGLOT} --meta_batch_size=32 --update_lr=0.4"
MINIIMAGENET = "--datasource=miniimagenet --meta_batch_size=4 --update_batch_size=1 --update_lr=0.01 --num_updates=5"
MINIIMAGENET += " --num_filters=32 --max_pool=True --data_path={data}/photographs"
SINUSOID = "--datasource=sinusoid --norm=None --update_batch_size=10"
STEPS = "--metatrain_iterations"
CASES = {  # name -> flags of main.py, or rl/main.py with its flags
    "sinusoid": f"{SINUSOID} {STEPS}=300",
    "sinusoid, pretraining": f"{SINUSOID} --pretrain_iterations=3 {STEPS}=0",
    "sinusoid, batch norm": f"{SINUSOID} --norm=batch_norm {STEPS}=3",
    "Omniglot 5-way": f"{FIVE_WAY} {STEPS}=50",
    "Omniglot 20-way": f"{OMNIGLOT} --meta_batch_size=16 --num_classes=20 --update_lr=0.1 --num_updates=5 {STEPS}=20",
    "Omniglot, first order": f"{FIVE_WAY} --stop_grad=True {STEPS}=20",
    "Omniglot, adapt=head": f"{FIVE_WAY} --num_updates=2 --adapt=head {STEPS}=20",
    "Omniglot, adapt=body": f"{FIVE_WAY} --num_updates=2 --adapt=body {STEPS}=20",
    "Omniglot, learn_update_lr=step": f"{FIVE_WAY} --num_updates=2 --learn_update_lr=step {STEPS}=20",
    "Omniglot, learn_update_lr=weight": f"{FIVE_WAY} --num_updates=2 --learn_update_lr=weight {STEPS}=20",
    "Omniglot, layer norm": f"{FIVE_WAY} --norm=layer_norm {STEPS}=3",
    "Omniglot, fully connected": f"{FIVE_WAY} --conv=False {STEPS}=3",
    "Omniglot, tasks_at_once=2": f"{FIVE_WAY} --tasks_at_once=2 {STEPS}=3",
    "Omniglot, pretraining": f"{FIVE_WAY} --pretrain_iterations=3 {STEPS}=0",
    "MiniImagenet": f"{MINIIMAGENET} {STEPS}=10",
    "ResNet-12": f"{MINIIMAGENET} --num_updates=1 --network=resnet12 --image_size=32 --num_query=2 {STEPS}=3",
    "2D navigation": "rl/main.py --env=point --iterations=3 --meta_batch_size=4",
}


def generate(folder: Path) -> None:
    """Write noise images in the layouts of Omniglot (400 characters) and MiniImagenet (6 classes per split)."""
    random = np.random.default_rng(0)
    for character in range(400):
        path = folder / "omniglot" / f"Alphabet_{character // 20:02}" / f"character{character % 20 + 1:02}"
        path.mkdir(parents=True)
        for drawing in range(2):
            pixels = (255 * random.integers(0, 2, (28, 28))).astype(np.uint8)
            Image.fromarray(pixels).convert("1").save(path / f"{drawing}.png")
    for label in range(18):
        path = folder / "photographs" / ("train", "val", "test")[label // 6] / f"n{label:08}"
        path.mkdir(parents=True)
        for image in range(16):
            Image.fromarray(random.integers(0, 256, (84, 84, 3), np.uint8)).save(path / f"{image:02}.png")


def digest(prefix: str) -> str:
    """Return the SHA-256 of all float32 arrays of a checkpoint, independent of their names and order."""
    reader = tf.train.load_checkpoint(prefix)
    dtypes = reader.get_variable_to_dtype_map()
    arrays = [reader.get_tensor(key) for key in dtypes if dtypes[key] == tf.float32]
    each = sorted(hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest() for array in arrays)
    return hashlib.sha256(b"".join(each)).hexdigest()


def train(root: Path, data: Path, name: str) -> str:
    """Train a case with the code in `root`; return the digest of its last checkpoint."""
    program, *flags = CASES[name].format(data=data).split()
    if program != "rl/main.py":
        program, flags = "main.py", [program, *flags, "--log=False"]
    with tempfile.TemporaryDirectory() as logdir:
        command = [sys.executable, program, *flags, f"--logdir={logdir}"]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{name}: {' '.join(command)} failed:\n{run.stdout}{run.stderr}")
        (folder,) = (path for path in Path(logdir).iterdir() if path.is_dir())
        last = max(folder.glob("model*.index"), key=lambda path: int(path.stem.removeprefix("model")))
        return digest(str(last.with_suffix("")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit instead of the record")
    parser.add_argument("--record", action="store_true", help="replace this machine's record")
    parser.add_argument("--only", metavar="WORD", default="", help="run only cases whose name contains WORD")
    args = parser.parse_args()
    kind = f"TensorFlow {tf.__version__}, {devices.instruction_set()}, oneDNN {'on' if devices.onednn() else 'off'}"
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = {} if args.record else recorded.get(kind, {})
    print(kind)
    digests, differing = {}, []
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if args.against:
            other = Path(folder) / "other"
            subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, other], check=True)
            subprocess.run(["git", "checkout", "--quiet", args.against], cwd=other, check=True)
        for name in (name for name in CASES if args.only in name):
            digests[name] = train(ROOT, folder, name)
            expected = train(other, folder, name) if args.against else known.get(name)
            verdict = "no record" if expected is None else "equal" if digests[name] == expected else "DIFFERS"
            differing += [name] * (verdict == "DIFFERS")
            print(f"{name:34} {digests[name][:16]}  {verdict}", flush=True)
    if args.record:
        RECORD.write_text(json.dumps(recorded | {kind: recorded.get(kind, {}) | digests}, indent=1) + "\n")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
