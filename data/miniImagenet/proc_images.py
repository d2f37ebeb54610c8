"""MiniImagenet for few-shot learning: 84x84 RGB photographs in {train,val,test}/<label>/.

As in the original, with the 60,000 photographs in images/ in this folder, and Ravi & Larochelle's train.csv, val.csv
and test.csv next to images/:

    cd data/miniImagenet && python proc_images.py

From a folder or archive of the photographs, in one of these layouts. data/splits/miniimagenet.json, the published
lists, gives the split of each class:

    train.csv, val.csv, test.csv    next to the photographs, or in --csv: a header, then <file name>,<wnid> per image
    {train,val,test}/<wnid>/*.jpg   or <wnid>/*.jpg
    <wnid>*.jpg                     the first nine characters of a photograph's name are its class

    python data/miniImagenet/proc_images.py --images images.zip

From ImageNet's training set (ILSVRC 2012), as a folder of <wnid>/ or <wnid>.tar, or as the published archive. The csv
files number the images of each class, up to 1,300, but do not define the numbers. As in yaoyao-liu/mini-imagenet-tools,
image 5 of a class is the fifth when sorted by ImageNet's numbers. Without the csv files, the first 600 images of each
class are used, which are not the published ones:

    python data/miniImagenet/proc_images.py --imagenet ILSVRC2012_img_train.tar --csv DIR

From the widely shared pickles mini-imagenet-cache-{train,val,test}.pkl, or validation for val, whose 84x84 images are
saved losslessly as PNG:

    python data/miniImagenet/proc_images.py --pickles DIR

To resume a killed run, run the same command again; it skips finished classes.
"""

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive
from files import SPELLINGS

SIZE = (84, 84)  # cbfinn/maml, data/miniImagenet/proc_images.py
CLASS_SIZE = 600  # Ravi & Larochelle, ICLR 2017, like the numbers in EXPECTED
EXPECTED = archive.published_counts(train=(64, 38_400), val=(16, 9_600), test=(20, 12_000))
CLASS_LISTS = HERE.parent / "splits" / "miniimagenet.json"
LAYOUTS = "{train,val,test}/<wnid>/*.jpg, <wnid>/*.jpg, <wnid>*.jpg, or any *.jpg with train.csv, val.csv and test.csv"
# Columns of csv files: filename,label in Ravi & Larochelle's, image_name,image_label in others
FILE_COLUMN = re.compile(r"\w*(file|name|image|id|path)\w*", re.IGNORECASE)
LABEL_COLUMN = re.compile(r"\w*(label|class|category|wnid)\w*", re.IGNORECASE)
CSV_NAME = re.compile(r"[^/\\,.\0][^/\\,\0]*")  # no paths: they become names in --out

Photographs = dict[str, archive.File]  # file name, or path in the source -> where to read it


def find_imagenet(source: Path) -> Photographs:
    """Return ImageNet's photographs of the 100 classes, named as in the csv files: <wnid><rank in its class>.jpg."""
    lists = json.loads(CLASS_LISTS.read_text())
    places = archive.imagenet(source)
    named: Photographs = {}
    for wnid in (wnid for split in archive.SPLITS for wnid in lists[split] if wnid in places):
        photographs = archive.photographs(places[wnid])
        numbers = {}
        for name, file in photographs.items():
            if not (match := re.fullmatch(rf"{wnid}_(\d+)\.JPEG", name)):
                raise archive.InputError(f"{file}: is not named {wnid}_<number>.JPEG as in ImageNet; move it away")
            numbers[int(match[1])] = file
        for rank, number in enumerate(sorted(numbers), start=1):
            named[f"{wnid}{rank:08}.jpg"] = numbers[number]
    archive.say("Images are numbered by rank in their ImageNet class; the csv files do not define their numbers.")
    return named


