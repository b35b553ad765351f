"""The public sources that `mmdd` can fetch, with what their owners allow. A table, no logic."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub: repository, path in it, revision, kind of repository."""

    repo: str
    path: str
    revision: str
    repo_type: str = "dataset"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a source.

    name: file name in the source's folder. url or hub: where it is. sha256: 64 hex digits, or the
    leading ones when only those are published; None where nobody has published any, in which case
    the first download's sum is recorded beside the file and later ones must agree. unpack_to:
    folder for the contents of an archive, or None; max_bytes: refuse to unpack more.
    """

    name: str
    url: str | None = None
    hub: HubFile | None = None
    sha256: str | None = None
    unpack_to: str | None = None
    max_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """A public source. name: key and folder name; licence: what may be done with it, in words."""

    name: str
    title: str
    homepage: str
    licence: str
    files: tuple[RemoteFile, ...]


_GB = 10**9
_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
_COCO = "http://images.cocodataset.org/"  # its HTTPS certificate does not match the name
_FLICKR_PHOTOS = (
    "The photos belong to their Flickr authors; for non-commercial research and education only, "
    "not to be redistributed."
)

_TABLE = (
    Source(
        name="flickr8k",
        title="Flickr8k (Hodosh, Young, Hockenmaier, JAIR 2013)",
        homepage="https://github.com/jbrownlee/Datasets/releases/tag/Flickr8k",
        licence=_FLICKR_PHOTOS,
        files=(
            RemoteFile(
                "Flickr8k_Dataset.zip",
                url=_FLICKR8K + "Flickr8k_Dataset.zip",
                unpack_to="images",
                max_bytes=3 * _GB,
            ),
            RemoteFile(
                "Flickr8k_text.zip",
                url=_FLICKR8K + "Flickr8k_text.zip",
                unpack_to="text",
                max_bytes=_GB,
            ),
        ),
    ),
    Source(
        name="flickr30k",
        title="Flickr30k (Young, Lai, Hodosh, Hockenmaier, TACL 2014)",
        homepage="https://shannon.cs.illinois.edu/DenotationGraph/",
        licence=_FLICKR_PHOTOS,
        files=(
            RemoteFile(
                "flickr30k-images.zip",
                hub=HubFile(
                    "nlphuji/flickr30k",
                    "flickr30k-images.zip",
                    "2b239befc81b6e3f035ce6bd52f5f4d60f5625f7",
                ),
                unpack_to="images",
                max_bytes=10 * _GB,
            ),
        ),
    ),
    Source(
        name="coco",
        title="COCO 2014 (Lin et al., ECCV 2014; captions: Chen et al., arXiv:1504.00325)",
        homepage="https://cocodataset.org/#termsofuse",
        licence=(
            "Captions: Creative Commons Attribution 4.0, COCO Consortium. Photos: each under the "
            "licence its Flickr author chose, named in the annotation files; Flickr's terms hold."
        ),
        files=(
            RemoteFile(
                "train2014.zip",
                url=_COCO + "zips/train2014.zip",
                unpack_to="images/train2014",
                max_bytes=20 * _GB,
            ),
            RemoteFile(
                "val2014.zip",
                url=_COCO + "zips/val2014.zip",
                unpack_to="images/val2014",
                max_bytes=10 * _GB,
            ),
            RemoteFile(
                "annotations_trainval2014.zip",
                url=_COCO + "annotations/annotations_trainval2014.zip",
                unpack_to="annotations",
                max_bytes=3 * _GB,
            ),
        ),
    ),
    Source(
        name="karpathy",
        title="Captions and splits of Flickr8k, Flickr30k and COCO (Karpathy, Fei-Fei, CVPR 2015)",
        homepage="https://cs.stanford.edu/people/karpathy/deepimagesent/",
        licence="No licence of its own is stated; the terms of each dataset hold for its captions.",
        files=(
            RemoteFile(
                "caption_datasets.zip",
                url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
                unpack_to="json",
                max_bytes=2 * _GB,
            ),
        ),
    ),
    Source(
        name="cifar-resnet20",
        title="ResNet-20 for CIFAR-10 (Idelbayev, pytorch_resnet_cifar10; He et al. 2016)",
        homepage="https://github.com/akamaster/pytorch_resnet_cifar10",
        licence="BSD-2-Clause.",
        files=(
            RemoteFile(
                "resnet20-12fca82f.th",
                url=(
                    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/"
                    "pretrained_models/resnet20-12fca82f.th"
                ),
                sha256="12fca82f",
            ),
        ),
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _TABLE}
