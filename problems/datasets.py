"""Real data sets behind one call, ``load(name)``; nothing is read, imported or downloaded before that call.

Sets bundled with scikit-learn are always there. The others are files, looked for in this order: the ``data_dir`` the
caller names, the folder in the environment variable ``BILEVEL_DATA``, then a download kept in pooch's cache. Every file
is checked against a SHA-256 before it is parsed, so a cut or altered copy never becomes a silently different problem.
"""

import difflib
import functools
import gzip
import hashlib
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

DATA_VARIABLE = "BILEVEL_DATA"


class MissingDataError(FileNotFoundError):
    """The files of a data set were neither found nor downloadable; the message names them and the cure."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Features and targets of one data set, finite by construction.

    Args:
        name: the name ``load`` knows it by; ``source`` says where it comes from.
        features: ``(n, d)`` floating tensor; units are those of the source unless ``load`` says otherwise.
        targets: ``(n,)`` int64 classes ``0..n_classes-1``, or floating values where ``n_classes`` is None (regression).
        test_features, test_targets: the official test part where the set has one, else None; shaped as the above.

    Raises:
        ValueError: shapes that do not fit together, labels outside the classes, NaN or infinity (names the rows).
    """

    name: str
    features: torch.Tensor = field(repr=False)  # (n, d)
    targets: torch.Tensor = field(repr=False)  # (n,)
    n_classes: int | None
    test_features: torch.Tensor | None = field(default=None, repr=False)  # (n_test, d)
    test_targets: torch.Tensor | None = field(default=None, repr=False)  # (n_test,)
    source: str

    def __post_init__(self) -> None:
        _check_part(self.name, "features", self.features, self.targets, self.n_classes)
        if self.test_features is not None and self.test_targets is not None:
            _check_part(self.name, "test_features", self.test_features, self.test_targets, self.n_classes)
            if self.test_features.shape[1] != self.n_features:
                raise ValueError(f"{self.name}: test_features must have {self.n_features} columns, as features has")
        elif self.test_features is not None or self.test_targets is not None:
            raise ValueError(f"{self.name}: give both test_features and test_targets, or neither")

    @property
    def n_samples(self) -> int:
        """Number of rows of ``features`` (the official test part not counted)."""
        return self.features.shape[0]

    @property
    def n_features(self) -> int:
        """Number of columns of ``features``."""
        return self.features.shape[1]


def names() -> list[str]:
    """The names ``load`` knows: scikit-learn's bundled sets first, then the sets kept in files."""
    return [*_BUNDLED, *_FILED]


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load one data set into CPU memory.

    Args:
        name: one of ``names()``, in any case. "diabetes" is scikit-learn's regression set; "diabetes_scaled" is
            LIBSVM's classification set of the same name, another study altogether.
        data_dir: folder holding ``mnist/`` and ``libsvm/``; where given, nothing else is searched and nothing is
            downloaded. Default: the folder in ``BILEVEL_DATA``, then a download. Bundled sets need no folder.
        dtype: floating dtype of the features, and of the targets in regression.

    Returns:
        A ``Dataset``. Pixels are scaled to [0, 1] (digits / 16, MNIST / 255), everything else is as in the source;
        see ``standardize``. Binary labels become 0 and 1 in increasing order, so -1 and 1 (mushroom: 1 and 2) are 0, 1.

    Raises:
        TypeError: ``dtype`` is not a floating dtype.
        ValueError: unknown name (with a suggestion), a file whose checksum differs, NaN or infinity in the data.
        MissingDataError: a file is not there and could not be downloaded.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    key = name.lower()
    if key in _BUNDLED:
        return _dataset(key, _read_bundled(key), f"scikit-learn, sklearn.datasets.load_{key}", dtype)
    if key in _FILED:
        files, read, source = _FILED[key]
        return _dataset(key, read(_locate(key, files, data_dir)), source, dtype)
    close = difflib.get_close_matches(key, names(), n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"unknown data set '{name}'.{suggestion} Known: {', '.join(names())}")


