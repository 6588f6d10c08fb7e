"""List the data sets known by name: size, statistics, archives, license and matching augmentation.

A new data set is one entry of `DATASETS`; it also needs a function in `readers.READERS` if its format is new.
This module imports no torch.

Checksums are those that torchvision publishes; Tiny-ImageNet's is the one its users agree on. Means and standard
deviations are those of the training images, with pixels in [0, 1]. The test set is the published part with labels;
for Tiny-ImageNet and ImageNet this is their validation part.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from smallvit.utils.errors import InputError, suggest

MANIFESTS = (".csv", ".tsv", ".parquet")
"""Suffixes of tables of image files."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file of a data set as its authors distribute it."""

    file: str
    """File name in the data set's folder."""
    url: str | None
    """Complete URL; None if the authors require a login."""
    md5: str
    """Checksum of the file."""
    size: int | None = None
    """Size in bytes, for the download column of `smallvit list data`."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A data set known by name."""

    title: str
    """Name as its authors write it."""
    num_classes: int
    """Number of classes."""
    img_size: int
    """Default height and width in pixels."""
    in_chans: int = 3
    """Number of channels: 1 gray, 3 color."""
    num_train: int
    """Number of training images; of all images if there is no published test set."""
    num_test: int
    """Number of labeled test images; 0 if the test set is split off here."""
    mean: tuple[float, ...] = ()
    """Mean of each channel; by default measured on the training images."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise."""
    flip: bool
    """Whether a mirrored image keeps its class."""
    aug: str = "lee2021"
    """Augmentation preset that `--aug auto` selects."""
    policy: str
    """AutoAugment policy that `--policy autoaugment` selects: cifar10, svhn or imagenet."""
    archives: tuple[Archive, ...] = ()
    """Files to download; none if the images come with a library."""
    reader: str = "image-folder"
    """Format of the files, a key of `readers.READERS`; image-folder is one zip or tar file of class folders."""
    folder: str | None = None
    """Folder under `--data-dir`; by default the data set's name."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, if the files do not have them."""
    hub: str | None = None
    """Name on the Hugging Face Hub, for model cards."""
    citation: str
    """Authors, year and title."""
    license: str
    """License or terms of use, with the address for files behind a login."""


def _archives(url: str | None, *files: tuple[str, str, int | None]) -> tuple[Archive, ...]:
    """Return archives that lie in one folder at `url`, given their names, checksums and sizes."""
    return tuple(Archive(file=file, url=url and f"{url}/{file}", md5=md5, size=size) for file, md5, size in files)


DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KRIZHEVSKY = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
NETZER = "Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning"
CIFAR100 = DatasetInfo(
    title="CIFAR-100",
    num_classes=100,
    img_size=32,
    num_train=50_000,
    num_test=10_000,
    mean=(0.5070, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    flip=True,
    policy="cifar10",
    archives=_archives(
        "https://www.cs.toronto.edu/~kriz",
        ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437),
    ),
    reader="cifar",
    hub="uoft-cs/cifar100",
    citation=KRIZHEVSKY,
    license="no license stated; its authors ask to be cited",
)

SVHN = DatasetInfo(
    title="SVHN, cropped digits",
    num_classes=10,
    class_names=DIGITS,
    img_size=32,
    num_train=73_257,
    num_test=26_032,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    flip=False,
    policy="svhn",
    archives=_archives(
        "http://ufldl.stanford.edu/housenumbers",
        ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
        ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
    ),
    reader="svhn",
    hub="ufldl-stanford/svhn",
    citation=NETZER,
    license="for non-commercial use",
)

DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        title="Optical Recognition of Handwritten Digits",
        num_classes=10,
        class_names=DIGITS,
        img_size=8,
        in_chans=1,
        num_train=1797,
        num_test=0,
        flip=False,
        aug="basic",
        policy="cifar10",
        reader="sklearn-digits",
        citation="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI, its test images",
        license="CC BY 4.0; comes with scikit-learn",
    ),
    "cifar10": DatasetInfo(
        title="CIFAR-10",
        num_classes=10,
        img_size=32,
        num_train=50_000,
        num_test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flip=True,
        policy="cifar10",
        archives=_archives(
            "https://www.cs.toronto.edu/~kriz",
            ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071),
        ),
        reader="cifar",
        hub="uoft-cs/cifar10",
        citation=KRIZHEVSKY,
        license="no license stated; its authors ask to be cited",
    ),
    "cifar100": CIFAR100,
    "cifar100-coarse": replace(CIFAR100, title="CIFAR-100, superclasses", num_classes=20, folder="cifar100"),
    "svhn": SVHN,
    "svhn-extra": replace(  # with SVHN's mean and std, as published, so that models stay comparable
        SVHN,
        title="SVHN, cropped digits, with the extra images",
        num_train=73_257 + 531_131,
        folder="svhn",
        archives=SVHN.archives
        + _archives(
            "http://ufldl.stanford.edu/housenumbers",
            ("extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", 1_329_278_602),
        ),
    ),
    "tiny-imagenet": DatasetInfo(
        title="Tiny-ImageNet",
        num_classes=200,
        img_size=64,
        num_train=100_000,
        num_test=10_000,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        flip=True,
        policy="imagenet",
        archives=_archives(
            "http://cs231n.stanford.edu",
            ("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", 248_100_043),
        ),
        hub="zh-plus/tiny-imagenet",
        citation="Le and Yang 2015, Tiny ImageNet Visual Recognition Challenge, Stanford CS231n",
        license="ImageNet's: for non-commercial research and education",
    ),
    "mnist": DatasetInfo(
        title="MNIST",
        num_classes=10,
        class_names=DIGITS,
        img_size=28,
        in_chans=1,
        num_train=60_000,
        num_test=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        flip=False,
        aug="basic",
        policy="cifar10",
        archives=_archives(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        ),
        reader="mnist",
        hub="ylecun/mnist",
        citation="LeCun, Bottou, Bengio, Haffner 1998, Gradient-Based Learning Applied to Document Recognition",
        license="CC BY-SA 3.0",
    ),
    "fashion-mnist": DatasetInfo(
        title="Fashion-MNIST",
        num_classes=10,
        class_names=FASHION,
        img_size=28,
        in_chans=1,
        num_train=60_000,
        num_test=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        flip=True,
        aug="basic",
        policy="cifar10",
        archives=_archives(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", 29_515),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", 4_422_102),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", 5_148),
        ),
        reader="mnist",
        hub="zalando-datasets/fashion_mnist",
        citation="Xiao, Rasul, Vollgraf 2017, Fashion-MNIST, arXiv:1708.07747",
        license="MIT",
    ),
    "imagenet": DatasetInfo(
        title="ImageNet (ILSVRC 2012)",
        num_classes=1000,
        img_size=224,
        num_train=1_281_167,
        num_test=50_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip=True,
        aug="deit",
        policy="imagenet",
        archives=_archives(
            None,
            ("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
            ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
            ("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", None),
        ),
        reader="imagenet",
        hub="ILSVRC/imagenet-1k",
        citation="Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge, arXiv:1409.0575",
        license="for non-commercial research and education, after registration at https://image-net.org/download",
    ),
}


def is_hub_source(data: str) -> bool:
    """Return whether `data` names a data set of the Hugging Face Hub, as in hfds/NAME."""
    kind, _, name = data.partition("/")
    return kind == "hfds" and bool(name)


def is_manifest(data: str) -> bool:
    """Return whether `data` names a table of image files (`manifest`)."""
    return data.lower().endswith(MANIFESTS) and not os.path.isdir(os.path.expanduser(data))


def require_data(data: str) -> None:
    """Check that `data` is a known data set, hfds/NAME, or an existing file or folder.

    Raises:
        InputError: it is none of these.
    """
    path = os.path.expanduser(data)
    if data in DATASETS or is_hub_source(data) or os.path.exists(path):
        return
    if is_manifest(data):
        raise InputError(f"--data {path}: no such file; correct the path")
    if os.path.basename(path) == data:
        known = ", ".join(DATASETS)
        raise InputError(f"--data {data}: no such data set{suggest(data, DATASETS)} or folder; data sets: {known}")
    raise InputError(f"--data {path}: no such folder")
