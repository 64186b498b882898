"""Data sets: parsers against bytes written here, lookup and its errors, and the three functions on rows and labels.

Nothing here reaches the network: downloads come from a server on the loopback interface. Tests of the real files run
where BILEVEL_DATA names a folder that has them.
"""

import functools
import gzip
import hashlib
import http.server
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import scipy.stats
import torch

from problems import datasets

HAS_DATA = bool(os.environ.get("BILEVEL_DATA"))
needs_data = pytest.mark.skipif(not HAS_DATA, reason="BILEVEL_DATA is not set: the real data files are not at hand")
TOY_X = np.array([[0.5, 0.0, -1.25], [0.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.1]])
TOY_Y = np.array([1, -1, -1, 1])
TOY_TARGETS = torch.tensor([1, 0, 0, 1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def register(monkeypatch: pytest.MonkeyPatch, file: str, content: bytes) -> None:
    """Make the checksum table expect ``content``."""
    monkeypatch.setitem(datasets._SHA256, file, hashlib.sha256(content).hexdigest())
    monkeypatch.delitem(datasets._SERVED_SHA256, file, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, content: bytes) -> Path:
    register(monkeypatch, file, content)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def mat_bytes(tmp_path: Path, features: object, labels: np.ndarray) -> bytes:
    path = tmp_path / "toy.mat"
    scipy.io.savemat(path, {"X": features, "y": labels.reshape(-1, 1)})
    return path.read_bytes()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Only the tests of the real files see BILEVEL_DATA; all others must not even try a real host."""
    if not request.node.name.startswith("test_real_"):
        monkeypatch.delenv("BILEVEL_DATA", raising=False)
        monkeypatch.setattr(datasets, "_urls", lambda file: ())


# ---- bundled sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "d", "counts"),
    [
        ("digits", 1797, 64, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]),
        ("breast_cancer", 569, 30, [212, 357]),
        ("wine", 178, 13, [59, 71, 48]),
        ("iris", 150, 4, [50, 50, 50]),
    ],
)
def test_bundled_classification(name: str, n: int, d: int, counts: list[int]) -> None:
    data = datasets.load(name)
    assert data.name == name
    assert data.features.shape == (n, d)
    assert (data.n_samples, data.n_features) == (n, d)
    assert data.features.dtype == torch.float64
    assert data.targets.dtype == torch.int64
    assert data.n_classes == len(counts)
    assert data.targets.bincount().tolist() == counts
    assert data.test_features is None
    assert data.test_targets is None
    assert "scikit-learn" in data.source


def test_digits_are_scaled_to_the_unit_interval() -> None:
    features = datasets.load("digits").features
    assert features.min() == 0.0
    assert features.max() == 1.0
    assert torch.equal((features * 16).round(), features * 16)


def test_diabetes_is_regression() -> None:
    data = datasets.load("diabetes")
    assert data.n_classes is None
    assert data.features.shape == (442, 10)
    assert data.targets.dtype == torch.float64
    assert data.targets[:3].tolist() == [151.0, 75.0, 141.0]
    torch.testing.assert_close(data.features.square().sum(0), torch.ones(10, dtype=torch.float64))


def test_dtype_is_that_of_features_and_of_regression_targets() -> None:
    single, double = datasets.load("digits", dtype=torch.float32), datasets.load("digits")
    assert single.features.dtype == torch.float32
    assert single.targets.dtype == torch.int64
    assert torch.equal(single.features, double.features.float())
    assert datasets.load("diabetes", dtype=torch.float32).targets.dtype == torch.float32
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        datasets.load("digits", dtype=torch.int64)


def test_names_load_and_ignore_case() -> None:
    assert datasets.names()[:2] == ["digits", "breast_cancer"]
    assert {"mnist", "ijcnn1", "a8a", "a9a", "w8a", "mushroom"} < set(datasets.names())
    assert len(set(datasets.names())) == len(datasets.names())
    assert datasets.load("Iris").name == "iris"


@pytest.mark.parametrize(("wrong", "meant"), [("Mnits", "mnist"), ("breast-cancer", "breast_cancer"), ("a9", "a9a")])
def test_unknown_name_suggests_and_lists(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data set '{wrong}'. Did you mean '{meant}'") as caught:
        datasets.load(wrong)
    assert all(name in str(caught.value) for name in datasets.names())


def test_unknown_name_without_a_neighbour_suggests_nothing() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'zzzzzz'\. Known: digits") as caught:
        datasets.load("zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_import_is_lazy() -> None:
    code = (
        "import sys, problems.datasets; "
        "print([m for m in ('pooch', 'sklearn', 'scipy.io', 'requests') if m in sys.modules])"
    )
    root = Path(datasets.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- parsers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (300, 2), (2, 3, 5)])
def test_idx_parser(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = (np.arange(np.prod(shape)) * 7 % 256).astype(np.uint8).reshape(shape)
    path = tmp_path / "toy.gz"
    path.write_bytes(gzip.compress(idx_bytes(values)))
    np.testing.assert_array_equal(datasets._read_idx(path), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "not an idx file of unsigned bytes"),
        (b"\x00\x00", "not an idx file of unsigned bytes"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x02", "not an idx file of unsigned bytes"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abcd", r"announces \[5\], the file holds 4 bytes"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03abcd", r"announces \[3\], the file holds 4 bytes"),
    ],
)
def test_idx_parser_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "toy.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        datasets._read_idx(path)


def put_mnist(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images = (np.arange(5 * 28 * 28) % 256).astype(np.uint8).reshape(5, 28, 28)
    labels = np.array([9, 0, 3, 3, 7], dtype=np.uint8)
    for part, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        put(monkeypatch, folder, f"mnist/{part}-images-idx3-ubyte.gz", gzip.compress(idx_bytes(images[rows])))
        put(monkeypatch, folder, f"mnist/{part}-labels-idx1-ubyte.gz", gzip.compress(idx_bytes(labels[rows])))
    return images.reshape(5, -1), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mnist_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype) -> None:
    images, labels = put_mnist(monkeypatch, tmp_path)
    data = datasets.load("MNIST", data_dir=tmp_path, dtype=dtype)
    assert data.test_features is not None
    assert data.test_targets is not None
    expected = torch.tensor(images, dtype=dtype) / 255
    assert torch.equal(data.features, expected[:3])
    assert torch.equal(data.test_features, expected[3:])
    assert data.features.dtype == data.test_features.dtype == dtype
    assert data.targets.tolist() == labels[:3].tolist()
    assert data.test_targets.tolist() == labels[3:].tolist()
    assert data.targets.dtype == data.test_targets.dtype == torch.int64
    assert data.n_classes == 10  # although the toy labels do not show every class


@pytest.mark.parametrize("wrap", [np.asarray, scipy.sparse.csc_array], ids=["dense", "sparse"])
def test_mat_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrap: type) -> None:
    put(monkeypatch, tmp_path, "libsvm/a9a.mat", mat_bytes(tmp_path, wrap(TOY_X), TOY_Y.astype(np.int16)))
    data = datasets.load("a9a", data_dir=tmp_path)
    assert torch.equal(data.features, torch.tensor(TOY_X))
    assert torch.equal(data.targets, TOY_TARGETS)
    assert data.n_classes == 2


def test_labels_one_and_two_become_zero_and_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels = np.array([2, 1, 1, 2], dtype=np.uint8)
    put(monkeypatch, tmp_path, "libsvm/mushroom.mat", mat_bytes(tmp_path, TOY_X, labels))
    assert torch.equal(datasets.load("mushroom", data_dir=tmp_path).targets, TOY_TARGETS)


def test_npz_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", X=TOY_X.astype(np.float32), y=TOY_Y.astype(np.int8))
    put(monkeypatch, tmp_path, "libsvm/ijcnn1_reconstructed.npz", (tmp_path / "toy.npz").read_bytes())
    data = datasets.load("ijcnn1", data_dir=tmp_path)
    assert data.features.dtype == torch.float64
    assert torch.equal(data.features, torch.tensor(TOY_X.astype(np.float32)).double())
    assert torch.equal(data.targets, TOY_TARGETS)


def test_svmlight_round_trip_keeps_the_empty_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A row without entries and a blank last line, as in the real w8a; columns 4 to 300 appear in no row.
    put(monkeypatch, tmp_path, "libsvm/w8a.libsvm.gz", gzip.compress(b"+1 1:0.5 3:-1.25 \n-1 2:2\n-1\n+1 3:0.1\n\n"))
    data = datasets.load("w8a", data_dir=tmp_path)
    expected = torch.zeros(4, 300, dtype=torch.float64)
    expected[0, 0], expected[0, 2], expected[1, 1], expected[3, 2] = 0.5, -1.25, 2.0, 0.1
    assert torch.equal(data.features, expected)
    assert torch.equal(data.targets, TOY_TARGETS)


def test_a_file_with_other_than_two_labels_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(monkeypatch, tmp_path, "libsvm/a9a.mat", mat_bytes(tmp_path, TOY_X, np.array([1, 2, 3, 1])))
    with pytest.raises(ValueError, match=r"two distinct labels, found \[1, 2, 3\]"):
        datasets.load("a9a", data_dir=tmp_path)


def test_nan_and_infinity_name_their_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = TOY_X.copy()
    bad[1, 2], bad[3, 0] = np.nan, -np.inf
    put(monkeypatch, tmp_path, "libsvm/a9a.mat", mat_bytes(tmp_path, bad, TOY_Y))
    with pytest.raises(ValueError, match=r"a9a: features: NaN or infinity in 2 row\(s\): 1, 3$"):
        datasets.load("a9a", data_dir=tmp_path)


def test_many_bad_rows_are_counted_and_the_first_ten_named() -> None:
    with pytest.raises(ValueError, match=r"in 12 row\(s\): 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        datasets.Dataset(
            name="toy", features=torch.full((12, 1), torch.nan), targets=torch.zeros(12), n_classes=None, source=""
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"got \[3, 2\] and \[2\]"),
        ({"targets": torch.tensor([0, 1, 2])}, r"must lie in 0\.\.1, got 0\.\.2"),
        ({"targets": torch.zeros(3)}, "must be an integer tensor"),
        ({"targets": torch.tensor([0.0, torch.inf, 1.0]), "n_classes": None}, r"targets of features: NaN.*: 1$"),
        ({"test_features": torch.zeros(1, 2)}, "give both test_features and test_targets"),
        ({"test_features": torch.zeros(1, 3), "test_targets": torch.zeros(1).long()}, "must have 2 columns"),
        ({"test_features": torch.full((1, 2), torch.inf), "test_targets": torch.zeros(1).long()}, "test_features: NaN"),
    ],
)
def test_dataset_refuses_what_is_no_table(change: dict[str, object], message: str) -> None:
    fields = {"name": "toy", "features": torch.zeros(3, 2), "targets": torch.tensor([0, 1, 1]), "n_classes": 2}
    datasets.Dataset(**fields, source="")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        datasets.Dataset(**(fields | change), source="")  # type: ignore[arg-type]


# ---- lookup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 100])
def test_a_cut_file_is_refused_with_both_checksums(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: int) -> None:
    path = put(monkeypatch, tmp_path, "libsvm/a9a.mat", mat_bytes(tmp_path, TOY_X, TOY_Y))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:kept])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"a9a.*expected {expected}, found {found}") as caught:
        datasets.load("a9a", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_either_published_checksum_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_mnist(monkeypatch, tmp_path)
    file = "mnist/train-images-idx3-ubyte.gz"
    content = gzip.compress(gzip.decompress((tmp_path / file).read_bytes()), compresslevel=0)
    monkeypatch.setitem(datasets._SERVED_SHA256, file, hashlib.sha256(content).hexdigest())
    before = datasets.load("mnist", data_dir=tmp_path)
    (tmp_path / file).write_bytes(content)
    assert torch.equal(datasets.load("mnist", data_dir=tmp_path).features, before.features)
    (tmp_path / file).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"expected .* or .*, found"):
        datasets.load("mnist", data_dir=tmp_path)


def test_missing_file_message_without_a_download(tmp_path: Path) -> None:
    with pytest.raises(datasets.MissingDataError) as caught:
        datasets.load("ijcnn1", data_dir=tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    for part in (
        "'ijcnn1'",
        "libsvm/ijcnn1_reconstructed.npz not found",
        f"in {tmp_path}.",
        "No public download",
        "--data-dir",
        "BILEVEL_DATA",
    ):
        assert part in str(caught.value)


def test_missing_file_message_lists_only_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_mnist(monkeypatch, tmp_path)
    (tmp_path / "mnist/t10k-images-idx3-ubyte.gz").unlink()
    monkeypatch.setattr(datasets, "_urls", lambda file: (f"http://mirror.invalid/{file}",))
    with pytest.raises(datasets.MissingDataError) as caught:
        datasets.load("mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert "mnist/t10k-images-idx3-ubyte.gz" in message
    assert "train" not in message
    assert "without it: http://mirror.invalid/mnist/t10k-images-idx3-ubyte.gz." in message


def test_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(datasets.MissingDataError, match="there is no such folder"):
        datasets.load("a9a", data_dir=tmp_path / "absent")


def test_environment_variable_is_used_and_data_dir_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(monkeypatch, tmp_path, "libsvm/a9a.mat", mat_bytes(tmp_path, TOY_X, TOY_Y))
    with pytest.raises(datasets.MissingDataError, match="BILEVEL_DATA is not set"):
        datasets.load("a9a")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert datasets.load("a9a").n_samples == 4
    with pytest.raises(datasets.MissingDataError, match="elsewhere"):
        datasets.load("a9a", data_dir=tmp_path / "elsewhere")
    monkeypatch.setenv("BILEVEL_DATA", "")
    with pytest.raises(datasets.MissingDataError, match="BILEVEL_DATA is not set"):
        datasets.load("a9a")


# ---- download --------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a loopback server of ``tmp_path/served``, with pooch's cache moved to ``tmp_path/cache``."""
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    for variable in ("NO_PROXY", "no_proxy"):  # requests reads both
        monkeypatch.setenv(variable, "127.0.0.1")
    (tmp_path / "served").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_download_is_checked_and_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    content = mat_bytes(tmp_path, TOY_X, TOY_Y)
    register(monkeypatch, "libsvm/a9a.mat", content)
    (tmp_path / "served" / "a9a.mat").write_bytes(content)
    monkeypatch.setattr(datasets, "_urls", lambda file: (f"{host}/absent/a9a.mat", f"{host}/a9a.mat"))
    assert torch.equal(datasets.load("a9a").features, torch.tensor(TOY_X))  # from the second mirror
    assert (tmp_path / "cache/bilevel/libsvm/a9a.mat").read_bytes() == content
    (tmp_path / "served" / "a9a.mat").unlink()
    assert torch.equal(datasets.load("a9a").targets, TOY_TARGETS)  # from the cache
    with pytest.raises(datasets.MissingDataError, match="Nothing is downloaded while data_dir is given"):
        datasets.load("a9a", data_dir=tmp_path / "absent")


def test_download_completes_a_partial_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    images, _ = put_mnist(monkeypatch, tmp_path / "folder")
    file = "mnist/t10k-images-idx3-ubyte.gz"
    (tmp_path / "folder" / file).rename(tmp_path / "served" / Path(file).name)
    monkeypatch.setattr(datasets, "_urls", lambda file: (f"{host}/{Path(file).name}",))
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "folder"))
    data = datasets.load("mnist")
    assert data.test_features is not None
    assert torch.equal(data.test_features, torch.tensor(images[3:], dtype=torch.float64) / 255)
    assert [path.name for path in (tmp_path / "cache/bilevel/mnist").iterdir()] == [Path(file).name]


