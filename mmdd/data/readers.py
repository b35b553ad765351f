"""Caption files of the public sources → `PairDataset`: Karpathy JSON, COCO JSON, Flickr8k text.

A reader lists what a captions file says, has the images decoded once (`mmdd.data.cache`), and
reports everything that does not fit together in one error.
"""

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from mmdd.data.cache import Failures, PreparedImages, prepare_images
from mmdd.data.decode import SUFFIXES
from mmdd.data.pairs import PairDataset
from mmdd.data.report import Report
from mmdd.data.sources import SOURCES
from mmdd.data.unicode import whole_characters
from mmdd.errors import ConfigError, DataError

log = logging.getLogger(__name__)

OnError = Literal["raise", "drop"]
PathLike = str | Path

_SPLIT_ORDER = ("train", "val", "test")
# Used only where a source comes without splits; part of the fingerprint through the splits.
_SPLIT_SEED = 0
_HELD_OUT = {"val": 0.1, "test": 0.1}


def read_karpathy(
    json_path: PathLike,
    image_root: PathLike,
    size: int,
    cache: PathLike | None = None,
    *,
    on_error: OnError = "raise",
    workers: int | None = None,
    progress: bool = True,
    name: str | None = None,
) -> PairDataset:
    """Read Flickr8k, Flickr30k or COCO with the captions and splits of Karpathy and Fei-Fei.

    json_path: dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json. image_root: the
    folder of the images; for COCO the one that holds train2014/ and val2014/, or one with all
    images. size: side of the square images in pixels. cache, workers, progress: see
    `mmdd.data.cache.prepare_images`. on_error: "raise" to refuse a source with any offender,
    "drop" to leave offenders out and log how many. name: of the dataset, by default from the file.

    Splits are kept, with "restval" (COCO) counted as "train", as is usual.

    Raises `SourceError` naming every offender; `DataError` when the file is not what it should be.

    Source: Karpathy and Fei-Fei, CVPR 2015. Book: notebooks/01_data.
    """
    _check_on_error(on_error)
    # A function of its own, so that the parsed JSON (a gigabyte for COCO) is gone while decoding.
    listing, default = _list_karpathy(Path(json_path), Path(image_root))
    return _build(listing, size, cache, on_error, workers, progress, name or default)


def read_coco_captions(
    annotations: Mapping[str, PathLike] | PathLike,
    image_root: PathLike,
    size: int,
    cache: PathLike | None = None,
    *,
    on_error: OnError = "raise",
    workers: int | None = None,
    progress: bool = True,
    name: str | None = None,
) -> PairDataset:
    """Read captions in the official COCO form, such as annotations/captions_train2014.json.

    annotations: {split: file}, whose splits are kept, or one file, which is split 80/10/10 by
    `seeded_split`. image_root: the folder of the images, or of train2014/, val2014/ …; the other
    arguments are those of `read_karpathy`.

    Raises `SourceError` naming every offender; `DataError` when a file is not what it should be.

    Source: Chen et al., arXiv:1504.00325. Book: notebooks/01_data.
    """
    _check_on_error(on_error)
    files: dict[str | None, Path] = (
        {split: Path(path) for split, path in annotations.items()}
        if isinstance(annotations, Mapping)
        else {None: Path(annotations)}
    )
    if not files:
        raise DataError("read_coco_captions needs at least one annotation file, got none.")
    listing = _Listing(list(files.values()), Path(image_root))
    for split, path in files.items():
        _list_coco(listing, path, split)
    return _build(listing, size, cache, on_error, workers, progress, name or "coco-captions")


