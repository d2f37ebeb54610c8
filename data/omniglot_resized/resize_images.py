"""Omniglot for few-shot learning: every 105x105 drawing as a 28x28 PNG, <alphabet>/<character>/*.png.

As in the original, in this folder. The copies are replaced, data/omniglot stays as it is:

    cd data/omniglot_resized && cp -r ../omniglot/* . && python resize_images.py

Or from the published archives, from anywhere:

    python data/omniglot_resized/resize_images.py --download
    python data/omniglot_resized/resize_images.py images_background.zip images_evaluation.zip

Without a source, the drawings in --out itself are resized: those in images_background/ and images_evaluation/ move to
<alphabet>/, and the others are replaced. With a source, no file in --out is replaced or deleted.

A run that was killed is simply started again: finished drawings are skipped.
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
PUBLISHED = (  # the checksums are those that torchvision 0.29 has, datasets/omniglot.py
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
    """Return (<alphabet>/<character>/<name>.png, where to read it) of every drawing of a folder or archive."""
    matches = [(LAYOUT.fullmatch(name), file) for name, file in archive.list_files(source).items()]
    return [(match["drawing"], file) for match, file in matches if match]


def prepare(sources: list[Path], out: Path) -> None:
    """Write <out>/<alphabet>/<character>/*.png, 28x28, of the drawings in the sources, or else in `out` itself."""
    drawings = defaultdict(list)
    for source in sources or [out]:
        found = find(source)
        if not found:
            raise archive.InputError(
                f"{source}: has no drawings <alphabet>/<character>/*.png; copy data/omniglot/* there, or name "
                "images_background.zip and images_evaluation.zip"
            )
        for name, file in found:
            drawings[name.split("/")[0]].append((out / name, file))

    copies = set() if sources else {file for images in drawings.values() for _, file in images}
    for copy in sorted(copies):
        if archive.header(copy) not in (("PNG", "1", SIZE), ("PNG", "1", RAW_SIZE)):
            raise archive.InputError(f"{copy}: is not a 1-bit drawing of 105x105 or 28x28 pixels; move it away")

    def is_finished(place: Path) -> bool:
        return archive.header(place)[2] == SIZE if place in copies else archive.is_finished(place, SIZE)

    todo = {alphabet: [one for one in images if not is_finished(one[0])] for alphabet, images in drawings.items()}
    todo = {alphabet: images for alphabet, images in todo.items() if images}
    archive.say(f"{len(drawings)} alphabets, {len(drawings) - len(todo)} of them finished before")
    for images in tqdm(todo.values(), unit="alphabet", disable=None):
        # Pillow resizes 1-bit images by nearest neighbor, whatever the filter, so they stay binary, like those of the
        # published numbers. Converted to grayscale first, they would be another data set.
        archive.write_images(images, SIZE, mode=None)
    places = {place for images in drawings.values() for place, _ in images}
    for copy in copies - places:
        copy.unlink()
        with contextlib.suppress(OSError):  # not empty yet
            for folder in copy.relative_to(out).parents[:-1]:
                (out / folder).rmdir()

    ready = [name for name, file in find(out) if file == out / name]
    characters = {name.rpartition("/")[0] for name in ready}
    alphabets = {name.partition("/")[0] for name in ready}
    counts = {"alphabets": len(alphabets), "characters": len(characters), "images": len(ready)}
    archive.print_counts(counts, EXPECTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="archives or folders (default: --out itself)")
    parser.add_argument("--download", action="store_true", help=f"fetch the two archives of {ADDRESS} into --out")
    parser.add_argument("--out", type=Path, default=HERE, help=archive.OUT_HELP)
    args = parser.parse_args()
    archive.claim(args.out, HERE)
    fetched = [archive.download(one, args.out) for one in PUBLISHED] if args.download else []
    prepare(args.sources + fetched, args.out)


if __name__ == "__main__":
    archive.run(main)