def test_plain_text_from_the_public_host_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    content = b"+1 1:0.5 3:-1.25 \n-1 2:2\n"
    monkeypatch.setitem(datasets._SERVED_SHA256, "libsvm/a8a.libsvm.gz", hashlib.sha256(content).hexdigest())
    (tmp_path / "served" / "a8a").write_bytes(content)
    monkeypatch.setattr(datasets, "_urls", lambda file: (f"{host}/a8a",))
    data = datasets.load("a8a")
    assert data.features.shape == (2, 123)
    assert data.features[0, :3].tolist() == [0.5, 0.0, -1.25]
    assert data.targets.tolist() == [1, 0]


def test_wrong_bytes_from_a_host_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    (tmp_path / "served" / "a9a.mat").write_bytes(b"<html>log in to this network</html>")
    monkeypatch.setattr(datasets, "_urls", lambda file: (f"{host}/a9a.mat",))
    with pytest.raises(datasets.MissingDataError, match="does not match the known hash"):
        datasets.load("a9a")
    assert not (tmp_path / "cache/bilevel/libsvm/a9a.mat").exists()


def test_no_network_is_a_missing_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    port = int(host.rsplit(":", 1)[1])
    # Port 1 of the loopback interface has no listener, so the connection is refused as on a machine without a network.
    closed = host.replace(str(port), "1")
    monkeypatch.setattr(datasets, "_urls", lambda file: (f"{closed}/first/{file}", f"{closed}/second/{file}"))
    with pytest.raises(datasets.MissingDataError) as caught:
        datasets.load("mnist")
    message = str(caught.value)
    assert "'mnist': mnist/train-images-idx3-ubyte.gz not found" in message
    assert "ConnectionError" in message
    assert "/first/" in message
    assert "/second/" in message
    assert "BILEVEL_DATA" in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None  # no page of urllib3 frames above the message