def read_flickr8k(
    captions_path: PathLike,
    image_root: PathLike,
    size: int,
    cache: PathLike | None = None,
    *,
    split_files: Mapping[str, PathLike] | None = None,
    on_error: OnError = "raise",
    workers: int | None = None,
    progress: bool = True,
    name: str | None = None,
) -> PairDataset:
    """Read Flickr8k's own captions: Flickr8k.token.txt, or a CSV with the header image,caption.

    captions_path: lines of `name#number<TAB>caption`, or the CSV (captions with commas in double
    quotes). image_root: the folder of the images; an image in it that the captions do not mention
    is an offender. split_files: {split: file with one image name per line}, such as
    Flickr_8k.trainImages.txt; images in none of them are left out. Without it, `seeded_split`
    splits 80/10/10. The other arguments are those of `read_karpathy`.

    Flickr8k.token.txt itself captions one image, 2258277193_586949ec62.jpg.1, that does not exist:
    with the official split files nothing refers to it, without them on_error="drop" is needed.

    Raises `SourceError` naming every offender; `DataError` when a file is not what it should be.

    Source: Hodosh, Young and Hockenmaier, JAIR 2013. Book: notebooks/01_data.
    """
    _check_on_error(on_error)
    path, root = Path(captions_path), Path(image_root)
    listing = _Listing([path], root)
    captions = _read_caption_lines(path, listing.report)
    split_of = _read_split_files(split_files or {}, captions, listing.report)
    left_out = 0
    for image, texts in captions.items():
        if split_files and image not in split_of:
            left_out += 1
            continue
        listing.add(image, texts, split_of.get(image))
    if left_out:
        log.info("%s: %d captioned images are in no split: left out", path.name, left_out)
    for image in _images_in(root):
        if image not in captions:
            listing.report.add("image without caption", image)
    return _build(listing, size, cache, on_error, workers, progress, name or "flickr8k")


def seeded_split(names: list[str], seed: int = _SPLIT_SEED) -> dict[str, str]:
    """Split of each name where a source has none: 80 % train, 10 % val, 10 % test.

    Names are ordered by sha256 of "seed:name"; the first tenth is the test split, the second the
    validation split (at least one image each from three images on). The outcome depends on the
    seed and the set of names only, on any machine. Book: notebooks/01_data.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    split_of = dict.fromkeys(names, "train")
    start = 0
    for split in ("test", "val"):
        count = round(_HELD_OUT[split] * len(order))
        if len(order) >= 3:
            count = max(1, count)
        split_of.update(dict.fromkeys(order[start : start + count], split))
        start += count
    return split_of


# From a captions file to a listing


@dataclass
class _Listing:
    """What a captions file says, before any image is opened: image names in the file's order."""

    files: list[Path]
    root: Path
    captions: dict[str, list[str]] = field(default_factory=dict)
    split_of: dict[str, str] = field(default_factory=dict)
    without_split: list[str] = field(default_factory=list)
    blank: int = 0

    def __post_init__(self) -> None:
        sources = " and ".join(path.name for path in self.files)
        self.report = Report(f"{sources} with images in {self.root}")
        if not self.root.is_dir():
            raise DataError(f"the image folder {self.root} does not exist: check image_root.")
        self._folders: dict[str, bool] = {}

    def resolve(self, folder: str, file_name: str) -> str:
        """Name of an image relative to the root, which may or may not have its subfolders."""
        if folder not in self._folders:
            try:
                self._folders[folder] = bool(folder) and (self.root / folder).is_dir()
            except OSError:  # a name longer than the file system takes
                self._folders[folder] = False
        return f"{folder}/{file_name}" if self._folders[folder] else file_name

    def add(self, image: str, texts: list[str], split: str | None) -> None:
        pure = PurePosixPath(image)
        if pure.is_absolute() or ".." in pure.parts or "\\" in image or "\0" in image:
            self.report.add("image name outside the folder", repr(image))
            return
        if whole_characters(image) != image:
            self.report.add("image name with half a character", ascii(image))
            return
        if image in self.captions:
            self.report.add("duplicate image", image, "only its first entry counts")
            return
        words = [" ".join(text.split()) for text in texts]
        self.blank += words.count("")
        words = [text for text in words if text]
        if not words:
            self.report.add("image without caption", image)
            return
        self.captions[image] = words
        if split:
            self.split_of[image] = split
        else:
            self.without_split.append(image)

    def settle_splits(self) -> bool:
        """Give every image a split; returns whether the splits are the source's own."""
        if not self.split_of:
            self.split_of = seeded_split(list(self.captions))
            return False
        for image in self.without_split:
            self.report.add("image without split", image)
            del self.captions[image]
        return True


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "drop"):
        raise ConfigError(f'on_error must be "raise" or "drop", not {on_error!r}.')