def read_csv(file: archive.File) -> dict[str, list[str]]:
    """Return {label: file names} of a csv file: a header such as `filename,label`, then a line per image.

    Other columns, spaces around a value, quotes and empty lines are ignored.
    """
    lines = csv.reader(file.read_bytes().decode("utf-8-sig", "replace").splitlines(), skipinitialspace=True)
    names, columns = defaultdict(list), None
    try:
        for line in lines:
            fields = [field.strip() for field in line]
            if columns is None:
                columns = csv_columns(file, fields)
            elif any(fields):
                name, label = (fields[column] if column < len(fields) else "" for column in columns)
                if not (CSV_NAME.fullmatch(name) and CSV_NAME.fullmatch(label)):
                    raise archive.InputError(
                        f"{file}: line {lines.line_num}, {','.join(line)[:60]!r}, does not have a file name without "
                        "folders, and a label; correct it"
                    )
                names[label].append(name)
    except csv.Error as error:
        raise archive.InputError(f"{file}: line {lines.line_num} is damaged ({error}); fetch it again") from error
    if columns is None:
        raise archive.InputError(f"{file}: is empty; fetch it again")
    return names


def csv_columns(file: archive.File, header: list[str]) -> tuple[int, int]:
    """Return the columns of the file name and the label, in any order and among others, such as a row number."""
    labels = [i for i, name in enumerate(header) if LABEL_COLUMN.fullmatch(name)]
    files = [i for i, name in enumerate(header) if i not in labels and FILE_COLUMN.fullmatch(name)]
    files = [i for i in files if header[i].lower() != "id"] or files
    if len(labels) != 1 or len(files) != 1:
        raise archive.InputError(
            f"{file}: begins with {','.join(header)[:60]!r}, not with a header such as filename,label; add it"
        )
    return files[0], labels[0]


def find_csv(files: dict[str, archive.File]) -> dict[str, archive.File]:
    """Return train.csv, val.csv and test.csv, by split, of the files of a folder or archive."""
    found: dict[str, archive.File] = {}
    for path, file in files.items():
        stem, _, suffix = path.rpartition("/")[2].lower().rpartition(".")
        if suffix != "csv" or stem not in SPELLINGS:
            continue
        if (split := SPELLINGS[stem]) in found:
            raise archive.InputError(f"{file}: lists the same split as {found[split]}; keep only one of them")
        found[split] = file
    return found


def classes_of_csv(csv_files: dict[str, archive.File], photographs: Photographs) -> list[archive.Class]:
    """Return the classes of csv files. A class of the published lists gets their split, any other that of its file."""
    published, names, others, label_of = published_splits(), defaultdict(list), set(), {}
    for split in archive.SPLITS:
        for label, files in read_csv(csv_files[split]).items():
            for name in files:
                if label_of.setdefault(name, label) != label:
                    raise archive.InputError(
                        f"{csv_files[split]}: {name} has the label {label}, and also {label_of[name]}; keep only one"
                    )
            names[f"{published.get(label, split)}/{label}"] += files
            others |= {label} if published.get(label, split) != split else set()
    say_moved(others)
    if unknown := sorted(set(label_of.values()) - published.keys()):
        archive.say(
            f"{len(unknown)} classes are not in {CLASS_LISTS.name}, so no number of theirs is published: "
            f"{', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}"
        )
    return [
        archive.Class(
            folder=folder,
            images={name: photographs[name] for name in files if name in photographs},
            missing=sum(name not in photographs for name in files),
        )
        for folder, files in names.items()
    ]


def published_splits() -> dict[str, str]:
    """Return {wnid: split} of the published classes."""
    lists = json.loads(CLASS_LISTS.read_text())
    return {wnid: split for split in archive.SPLITS for wnid in lists[split]}


def say_moved(wnids: set[str]) -> None:
    """Print how many classes of the source are in a different split from the published lists."""
    if wnids:
        archive.say(f"{len(wnids)} classes are in another split of the source; using the splits of {CLASS_LISTS.name}")


def in_class_folders(files: Photographs) -> list[tuple[str, str, str, archive.File]] | None:
    """Return (parent of the class folder, wnid, name, file) of every photograph; None if one is not in a <wnid>/."""
    matches = [(re.fullmatch(r"(?:(.*)/)?(n\d{8})/([^/]+)", path), file) for path, file in files.items()]
    return [(*match.groups(""), file) for match, file in matches] if all(match for match, _ in matches) else None


