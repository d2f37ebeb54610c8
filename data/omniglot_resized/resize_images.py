"""Omniglot for few-shot learning: every 105x105 drawing as a 28x28 PNG, <alphabet>/<character>/*.png.

As in the original, copy data/omniglot into this folder and replace the copies:

    cd data/omniglot_resized && cp -r ../omniglot/* . && python resize_images.py

From the published archives, in any folder:

    python data/omniglot_resized/resize_images.py --download
    python data/omniglot_resized/resize_images.py images_background.zip images_evaluation.zip

Without a source, resize the drawings in --out itself: move those in images_background/ and images_evaluation/ to
<alphabet>/, and replace the others. With a source, no file in --out is replaced or deleted.

To resume a killed run, run the same command again; it skips finished drawings.
"""

import argparse
import contextlib
import re
import sys
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

ADDRESS = "https://github.com/brendenlake/omniglot/raw/master/python/"
PUBLISHED = (  # checksums from torchvision 0.29, datasets/omniglot.py
    archive.Published(f"{ADDRESS}images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
    archive.Published(f"{ADDRESS}images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
)
SIZE = (28, 28)  # cbfinn/maml, data/omniglot_resized/resize_images.py
RAW_SIZE = (105, 105)
EXPECTED = {"alphabets": 50, "characters": 1_623, "images": 32_460}  # Lake et al., Science 2015
LAYOUT = re.compile(
    r"(?:images_(?:background(?:_small[12])?|evaluation)/)?(?P<drawing>[^/.][^/]*/[^/.][^/]*/[^/.][^/]*\.png)"
)


def find(source: Path) -> list[tuple[str, archive.File]]:
    """Return (<alphabet>/<character>/<name>.png, file) of each drawing in a folder or archive."""
    matches = [(LAYOUT.fullmatch(name), file) for name, file in archive.list_files(source).items()]
    return [(match["drawing"], file) for match, file in matches if match]


def prepare(sources: list[Path], out: Path) -> None:
    """Write the drawings in the sources, or else in `out` itself, as 28x28 <out>/<alphabet>/<character>/*.png."""
    drawings = defaultdict(list)
    for source in sources or [out]:
        files = find(source)
        if not files:
            raise archive.InputError(
                f"{source}: contains no drawings <alphabet>/<character>/*.png; copy data/omniglot/* there, or give "
                "images_background.zip and images_evaluation.zip"
            )
        for name, file in files:
            drawings[name.split("/")[0]].append((out / name, file))

    copies = set() if sources else {file for images in drawings.values() for _, file in images}
    for copy in sorted(copies):
        if archive.header(copy) not in (("PNG", "1", SIZE), ("PNG", "1", RAW_SIZE)):
            raise archive.InputError(f"{copy}: is not a 1-bit drawing of 105x105 or 28x28 pixels; move it away")

    def is_finished(path: Path) -> bool:
        return archive.header(path)[2] == SIZE if path in copies else archive.is_finished(path, SIZE)

    todo = {
        alphabet: [drawing for drawing in images if not is_finished(drawing[0])]
        for alphabet, images in drawings.items()
    }
    todo = {alphabet: images for alphabet, images in todo.items() if images}
    archive.say(f"{len(drawings)} alphabets, {len(drawings) - len(todo)} already finished")
    for images in tqdm(todo.values(), unit="alphabet", disable=None):
        # Pillow resizes 1-bit images by nearest neighbor, regardless of the filter, so they stay binary, as in the
        # original. Converting them to grayscale first would give a different data set.
        archive.write_images(images, SIZE, mode=None)
    outputs = {path for images in drawings.values() for path, _ in images}
    for copy in copies - outputs:
        copy.unlink()
        with contextlib.suppress(OSError):  # the folder is not empty yet
            for folder in copy.relative_to(out).parents[:-1]:
                (out / folder).rmdir()

    finished = [name for name, file in find(out) if file == out / name]
    characters = {name.rpartition("/")[0] for name in finished}
    alphabets = {name.partition("/")[0] for name in finished}
    counts = {"alphabets": len(alphabets), "characters": len(characters), "images": len(finished)}
    archive.print_counts(counts, EXPECTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", nargs="*", type=archive.user_path, help="archives or folders (default: --out itself)"
    )
    parser.add_argument("--download", action="store_true", help=f"download the two archives at {ADDRESS} into --out")
    parser.add_argument("--out", type=archive.user_path, default=HERE, help=archive.OUT_HELP)
    args = parser.parse_args()
    archive.claim(args.out, HERE)
    downloaded = [archive.download(published, args.out) for published in PUBLISHED] if args.download else []
    prepare(args.sources + downloaded, args.out)


if __name__ == "__main__":
    archive.run(main)