def _sentence(sentence: Any) -> str:
    if not isinstance(sentence, dict):
        return ""
    raw = sentence.get("raw")
    if isinstance(raw, str) and raw.strip():
        return raw
    tokens = sentence.get("tokens")
    return " ".join(map(str, tokens)) if isinstance(tokens, list) else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"the file {path} does not exist.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; a file is needed.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): {error.reason}.") from None


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits and deep nesting
        raise DataError(f"{path} is not valid JSON ({error}): fetch it again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__} where an object is expected.")
    return content


def _list_of(content: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f"{path} has no list of objects {key!r}: is it a captions file of this kind?"
        )
    return entries


def _list_karpathy(path: Path, root: Path) -> tuple[_Listing, str]:
    listing = _Listing([path], root)
    content = _load_json(path)
    for position, entry in enumerate(_list_of(content, "images", path)):
        where = f"images[{position}]"
        file_name = entry.get("filename")
        if not isinstance(file_name, str) or not file_name:
            listing.report.add("entry without a file name", where)
            continue
        folder = entry.get("filepath") or ""
        image = listing.resolve(str(folder), file_name)
        split = entry.get("split")
        split = "train" if split == "restval" else split
        sentences = entry.get("sentences")
        texts = [_sentence(s) for s in sentences] if isinstance(sentences, list) else []
        listing.add(image, texts, split if isinstance(split, str) else None)
    default = str(content.get("dataset") or path.stem.removeprefix("dataset_"))
    return listing, default


def _list_coco(listing: _Listing, path: Path, split: str | None) -> None:
    content = _load_json(path)
    folder = re.sub(r"^captions_", "", path.stem)  # captions_train2014.json → train2014/
    names: dict[Any, str] = {}
    texts: dict[Any, list[str]] = {}
    for position, entry in enumerate(_list_of(content, "images", path)):
        identity, file_name = entry.get("id"), entry.get("file_name")
        if (
            not isinstance(identity, str | int | float)
            or not isinstance(file_name, str)
            or not file_name
        ):
            listing.report.add("entry without id or file name", f"{path.name} images[{position}]")
        elif identity in names:
            listing.report.add("duplicate image", file_name, f"id {identity} occurs twice")
        else:
            names[identity], texts[identity] = file_name, []
    for entry in _list_of(content, "annotations", path):
        identity = entry.get("image_id")
        if isinstance(identity, str | int | float) and identity in texts:
            caption = entry.get("caption")
            texts[identity].append(caption if isinstance(caption, str) else "")
        else:
            listing.report.add("caption without image", f"image_id {identity}", path.name)
    for identity, file_name in names.items():
        listing.add(listing.resolve(folder, file_name), texts[identity], split)


def _read_caption_lines(path: Path, report: Report) -> dict[str, list[str]]:
    text = _read_text(path)
    first = text.lstrip().partition("\n")[0]
    if "\t" in first:
        return _read_token_lines(text, report)
    header = [column.strip(' \r"') for column in first.split(",")]
    found = _read_csv(text, path, report) if {"image", "caption"} <= set(header) else None
    if found is None:
        raise DataError(
            f"{path} is neither a token file (name#number<TAB>caption) nor a CSV with the header "
            f"image,caption: its first line is {first[:80]!r}."
        )
    return found


def _read_token_lines(text: str, report: Report) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    seen: set[str] = set()
    # Not splitlines(): it would also break at characters that may stand in a caption.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        image, hash_sign, count = key.strip().rpartition("#")
        if not tab or not hash_sign or not image or not count.isdigit():
            report.add("malformed line", f"line {number}", "expected name#number<TAB>caption")
        elif key.strip() in seen:
            report.add("duplicate caption number", key.strip(), f"line {number}")
        else:
            seen.add(key.strip())
            captions.setdefault(image, []).append(caption)
    return captions