def refuse_strays(files: Photographs) -> None:
    """Raise InputError if some photographs are outside the <wnid>/ folders of others that are not named after them."""
    inside = {path: match[1] for path in files if (match := re.search(r"(?:^|/)(n\d{8})/[^/]+$", path))}
    strays = [path for path in files if path not in inside]
    if strays and any(not path.rpartition("/")[2].startswith(wnid) for path, wnid in inside.items()):
        raise archive.InputError(
            f"{files[strays[0]]}: is not in a <wnid>/ folder, as {len(inside):,} of {len(files):,} photographs are; "
            "move it away"
        )


def classes_of_folders(rows: list[tuple[str, str, str, archive.File]]) -> list[archive.Class]:
    """Return the published classes among class folders. rows: see in_class_folders.

    The images of a class may be divided among the folders of several splits, as for ordinary classification.
    """
    published, images, roots, others = published_splits(), defaultdict(dict), {}, set()
    stems: set[tuple[str, str]] = set()  # two files of a class that differ only in their suffix would become one .png
    for parent, wnid, name, file in rows:
        root, _, last = parent.rpartition("/")
        split = SPELLINGS.get(last.lower())
        others |= {wnid} if split and wnid in published and split != published[wnid] else set()
        root, stem = root if split else parent, (wnid, Path(name).stem)
        if roots.setdefault(wnid, root) != root or stem in stems:
            raise archive.InputError(f"{file}: is a second folder or photograph of that name; keep only one of them")
        stems.add(stem)
        if re.match(r"n\d{8}", name) and not name.startswith(wnid):
            raise archive.InputError(f"{file}: is named after a different class from its folder; move it to that class")
        images[wnid][name] = file
    say_moved(others)
    return classes_of_lists(images)


def classes_by_name(photographs: Photographs) -> list[archive.Class]:
    """Return the published classes. The first nine characters of an image's name are its class."""
    images: dict[str, archive.Images] = defaultdict(dict)
    for name, file in photographs.items():
        images[name[:9]][name] = file
    return classes_of_lists(images)


def classes_of_lists(images: dict[str, archive.Images]) -> list[archive.Class]:
    """Return the classes of data/splits/miniimagenet.json, given {wnid: images}.

    If a class has more than 600 images, use the first 600 by name. Print how many images and classes are left out.
    """
    known = published_splits().keys() & images.keys()
    left_out = sum(max(0, len(images[wnid]) - CLASS_SIZE) for wnid in known)
    if left_out:
        archive.say(
            f"left out {left_out:,} images after the first {CLASS_SIZE} of their class; the csv files list others"
        )
    others = len(images.keys() - known)
    if known and others:
        archive.say(f"left out {others:,} classes that are not in {CLASS_LISTS.name}")
    # Keep the archive's order, because a compressed tar is read sequentially.
    chosen = {wnid: set(sorted(images[wnid])[:CLASS_SIZE]) for wnid in known}
    kept = {wnid: {name: file for name, file in images[wnid].items() if name in chosen[wnid]} for wnid in known}
    return archive.by_lists(kept, CLASS_LISTS, CLASS_SIZE)


def find_classes(
    files: Photographs, csv_folder: Path | None, csv_in_source: dict[str, archive.File] | None = None
) -> list[archive.Class]:
    """Return the classes of photographs, and print the layout.

    Args:
        files: the photographs by their paths in the source.
        csv_folder: of --csv; None: HERE, which may lack csv files.
        csv_in_source: the csv files in the source, by split.
    """
    csv_files = find_csv({path.name: path for path in (csv_folder or HERE).glob("*.csv")})
    if missing := [split for split in archive.SPLITS if split not in csv_files and (csv_folder or csv_files)]:
        path = (csv_folder or HERE) / f"{missing[0]}.csv"
        raise archive.InputError(f"{path}: no such file; provide train.csv, val.csv and test.csv")
    rows = in_class_folders(files)
    if rows and not csv_folder and not named_in(csv_files, files):
        parents = sorted({f"{parent}/<wnid>/".lstrip("/") for parent, *_ in rows})
        archive.say(f"Layout: class folders {', '.join(parents)}")
        return classes_of_folders(rows)
    if not csv_folder and len(csv_in_source or {}) == len(archive.SPLITS):
        csv_files = csv_in_source
    if csv_files:
        archive.say(f"Layout: photographs named in {', '.join(str(csv_files[split]) for split in archive.SPLITS)}")
        return classes_of_csv(csv_files, archive.by_name(files))
    refuse_strays(files)
    classes = classes_by_name(archive.by_name(files))
    if any(entry.images for entry in classes):
        archive.say("Layout: photographs <wnid>*.jpg, without csv files")
    return classes