def standardize(train: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Subtract the column means of ``train`` and divide by its standard deviations, in ``train`` and in ``others``.

    The deviation is the population one (divided by n, as in scikit-learn). A constant column is divided by 1.

    Args:
        train: ``(n, d)`` floating tensor, n >= 1; the only one statistics are taken from.
        others: ``(m, d)`` tensors of the same dtype, such as the validation and test rows.

    Returns:
        ``(train, *others)`` as new tensors of the same shapes.

    Raises:
        ValueError: ``train`` is not a floating ``(n, d)`` tensor with rows, or another has other columns or dtype.
    """
    if train.ndim != 2 or train.shape[0] == 0 or not train.is_floating_point():
        raise ValueError(f"train must be floating, of shape (n, d), n >= 1; got {tuple(train.shape)}, {train.dtype}")
    if any(other.ndim != 2 or other.shape[1:] != train.shape[1:] or other.dtype != train.dtype for other in others):
        got = ", ".join(f"{tuple(other.shape)} {other.dtype}" for other in others)
        raise ValueError(f"others must be (m, {train.shape[1]}) {train.dtype}, like train; got {got}")
    low, high = train.aminmax(dim=0)
    # Rounding leaves the mean of a constant column beside its value and the deviation near 1e-17: compare, not divide.
    constant = low == high
    mean = torch.where(constant, low, train.mean(dim=0))
    deviation = train.std(dim=0, correction=0)
    scale = torch.where(constant | (deviation == 0), torch.ones_like(deviation), deviation)
    return tuple((part - mean) / scale for part in (train, *others))


def split(n: int, sizes: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Draw disjoint random sets of row indices.

    Args:
        n: number of rows.
        sizes: rows in each part, each at least 1; one entry may be -1 for all the rows left. Without a -1 the sizes may
            add up to less than n, and the remaining rows are in no part.
        generator: source of the permutation; the indices lie on its device.

    Returns:
        One int64 tensor of shape ``(size,)`` per entry of ``sizes``, in that order.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes that cannot be met, named in the message.
    """
    counts = [operator.index(size) for size in sizes]
    rest = n - sum(count for count in counts if count != -1)
    if not counts or counts.count(-1) > 1 or any(count < 1 and count != -1 for count in counts):
        raise ValueError(f"sizes must be positive, with at most one -1 for the rest; got {counts}")
    if rest < 0 or (rest == 0 and -1 in counts):
        raise ValueError(f"sizes {counts} need more than the n={n} rows there are (-1 takes at least one)")
    parts = [rest if count == -1 else count for count in counts]
    return torch.randperm(n, generator=generator, device=generator.device)[: sum(parts)].split(parts)


def corrupt_labels(
    labels: torch.Tensor, n_classes: int, fraction: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the labels of ``round(fraction * n)`` random rows by a class drawn uniformly from the *other* classes.

    Every changed label is therefore wrong; drawing from all classes would leave one in ``n_classes`` of them right.

    Args:
        labels: ``(n,)`` integer tensor with values ``0..n_classes-1``; left as it is.
        n_classes: number of classes, at least 2.
        fraction: share of wrong labels, in [0, 1].
        generator: source of the rows and of the labels.

    Returns:
        ``(new_labels, wrong)``: ``(n,)`` of the dtype of ``labels``, and ``(n,)`` bool, True where a label was changed.

    Raises:
        ValueError: an argument outside the ranges above, named in the message.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2 for a label to be wrong, got {n_classes}")
    if not 0.0 <= fraction <= 1.0:  # also refuses NaN
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    _check_classes("labels", labels, n_classes)
    order = torch.randperm(len(labels), generator=generator, device=generator.device)
    rows = order[: round(fraction * len(labels))].to(labels.device)
    # A shift by 1..n_classes-1 modulo n_classes never lands on the old class and reaches each other one equally often.
    shift = torch.randint(1, n_classes, rows.shape, generator=generator, device=generator.device).to(labels.device)
    new_labels = labels.index_put((rows,), ((labels[rows].long() + shift) % n_classes).to(labels.dtype))
    return new_labels, torch.zeros_like(labels, dtype=torch.bool).index_fill(0, rows, True)


def _check_part(name: str, what: str, features: torch.Tensor, targets: torch.Tensor, n_classes: int | None) -> None:
    if features.ndim != 2 or targets.shape != features.shape[:1]:
        raise ValueError(f"{name}: {what} must be (n, d), targets (n,); got {[*features.shape]} and {[*targets.shape]}")
    _check_finite(f"{name}: {what}", features)
    _check_finite(f"{name}: targets of {what}", targets.unsqueeze(1))
    if n_classes is not None:
        _check_classes(f"{name}: targets of {what}", targets, n_classes)


def _check_finite(what: str, table: torch.Tensor) -> None:
    rows = (~table.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if rows:
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(f"{what}: NaN or infinity in {len(rows)} row(s): {shown}")


def _check_classes(what: str, labels: torch.Tensor, n_classes: int) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{what} must be an integer tensor of shape (n,), got {labels.dtype}, {tuple(labels.shape)}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        raise ValueError(f"{what} must lie in 0..{n_classes - 1}, got {int(labels.min())}..{int(labels.max())}")


class _Raw(NamedTuple):
    """What a reader returns: arrays as they are to be used, before the choice of dtype."""

    features: np.ndarray  # (n, d)
    targets: np.ndarray  # (n,)
    n_classes: int | None
    test_features: np.ndarray | None = None
    test_targets: np.ndarray | None = None
    divisor: float = 1.0  # applied after the conversion, so that float32 pixels are correctly rounded quotients


def _dataset(name: str, raw: _Raw, source: str, dtype: torch.dtype) -> Dataset:
    kind = dtype if raw.n_classes is None else torch.int64
    return Dataset(
        name=name,
        features=torch.tensor(raw.features, dtype=dtype).div_(raw.divisor),
        targets=torch.tensor(raw.targets, dtype=kind),
        n_classes=raw.n_classes,
        test_features=None if raw.test_features is None else torch.tensor(raw.test_features, dtype=dtype) / raw.divisor,
        test_targets=None if raw.test_targets is None else torch.tensor(raw.test_targets, dtype=kind),
        source=source,
    )


def _read_bundled(name: str) -> _Raw:
    from sklearn import datasets as bundled  # slow to import and needed by this branch only

    readers: dict[str, Callable[..., Any]] = {
        "digits": bundled.load_digits,
        "breast_cancer": bundled.load_breast_cancer,
        "wine": bundled.load_wine,
        "iris": bundled.load_iris,
        "diabetes": bundled.load_diabetes,
    }
    features, targets = readers[name](return_X_y=True)
    return _Raw(features, targets, _BUNDLED[name], divisor=16.0 if name == "digits" else 1.0)


def _read_mnist(files: Sequence[Path]) -> _Raw:
    images, labels, test_images, test_labels = (_read_idx(path) for path in files)
    flat, test_flat = (table.reshape(len(table), -1) for table in (images, test_images))
    return _Raw(flat, labels, 10, test_flat, test_labels, divisor=255.0)


def _read_idx(path: Path) -> np.ndarray:
    """Parse a gzipped idx file of bytes: 0, 0, type 8, rank, then the sizes as big-endian int32, then the data."""
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: not an idx file of unsigned bytes (begins with {content[:4].hex()})")
    rank = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=rank, offset=4).tolist()
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: the header announces {shape}, the file holds {values.size} bytes of data")
    return values.reshape(shape)


def _read_mat(files: Sequence[Path]) -> _Raw:
    from scipy.io import loadmat

    content = loadmat(files[0])
    features = content["X"] if isinstance(content["X"], np.ndarray) else content["X"].toarray()
    return _Raw(features, _zero_one(files[0], content["y"].ravel()), 2)


def _read_npz(files: Sequence[Path]) -> _Raw:
    with np.load(files[0], allow_pickle=False) as content:
        return _Raw(content["X"], _zero_one(files[0], content["y"].ravel()), 2)


def _read_svmlight(files: Sequence[Path], *, n_features: int) -> _Raw:
    from sklearn.datasets import load_svmlight_file

    # The width is given because the last columns of a sparse file may be empty in every row; indices count from 1.
    read: Callable[..., Any] = load_svmlight_file  # its inferred types are wrong: zero_based is "auto" or a bool
    features, labels = read(os.fspath(files[0]), n_features=n_features, zero_based=False)
    return _Raw(features.toarray(), _zero_one(files[0], labels), 2)


def _zero_one(path: Path, labels: np.ndarray) -> np.ndarray:
    """Map two distinct labels to 0 and 1 in increasing order."""
    values, indices = np.unique(labels, return_inverse=True)
    if len(values) != 2:
        raise ValueError(f"{path}: expected two distinct labels, found {values.tolist()}")
    return indices


def _locate(name: str, files: Sequence[str], data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Paths of the files of a data set, in the order given, each with a checked SHA-256."""
    chosen = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    folder = None if chosen is None else Path(chosen).expanduser()
    found = {file: folder / file for file in files if folder is not None and (folder / file).is_file()}
    for file, path in found.items():
        _check_sum(name, file, path)
    missing = [file for file in files if file not in found]
    if any(not _urls(file) for file in missing):
        raise _missing(name, missing, folder, "No public download of these bytes is known.")
    if missing and data_dir is not None:
        offers = ", ".join(_urls(file)[0] for file in missing)
        raise _missing(name, missing, folder, f"Nothing is downloaded while data_dir is given; without it: {offers}.")
    return [found[file] if file in found else _download(name, file, folder) for file in files]


def _missing(name: str, missing: Sequence[str], folder: Path | None, reason: str) -> MissingDataError:
    where = f"in {folder}" if folder is not None else f"in any folder ({DATA_VARIABLE} is not set)"
    absent = " (there is no such folder)" if folder is not None and not folder.is_dir() else ""
    return MissingDataError(
        f"data set '{name}': {', '.join(missing)} not found {where}{absent}. {reason} Cure: pass --data-dir "
        f"(data_dir=...) or set {DATA_VARIABLE} to a folder that holds these files at these relative paths."
    )


def _check_sum(name: str, file: str, path: Path) -> None:
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    accepted = [sums[file] for sums in (_SHA256, _SERVED_SHA256) if file in sums]
    if actual not in accepted:
        sums = f"sha256 expected {' or '.join(accepted)}, found {actual}"
        raise ValueError(f"data set '{name}': {path} is cut short or altered: {sums}. Replace it by an intact copy.")


def _download(name: str, file: str, folder: Path | None) -> Path:
    """Path in pooch's cache, filled from the first mirror that delivers the right bytes."""
    import pooch

    cache = Path(pooch.os_cache("bilevel")) / Path(file).parent
    known_hash = f"sha256:{_SERVED_SHA256.get(file, _SHA256[file])}"
    failures = []
    for url in _urls(file):
        try:
            return Path(pooch.retrieve(url, known_hash, fname=url.rsplit("/", 1)[-1], path=cache))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is pooch's ValueError
            failures.append(f"{url}: {type(error).__name__}: {error}")
    # Raised outside the except clause: the list of mirrors says all that pages of urllib3 frames would.
    raise _missing(name, [file], folder, f"The download failed ({'; '.join(failures)}).")


def _urls(file: str) -> tuple[str, ...]:
    """Public addresses of a file of the data folder, none where no host is known to serve these bytes."""
    if file.startswith("mnist/"):
        hosts = ("https://ossci-datasets.s3.amazonaws.com", "https://storage.googleapis.com/cvdf-datasets")
        return tuple(f"{host}/{file}" for host in hosts)
    if file.endswith(".libsvm.gz"):
        site = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary"
        return (f"{site}/{Path(file).name.removesuffix('.libsvm.gz')}",)
    if file.endswith(".mat"):
        site = "https://raw.githubusercontent.com/g2clv7fwl945/convex_dataset"
        return (f"{site}/3d8f83c73359ab9fa28b0272dde94236cc26b7ec/{Path(file).name}",)
    return ()


_SHA256 = {  # of the files of a data folder, by relative path
    "mnist/train-images-idx3-ubyte.gz": "71524e2cd1ad2968737f7f2f2ff69cbfc32df8ccddff51593f7cb2d4e0eb5b64",
    "mnist/train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "mnist/t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "mnist/t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "libsvm/ijcnn1_reconstructed.npz": "06d382d8d117f3954f85fd7bf80792d7190af73aa7716cf6067e09f7df555cfb",
    "libsvm/a8a.libsvm.gz": "878dc2e86d4b06cd84cfe1759d90e83dbfa41eee6840b184df6daf748d491110",
    "libsvm/w8a.libsvm.gz": "758d97c654378b34cca0160e7a6b2ac926d882b51dddd2f0d3d3743f0ed9135b",
    "libsvm/a9a.mat": "0dc003594df06de51408830782d1b3a4e4298065c9d3ccfd6d9d71d5bfed6de5",
    "libsvm/mushroom.mat": "123a7d4a0b0925a9cf9538ba920919e473389e848f038a65b61593f886765375",
    "libsvm/diabetes_scaled.mat": "ab26b90ce864ff1ea159d0cb786a4c5c34b4ec554b7e61d99b2ef79731657738",
    "libsvm/german_numer_scaled.mat": "a84c8b30bf8e53d8f43356211101704fff52542ef8097027ecdb29c5dd9dc3d2",
}

_SERVED_SHA256 = {  # of what the public hosts serve where that is the same content compressed otherwise or not at all
    "mnist/train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "libsvm/a8a.libsvm.gz": "d08a37b3fadd4bd3c8b3fc30bdc93b54d7c0f371265c90cbfb931a7efe97cd28",
    "libsvm/w8a.libsvm.gz": "6a9fa8fd5f524303240a5db07d4b3d4a51e8b7b4b20a914105d8e3e8c81640f2",
}

_BUNDLED: dict[str, int | None] = {"digits": 10, "breast_cancer": 2, "wine": 3, "iris": 3, "diabetes": None}  # classes

_FILED: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Path]], _Raw], str]] = {  # files, reader, source
    "mnist": (tuple(f for f in _SHA256 if f.startswith("mnist/")), _read_mnist, "MNIST (LeCun, Cortes, Burges)"),
    "ijcnn1": (("libsvm/ijcnn1_reconstructed.npz",), _read_npz, "LIBSVM ijcnn1, training part, one-hot rebuilt"),
    "a8a": (("libsvm/a8a.libsvm.gz",), functools.partial(_read_svmlight, n_features=123), "LIBSVM a8a"),
    "w8a": (("libsvm/w8a.libsvm.gz",), functools.partial(_read_svmlight, n_features=300), "LIBSVM w8a"),
    "a9a": (("libsvm/a9a.mat",), _read_mat, "LIBSVM a9a"),
    "mushroom": (("libsvm/mushroom.mat",), _read_mat, "LIBSVM mushrooms"),
    "diabetes_scaled": (("libsvm/diabetes_scaled.mat",), _read_mat, "LIBSVM diabetes_scale"),
    "german_numer_scaled": (("libsvm/german_numer_scaled.mat",), _read_mat, "LIBSVM german.numer_scale"),
}