def _read_csv(text: str, path: Path, report: Report) -> dict[str, list[str]] | None:
    """Captions by image; None where the first row names no such columns."""
    captions: dict[str, list[str]] = {}
    rows = csv.reader(io.StringIO(text.lstrip(), newline=""), strict=True, skipinitialspace=True)
    try:
        header = [column.strip() for column in next(rows)]
        if not {"image", "caption"} <= set(header):
            return None
        image_column, caption_column = header.index("image"), header.index("caption")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header) or not row[image_column].strip():
                report.add(
                    "malformed line",
                    f"line {rows.line_num}",
                    f"{len(row)} columns instead of {len(header)}: is a comma not quoted?"
                    if len(row) != len(header)
                    else "no image name",
                )
                continue
            captions.setdefault(row[image_column].strip(), []).append(row[caption_column])
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not valid CSV ({error}).") from None
    return captions


def _read_split_files(
    split_files: Mapping[str, PathLike], captions: dict[str, list[str]], report: Report
) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for split, path in split_files.items():
        for line in _read_text(Path(path)).split("\n"):
            image = line.strip()
            if not image:
                continue
            if image not in captions:
                report.add("split names an unknown image", image, f"split {split}")
            elif split_of.setdefault(image, split) != split:
                report.add("image in two splits", image, f"{split_of[image]} and {split}")
    return split_of


def _images_in(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


# From a listing to a dataset


def _build(
    listing: _Listing,
    size: int,
    cache: PathLike | None,
    on_error: OnError,
    workers: int | None,
    progress: bool,
    name: str,
) -> PairDataset:
    own_splits = listing.settle_splits()
    report = listing.report
    names = list(listing.captions)
    if not names:
        report.settle("raise")
        raise DataError(f"{listing.files[0]} lists no captioned image.")

    def settle(failures: Failures) -> None:
        report.extend(failures)
        report.settle(on_error)

    prepared = prepare_images(
        names,
        listing.root,
        size,
        cache,
        on_failures=settle,
        workers=workers,
        progress=progress,
    )
    return _dataset(listing, names, prepared, own_splits, name)


def _dataset(
    listing: _Listing, names: list[str], prepared: PreparedImages, own_splits: bool, name: str
) -> PairDataset:
    kept = [names[i] for i in prepared.kept.tolist()]
    captions = [listing.captions[image] for image in kept]
    found = set(listing.split_of.values())
    order = [s for s in _SPLIT_ORDER if s in found] + sorted(found.difference(_SPLIT_ORDER))
    members: dict[str, list[int]] = {split: [] for split in order}
    for row, image in enumerate(kept):
        members[listing.split_of[image]].append(row)
    splits = {split: np.asarray(rows, dtype=np.int64) for split, rows in members.items()}
    _warn_about_leaks(listing, prepared, name)
    if listing.blank:
        log.info("%s: %d blank captions left out", name, listing.blank)
    source = SOURCES.get("coco" if name == "coco-captions" else name)
    metadata: dict[str, object] = {
        "source": [path.name for path in listing.files],
        "licence": source.licence if source else "unknown: see where the images came from",
        "splits": "official" if own_splits else f"seeded 80/10/10 (seed {_SPLIT_SEED})",
        "dropped": listing.report.counts(),
        "blank_captions": listing.blank,
        "identical_images": prepared.identical,
    }
    return PairDataset(
        prepared.images,
        captions,
        splits,
        name=name,
        fingerprint=_fingerprint(prepared, captions, members),
        metadata=metadata,
    )


def _fingerprint(
    prepared: PreparedImages, captions: list[list[str]], splits: dict[str, list[int]]
) -> str:
    # The digest of the pixels was made while decoding; reading 17 GB again at each start is not on.
    content = [list(prepared.images.shape), prepared.content, captions, splits]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _warn_about_leaks(listing: _Listing, prepared: PreparedImages, name: str) -> None:
    for group in prepared.identical:
        splits = {listing.split_of[image] for image in group}
        if len(splits) > 1:
            log.warning(
                "%s: the same picture is in the splits %s: %s",
                name,
                ", ".join(sorted(splits)),
                ", ".join(group),
            )
