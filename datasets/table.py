"""The data sets known by name: what they hold, where their archives lie, and what suits them.

Checksums are those that torchvision publishes; Tiny-ImageNet's is the one its users agree on. Means and standard
deviations are of the training images, with pixels in [0, 1]. A test set is the part that is published with labels:
for Tiny-ImageNet and ImageNet that is their validation part.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file of a data set, as its authors hand it out."""

    file: str
    """Name in the data set's folder and on mirrors."""
    url: str | None
    """Complete address; nothing where the authors ask for a login."""
    md5: str
    """Checksum of the whole file."""
    size: int | None = None
    """Bytes, for bars and room on the disk; nothing where unknown."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A data set known by name."""

    title: str
    """Name as its authors write it."""
    classes: int
    """Number of classes."""
    img_size: int
    """Height and width in pixels at which it is used."""
    in_chans: int
    """Channels: 1 grey, 3 colour."""
    train: int
    """Number of images for training; all of them where no test part is published."""
    test: int
    """Number of labelled images for the test; 0 where they are drawn from the others."""
    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    flip: bool
    """Whether a mirrored image keeps its class."""
    aug: str
    """The augmentation preset that suits it."""
    policy: str
    """The AutoAugment policy that suits it: cifar10, svhn or imagenet."""
    archives: tuple[Archive, ...]
    """The files it is read from; none where it comes with a library."""
    citation: str
    """Authors, year, title."""
    terms: str
    """On which terms it may be used, and where files behind a login are had."""


CIFAR100 = Archive(
    file="cifar-100-python.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    size=169_001_437,
)
SVHN = (
    Archive(
        file="train_32x32.mat",
        url="http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        md5="e26dedcc434d2e4c54c9b2d4a06d8373",
        size=182_040_794,
    ),
    Archive(
        file="test_32x32.mat",
        url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        md5="eb5a983be6a315427106f1b164d9cef3",
        size=64_275_384,
    ),
)
KRIZHEVSKY = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
NETZER = "Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning"

