"""Omniglot for few-shot learning: every 105x105 drawing as a 28x28 PNG, <alphabet>/<character>/*.png.

As in the original, in this folder. The copies are replaced, data/omniglot stays as it is:

    cd data/omniglot_resized && cp -r ../omniglot/* . && python resize_images.py

Or from the published archives, from anywhere:

    python data/omniglot_resized/resize_images.py --download
    python data/omniglot_resized/resize_images.py images_background.zip images_evaluation.zip

In --out a folder <alphabet>/ is replaced by the finished one, and a copy of it in images_background/ or
images_evaluation/ is removed, if all in it are drawings of Omniglot: characterNN/NNNN_NN.png, 1-bit, 105x105 or
28x28. From a source with other names, copies bit for bit and finished images count as well. A folder with anything
else in it is named, and nothing is written. Finished images stay as they are.

A run that was killed is simply started again: finished alphabets are skipped.
"""

import argparse
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive
import folders

ADDRESS = "https://github.com/brendenlake/omniglot/raw/master/python/"
PUBLISHED = (  # the checksums are those that torchvision 0.29 has, datasets/omniglot.py
    archive.Published(f"{ADDRESS}images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
    archive.Published(f"{ADDRESS}images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
)
SIZE = (28, 28)  # cbfinn/maml, data/omniglot_resized/resize_images.py
RAW_SIZE = (105, 105)
EXPECTED = {"alphabets": 50, "characters": 1_623, "images": 32_460}  # Lake et al., Science 2015
ALPHABET = re.compile(r"(?P<alphabet>[^/.][^/]*)/(?P<image>[^/.][^/]*/[^/.][^/]*\.png)")
LAYOUT = re.compile(rf"(images_\w+/)?{ALPHABET.pattern}")
# The folders in the published archives; what lies in them in --out is a copy, to be removed.
GROUPS = ("images_background", "images_background_small1", "images_background_small2", "images_evaluation")
DRAWING = re.compile(r"character\d\d/\d{4}_\d\d\.png")

Drawings = dict[str, dict[str, archive.File]]  # alphabet -> "character/name.png" -> where to read it


def find(source: Path, layout: re.Pattern = LAYOUT) -> Drawings:
    """The drawings of a folder or zip archive that lie in [images_.../]<alphabet>/<character>/*.png."""
    found: Drawings = defaultdict(dict)
    for name, file in archive.files(source).items():
        if match := layout.fullmatch(name):
            found[match["alphabet"]][match["image"]] = file
    return found


def replaceable(given: archive.Images) -> Callable[[str, Path], bool]:
    """Whether a file of an alphabet in --out may go: one of Omniglot's drawings, or what `archive.replaceable` says.

    given: the images of that alphabet in the sources.
    """
    from_given = archive.replaceable(given, SIZE)

    def may_go(name: str, path: Path) -> bool:
        if archive.is_source(path, given.get(name)):
            return False
        header = archive.header(path) if DRAWING.fullmatch(name) else None
        return header in (("PNG", "1", SIZE), ("PNG", "1", RAW_SIZE)) or from_given(name, path)

    return may_go


def fail_empty(source: Path) -> NoReturn:
    """Ends the program with the layout that was looked for."""
    archive.fail(
        f"{source} has no drawings: <alphabet>/<character>/*.png was expected there, if need be under "
        "images_background/ or images_evaluation/; "
        "copy data/omniglot/* there, or name images_background.zip and images_evaluation.zip"
    )


def resize(images: dict[str, archive.File], place: Path, bar: tqdm) -> None:
    """Writes one alphabet's images, 28x28, into the folder `place`, all at once; finished ones stay."""
    with folders.moved_in(place) as folder:
        for name, file in images.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if archive.has_size(place / name, SIZE):
                shutil.copyfile(place / name, folder / name)
            else:
                # Pillow resizes the 1-bit drawings by nearest neighbour whatever filter is asked, so they stay
                # binary, as those of the published numbers. Turned grey first they would be another data set.
                archive.read_image(file, SIZE).save(folder / name)
            bar.update()


def prepare(sources: list[Path], out: Path) -> None:
    """Makes <out>/<alphabet>/<character>/*.png, 28x28, of the drawings in the sources and in `out` itself."""
    given: Drawings = defaultdict(dict)
    for source in sources:
        if source.resolve() != out.resolve():
            for alphabet, images in (find(source) or fail_empty(source)).items():
                given[alphabet] |= images

    with folders.locked(out):
        folders.recover(out)
        groups = [group for group in map(out.joinpath, GROUPS) if folders.is_folder(group)]
        groups = [group for group in groups if group.resolve() not in map(Path.resolve, sources)]
        drawings = given.copy()
        for folder in (out, *groups):
            for alphabet, images in find(folder, ALPHABET).items():
                drawings[alphabet] = drawings[alphabet] | images
        if not drawings:
            fail_empty(out)

        todo = [name for name in sorted(drawings) if not archive.finished(out / name, drawings[name], SIZE)]
        copies = [copy for group in groups for copy in sorted(group.iterdir()) if copy.name in drawings]
        copies = [copy for copy in copies if folders.is_folder(copy)]
        for place in (*copies, *(out / alphabet for alphabet in todo)):
            folders.refuse_others(place, replaceable(given[place.name]))

        archive.say(f"{len(drawings)} alphabets, {len(drawings) - len(todo)} of them finished before")
        with tqdm(total=sum(len(drawings[name]) for name in todo), unit="image", disable=None) as bar:
            for alphabet in todo:
                resize(drawings[alphabet], out / alphabet, bar)
        for copy in copies:
            shutil.rmtree(copy)
        for group in groups:
            if not any(group.iterdir()):
                group.rmdir()

        ready = find(out, ALPHABET)
        for alphabet, images in drawings.items():
            if not images.keys() <= ready[alphabet].keys():
                archive.fail_lost(out / alphabet)
        characters = sum(len({name.split("/")[0] for name in images}) for images in ready.values())
        found = {"alphabets": len(ready), "characters": characters, "images": sum(map(len, ready.values()))}
        archive.print_counts(found, EXPECTED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="*", type=Path, help="archives or folders (default: --out itself)")
    parser.add_argument("--download", action="store_true", help=f"fetch the two archives of {ADDRESS} into --out")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: script's folder)")
    args = parser.parse_args()
    fetched = [archive.download(one, args.out) for one in PUBLISHED] if args.download else []
    prepare(args.sources + fetched, args.out)


if __name__ == "__main__":
    archive.run(main)