def named_in(csv_files: dict[str, archive.File], files: Photographs) -> bool:
    """Return whether the csv files name any of the photographs."""
    names = {path.rpartition("/")[2] for path in files}
    return any(not names.isdisjoint(listed) for file in csv_files.values() for listed in read_csv(file).values())


def classes_of_pickles(folder: Path) -> list[archive.Class]:
    """Return the classes of mini-imagenet-cache-{train,val,test}.pkl, and print the names of the files.

    Each is a dict with image_data, uint8 [n, 84, 84, 3], and class_dict, WordNet ID -> list of indices. Images are
    named by their index.
    """
    images: dict[str, archive.Images] = {}
    paths = []
    for split in archive.SPLITS:
        candidates = [folder / f"mini-imagenet-cache-{name}.pkl" for name in SPELLINGS if SPELLINGS[name] == split]
        paths.append(next((path for path in candidates if path.is_file()), candidates[0]))
    archive.say(f"Layout: pickles {', '.join(map(str, paths))}")
    for path in paths:
        cache = archive.unpickle(path)
        try:
            pixels = cache["image_data"]
            if pixels.dtype.name != "uint8" or pixels.shape[1:] != (*SIZE, 3):
                raise ValueError(f"image_data is {pixels.dtype} {pixels.shape}")
            for wnid, indices in cache["class_dict"].items():
                images[wnid] = {f"{int(index):05}": pixels[int(index)] for index in indices}
        except Exception as error:  # the pickle may have any structure
            raise archive.InputError(f"{path}: is not a MiniImagenet cache ({error}); fetch it again") from error
    return classes_of_lists(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_mutually_exclusive_group()
    images_help = "folder or archive of the photographs (default: images/ in the script's folder)"
    sources.add_argument("--images", type=archive.user_path, default=HERE / "images", help=images_help)
    sources.add_argument("--imagenet", type=archive.user_path, help="folder or archive of ImageNet's training set")
    sources.add_argument("--pickles", type=archive.user_path, help="folder of mini-imagenet-cache-{train,val,test}.pkl")
    parser.add_argument("--csv", type=archive.user_path, help="folder of the csv files (default: the script's folder)")
    parser.add_argument("--out", type=archive.user_path, default=HERE, help=archive.OUT_HELP)
    parser.add_argument("--lossless", action="store_true", help="save as PNG; published results use JPEG")
    parser.add_argument("--allow_missing", action="store_true", help="continue if classes or images are missing")
    parser.add_argument("--short_side", type=archive.short_side, help=archive.SHORT_SIDE_HELP)
    args = parser.parse_args()
    if args.pickles and args.short_side:
        parser.error("--short_side: the pickles contain 84x84 images, not photographs; remove the flag")
    if args.pickles and args.csv:
        parser.error("--csv: the pickles already define the classes; remove the flag")
    archive.claim(args.out, HERE)
    source = args.pickles or args.imagenet or args.images
    if args.pickles:
        classes = classes_of_pickles(args.pickles)
    else:
        files = find_imagenet(source) if args.imagenet else archive.list_files(source)
        photographs = archive.jpegs(files, source)
        classes = find_classes(photographs, args.csv, find_csv(files))
        if not any(entry.images for entry in classes):
            raise archive.InputError(
                f"{source}: has {len(photographs):,} photographs, such as {next(iter(photographs))}, but none is of "
                f"a published class or named in the csv files; use {LAYOUTS}"
            )
    # Differs: the original resizes and moves the photographs in images/; we leave them unchanged.
    suffix = ".png" if args.lossless or args.pickles else ".jpg"  # JPEG at Pillow's default quality, as in the original
    classes = archive.refuse_missing(classes, args.allow_missing)
    archive.write_classes(classes, args.out, args.short_side or SIZE, suffix, EXPECTED)


if __name__ == "__main__":
    archive.run(main)