DATASETS: dict[str, Entry] = {
    "digits": Entry(
        title="Optical Recognition of Handwritten Digits",
        classes=10,
        img_size=8,
        in_chans=1,
        train=1797,
        test=0,
        mean=(0.3053,),
        std=(0.3759,),
        flip=False,
        aug="basic",
        policy="cifar10",
        archives=(),
        citation="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI, its test images",
        terms="CC BY 4.0; comes with scikit-learn",
    ),
    "cifar10": Entry(
        title="CIFAR-10",
        classes=10,
        img_size=32,
        in_chans=3,
        train=50_000,
        test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flip=True,
        aug="paper",
        policy="cifar10",
        archives=(
            Archive(
                file="cifar-10-python.tar.gz",
                url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                md5="c58f30108f718f92721af3b95e74349a",
                size=170_498_071,
            ),
        ),
        citation=KRIZHEVSKY,
        terms="no licence stated; its authors ask to be cited",
    ),
    "cifar100": Entry(
        title="CIFAR-100",
        classes=100,
        img_size=32,
        in_chans=3,
        train=50_000,
        test=10_000,
        mean=(0.5070, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        flip=True,
        aug="paper",
        policy="cifar10",
        archives=(CIFAR100,),
        citation=KRIZHEVSKY,
        terms="no licence stated; its authors ask to be cited",
    ),
    "cifar100-coarse": Entry(
        title="CIFAR-100, super-classes",
        classes=20,
        img_size=32,
        in_chans=3,
        train=50_000,
        test=10_000,
        mean=(0.5070, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        flip=True,
        aug="paper",
        policy="cifar10",
        archives=(CIFAR100,),
        citation=KRIZHEVSKY,
        terms="no licence stated; its authors ask to be cited",
    ),
    "svhn": Entry(
        title="SVHN, cropped digits",
        classes=10,
        img_size=32,
        in_chans=3,
        train=73_257,
        test=26_032,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        flip=False,
        aug="paper",
        policy="svhn",
        archives=SVHN,
        citation=NETZER,
        terms="for non-commercial use",
    ),
    "svhn-extra": Entry(
        title="SVHN, cropped digits, with the extra images",
        classes=10,
        img_size=32,
        in_chans=3,
        train=73_257 + 531_131,
        test=26_032,
        mean=(0.4377, 0.4438, 0.4728),  # without the extra images: published figures, and models stay comparable
        std=(0.1980, 0.2010, 0.1970),
        flip=False,
        aug="paper",
        policy="svhn",
        archives=(
            *SVHN,
            Archive(
                file="extra_32x32.mat",
                url="http://ufldl.stanford.edu/housenumbers/extra_32x32.mat",
                md5="a93ce644f1a588dc4d68dda5feec44a7",
                size=1_329_278_602,
            ),
        ),
        citation=NETZER,
        terms="for non-commercial use",
    ),
    "tiny-imagenet": Entry(
        title="Tiny-ImageNet",
        classes=200,
        img_size=64,
        in_chans=3,
        train=100_000,
        test=10_000,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        flip=True,
        aug="paper",
        policy="imagenet",
        archives=(
            Archive(
                file="tiny-imagenet-200.zip",
                url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                md5="90528d7ca1a48142e341f4ef8d21d0de",
                size=248_100_043,
            ),
        ),
        citation="Le and Yang 2015, Tiny ImageNet Visual Recognition Challenge, Stanford CS231n",
        terms="ImageNet's: for non-commercial research and education",
    ),
    "mnist": Entry(
        title="MNIST",
        classes=10,
        img_size=28,
        in_chans=1,
        train=60_000,
        test=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        flip=False,
        aug="basic",
        policy="cifar10",
        archives=(
            Archive(
                file="train-images-idx3-ubyte.gz",
                url="https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz",
                md5="f68b3c2dcbeaaa9fbdd348bbdeb94873",
                size=9_912_422,
            ),
            Archive(
                file="train-labels-idx1-ubyte.gz",
                url="https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz",
                md5="d53e105ee54ea40749a09fcbcd1e9432",
                size=28_881,
            ),
            Archive(
                file="t10k-images-idx3-ubyte.gz",
                url="https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz",
                md5="9fb629c4189551a2d022fa330f9573f3",
                size=1_648_877,
            ),
            Archive(
                file="t10k-labels-idx1-ubyte.gz",
                url="https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
                md5="ec29112dd5afa0611ce80d1b7f02629c",
                size=4_542,
            ),
        ),
        citation="LeCun, Bottou, Bengio, Haffner 1998, Gradient-Based Learning Applied to Document Recognition",
        terms="CC BY-SA 3.0",
    ),
    "fashion-mnist": Entry(
        title="Fashion-MNIST",
        classes=10,
        img_size=28,
        in_chans=1,
        train=60_000,
        test=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        flip=True,
        aug="basic",
        policy="cifar10",
        archives=(
            Archive(
                file="train-images-idx3-ubyte.gz",
                url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
                md5="8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                size=26_421_880,
            ),
            Archive(
                file="train-labels-idx1-ubyte.gz",
                url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-labels-idx1-ubyte.gz",
                md5="25c81989df183df01b3e8a0aad5dffbe",
                size=29_515,
            ),
            Archive(
                file="t10k-images-idx3-ubyte.gz",
                url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-images-idx3-ubyte.gz",
                md5="bef4ecab320f06d8554ea6380940ec79",
                size=4_422_102,
            ),
            Archive(
                file="t10k-labels-idx1-ubyte.gz",
                url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz",
                md5="bb300cfdad3c16e7a12a480ee83cd310",
                size=5_148,
            ),
        ),
        citation="Xiao, Rasul, Vollgraf 2017, Fashion-MNIST, arXiv:1708.07747",
        terms="MIT",
    ),
    "imagenet": Entry(
        title="ImageNet (ILSVRC 2012)",
        classes=1000,
        img_size=224,
        in_chans=3,
        train=1_281_167,
        test=50_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip=True,
        aug="deit",
        policy="imagenet",
        archives=(
            Archive(
                file="ILSVRC2012_img_train.tar",
                url=None,
                md5="1d675b47d978889d74fa0da5fadfb00e",
                size=147_897_477_120,
            ),
            Archive(
                file="ILSVRC2012_img_val.tar",
                url=None,
                md5="29b22e2961454d5413ddabcf34fc5622",
                size=6_744_924_160,
            ),
            Archive(
                file="ILSVRC2012_devkit_t12.tar.gz",
                url=None,
                md5="fa75699e90414af021442c21a62c3abf",
            ),
        ),
        citation="Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge, arXiv:1409.0575",
        terms="for non-commercial research and education, after registration at https://image-net.org/download",
    ),
}