def test_real_addresses_are_public_and_cover_all_but_ijcnn1() -> None:
    for file, sha256 in datasets._SHA256.items():
        assert len(sha256) == 64
        assert (datasets._urls(file) == ()) == (file == "libsvm/ijcnn1_reconstructed.npz")
        assert all(url.startswith("https://") for url in datasets._urls(file))
    assert set(datasets._SERVED_SHA256) < set(datasets._SHA256)
    assert datasets._urls("libsvm/w8a.libsvm.gz")[0].endswith("/binary/w8a")
    assert datasets._urls("libsvm/a9a.mat")[0].endswith("26b7ec/a9a.mat")


# ---- standardize -----------------------------------------------------------------------------------------------------


def test_standardize_uses_the_train_rows_only() -> None:
    train = torch.tensor([[1.0, 10.0], [3.0, 10.0]], dtype=torch.float64)
    test = torch.tensor([[5.0, 13.0]], dtype=torch.float64)
    new_train, new_test = datasets.standardize(train, test)
    # Column 0: mean 2, population deviation 1. Column 1 is constant: shifted by 10, divided by 1.
    assert new_train.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert new_test.tolist() == [[3.0, 3.0]]
    assert train.tolist() == [[1.0, 10.0], [3.0, 10.0]]


def test_standardize_gives_zero_mean_and_unit_deviation() -> None:
    train = 5 + 3 * torch.randn(200, 7, dtype=torch.float64, generator=generator())
    (new,) = datasets.standardize(train)
    torch.testing.assert_close(new.mean(0), torch.zeros(7, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(new.std(0, correction=0), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8 + 0.1, -1e-300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_constant_column_becomes_exactly_zero(value: float, dtype: torch.dtype) -> None:
    # The rounded mean of many copies of 0.1 is not 0.1; dividing that difference by its own size would give +-1.
    train = torch.full((1001, 1), value, dtype=dtype)
    new_train, other = datasets.standardize(train, train[:1] + 1)
    assert torch.equal(new_train, torch.zeros_like(train))
    assert torch.equal(other, train[:1] + 1 - train[:1])


def test_a_column_whose_deviation_underflows_stays_finite() -> None:
    train = torch.tensor([[0.0], [1e-200]], dtype=torch.float64)
    assert datasets.standardize(train)[0].isfinite().all()


@pytest.mark.parametrize(
    ("train", "others", "message"),
    [
        (torch.zeros(3), (), r"train must be floating.*got \(3,\)"),
        (torch.zeros(0, 2), (), r"got \(0, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int64), (), "torch.int64"),
        (torch.zeros(3, 2), (torch.zeros(4, 3),), r"others must be \(m, 2\).*got \(4, 3\)"),
        (torch.zeros(3, 2), (torch.zeros(4, 2, dtype=torch.float64),), "torch.float64"),
    ],
)
def test_standardize_refuses(train: torch.Tensor, others: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.standardize(train, *others)


# ---- split -----------------------------------------------------------------------------------------------------------


def test_split_is_a_disjoint_cover() -> None:
    parts = datasets.split(100, [20, -1, 30], generator())
    assert [part.shape for part in parts] == [(20,), (50,), (30,)]
    assert torch.cat(parts).sort().values.tolist() == list(range(100))
    assert all(part.dtype == torch.int64 for part in parts)


def test_split_may_leave_rows_out() -> None:
    parts = datasets.split(100, (20, 30), generator())
    rows = torch.cat(parts)
    assert rows.unique().numel() == rows.numel() == 50
    assert 0 <= int(rows.min()) <= int(rows.max()) < 100


def test_split_is_random_and_reproducible() -> None:
    first, again, other = (datasets.split(1000, [-1], generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(1000))


def test_split_gives_each_row_the_same_chance() -> None:
    rng = generator()
    counts = torch.zeros(10)
    for _ in range(3000):
        counts[datasets.split(10, [3, -1], rng)[0]] += 1
    # 900 expected per row; sampling without replacement makes the statistic smaller, so the bound is on the safe side.
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], r"got \[\]"),
        ([-1, -1], r"at most one -1 .* got \[-1, -1\]"),
        ([5, -2], r"got \[5, -2\]"),
        ([5, 0], r"got \[5, 0\]"),
        ([6, 5], r"sizes \[6, 5\] need more than the n=10 rows"),
        ([10, -1], r"sizes \[10, -1\] need more than the n=10 rows"),
        ([11, -1], r"sizes \[11, -1\] need more than the n=10 rows"),
    ],
)
def test_split_names_impossible_sizes(sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.split(10, sizes, generator())


def test_split_refuses_fractions() -> None:
    with pytest.raises(TypeError):
        datasets.split(10, [0.5, -1], generator())  # type: ignore[list-item]


# ---- corrupt_labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.013, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_corruption_is_exact_and_every_corrupted_label_is_wrong(
    fraction: float, n_classes: int, dtype: torch.dtype
) -> None:
    labels = torch.randint(n_classes, (997,), generator=generator(1)).to(dtype)
    before = labels.clone()
    new, wrong = datasets.corrupt_labels(labels, n_classes, fraction, generator(2))
    assert torch.equal(labels, before)
    assert new.dtype == dtype
    assert wrong.dtype == torch.bool
    assert int(wrong.sum()) == round(fraction * 997)
    assert torch.equal(new != labels, wrong)
    assert 0 <= int(new.min()) <= int(new.max()) < n_classes


def test_corruption_is_uniform_over_the_other_classes_and_over_the_rows() -> None:
    n, n_classes = 200_000, 5
    labels = torch.randint(n_classes, (n,), generator=generator(3))
    new, wrong = datasets.corrupt_labels(labels, n_classes, 0.5, generator(4))
    for old in range(n_classes):
        drawn = new[wrong & (labels == old)].bincount(minlength=n_classes)
        others = torch.cat([drawn[:old], drawn[old + 1 :]])
        assert int(drawn[old]) == 0
        assert scipy.stats.chisquare(others.numpy()).pvalue > 1e-4
    per_stretch = wrong.reshape(20, -1).sum(1)
    assert scipy.stats.chisquare(per_stretch.numpy()).pvalue > 1e-4


def test_corruption_is_reproducible() -> None:
    labels = torch.arange(1000) % 7
    first, again, other = (datasets.corrupt_labels(labels, 7, 0.3, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("labels", "n_classes", "fraction", "message"),
    [
        (torch.tensor([0, 0]), 1, 0.5, "n_classes must be at least 2"),
        (torch.tensor([0, 1]), 2, 1.5, r"fraction must be in \[0, 1\], got 1.5"),
        (torch.tensor([0, 1]), 2, -0.1, r"fraction must be in \[0, 1\]"),
        (torch.tensor([0, 1]), 2, float("nan"), r"fraction must be in \[0, 1\], got nan"),
        (torch.tensor([0, 2]), 2, 0.5, r"must lie in 0\.\.1, got 0\.\.2"),
        (torch.tensor([-1, 1]), 2, 0.5, r"must lie in 0\.\.1, got -1\.\.1"),
        (torch.tensor([0.0, 1.0]), 2, 0.5, "integer tensor"),
        (torch.tensor([[0, 1]]), 2, 0.5, "integer tensor"),
    ],
)
def test_corrupt_labels_refuses(labels: torch.Tensor, n_classes: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.corrupt_labels(labels, n_classes, fraction, generator())


# ---- the real files --------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("name", "n", "d", "counts"),
    [
        ("ijcnn1", 49_990, 22, [45_137, 4_853]),
        ("a8a", 22_696, 123, [17_190, 5_506]),
        ("a9a", 32_561, 123, [24_720, 7_841]),
        ("w8a", 49_749, 300, [48_270, 1_479]),
        ("mushroom", 8_124, 112, [3_916, 4_208]),
        ("diabetes_scaled", 768, 8, [268, 500]),
        ("german_numer_scaled", 1_000, 24, [700, 300]),
    ],
)
def test_real_libsvm(name: str, n: int, d: int, counts: list[int]) -> None:
    data = datasets.load(name)
    assert data.features.shape == (n, d)
    assert data.features.dtype == torch.float64
    assert data.targets.bincount().tolist() == counts
    assert data.n_classes == 2
    assert -1.0 <= float(data.features.min()) < float(data.features.max()) <= 1.0
    assert data.features.any(dim=0).all()  # no column is empty, so the width given to the reader is not too large


@needs_data
def test_real_ijcnn1_one_hot_columns() -> None:
    assert torch.equal(datasets.load("ijcnn1").features[:, :10].sum(1), torch.ones(49_990, dtype=torch.float64))


@needs_data
def test_real_mnist() -> None:
    data = datasets.load("mnist", dtype=torch.float32)
    assert data.test_features is not None
    assert data.test_targets is not None
    assert data.features.shape == (60_000, 784)
    assert data.test_features.shape == (10_000, 784)
    assert data.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.targets.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test_targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (float(data.features.min()), float(data.features.max())) == (0.0, 1.0)
    assert float(data.features.mean()) == pytest.approx(0.1307, abs=5e-5)  # the constants every MNIST recipe quotes
    assert float(data.features.std()) == pytest.approx(0.3081, abs=5e-5)


@needs_data
def test_real_files_contain_what_the_public_hosts_serve() -> None:
    """The sums of the downloads, recomputed from the folder: LIBSVM's text, less w8a's doubled last newline."""
    folder = Path(os.environ["BILEVEL_DATA"])
    for name in ("a8a", "w8a"):
        file = f"libsvm/{name}.libsvm.gz"
        text = gzip.decompress((folder / file).read_bytes())
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() == datasets._SHA256[file]:
            text = text.rstrip(b"\n") + b"\n"
        assert hashlib.sha256(text).hexdigest() == datasets._SERVED_SHA256[file]
